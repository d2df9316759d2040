"""What Transformers makes of saved models where hf_compress was never imported."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_LOAD = """
import json, sys
import transformers
assert "hf_compress" not in sys.modules
outcomes = {}
for folder in sys.argv[1:]:
    for name in ("AutoModel", transformers.AutoConfig.from_pretrained(folder).architectures[0]):
        try:
            getattr(transformers, name).from_pretrained(folder)
            outcome = "loaded"
        except RuntimeError as error:
            outcome = "size mismatch" if "ignore_mismatched_sizes" in str(error) else f"RuntimeError {error}"
        outcomes.setdefault(folder, []).append(outcome)
assert "hf_compress" not in sys.modules
print(json.dumps(outcomes))
"""


def stock_outcomes(folders: Iterable[str], cwd: Path) -> dict[str, list[str]]:
    """By folder, what comes of loading it without and with the head, in a process started in `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *folders], capture_output=True, text=True, timeout=300, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
