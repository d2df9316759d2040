"""Where the bundled model and its texts lie: in a clone of the repository, and in no wheel."""

from __future__ import annotations

from pathlib import Path

REFERENCE = Path(__file__).resolve().parents[2] / "examples" / "reference"
MODEL = "manuals-llama-12l"


def require_reference() -> None:
    """Check that the bundled model and its texts are there, before anything slow is imported.

    Raises:
        FileNotFoundError: something of it is missing, because this is no clone of the repository.
    """
    for name in (f"{MODEL}/model.safetensors", "calibration.jsonl", "heldout.jsonl"):
        if not (REFERENCE / name).exists():
            raise FileNotFoundError(
                f"the demo needs the bundled model and its texts, which a wheel does not carry (no {name} in "
                f"{REFERENCE}): get a clone of the repository, and run `make demo` there"
            )
