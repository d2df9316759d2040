"""What of each kind of change runs in which engine, and says there what Transformers says.

    python benchmarks/engines.py                     # the bundled model, eight kinds of change, every form of `export`
    python benchmarks/engines.py --only packed       # the kinds whose names begin so
    python benchmarks/engines.py --vllm PYTHON       # vLLM's environment, if it is not the one of `make vllm`

Every cell is one `hfc.export`: the form is written, loaded by its engine, and has to go on with four prompts as
Transformers does in float32; or it is refused, and the table says why.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from common import REFERENCE, VLLM, load, write_result
from tqdm.auto import tqdm

import hf_compress as hfc
from hf_compress.calibration.files import load_texts

DATA = REFERENCE.parent / "calibration.jsonl"
SAMPLES, POSITIONS = 48, 128
KINDS = {
    "depth": hfc.DropBlocksConfig(ratio=0.25, criterion="last"),
    "uniform width": hfc.ILLCConfig(ratio=0.25, plain=True),
    "per-block widths": hfc.ILLCConfig(ratio=0.25, allocation="adaptive"),
    "heads": hfc.ILLCConfig(ratio=0.25, head_gamma=0.5),
    "linear FFN": hfc.LayerCollapseConfig(num_layers=3),
    "packed 4.25": hfc.LRPConfig(bits=4.25),
    "sparse": hfc.LRPConfig(sparsity=0.5),
    "bottleneck": hfc.AdaptiveCompressConfig(),
}
FORMS = {
    "dense": "Transformers (dense)",
    "vllm": "vLLM",
    "gguf": "llama.cpp",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
}


@dataclass(frozen=True)
class Cell:
    """What came of a kind of change in an engine."""

    text: str
    bytes: int | None = None
    difference: float | None = None


def cell(model: Path, output: Path, form: str, options: dict[str, str]) -> Cell:
    """Of an export, carried out or refused."""
    try:
        found = hfc.export(model, output, form, **options)
    except ImportError:
        raise
    except ValueError as error:
        return Cell(f"refused: {' '.join(str(error).split())}")
    if found.agreement is None:
        return Cell(f"same bits; {found.bytes / 1e6:.1f} MB", found.bytes, 0.0)
    ties = found.agreement.ties
    tie = f" up to {ties} tie{'s' * (ties > 1)}" if ties else ""
    difference = found.agreement.largest_difference
    return Cell(f"same tokens{tie} (± {difference:.1g} nats); {found.bytes / 1e6:.1f} MB", found.bytes, difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="KIND")
    parser.add_argument("--vllm", default=str(VLLM), metavar="PYTHON")
    args = parser.parse_args()
    options = {"vllm": {"python": args.vllm}}
    texts = load_texts(str(DATA), limit=SAMPLES)
    kinds = [kind for kind in KINDS if kind.startswith(tuple(args.only))]
    lines = [f"| | {' | '.join(FORMS.values())} |", f"|---|{'---|' * len(FORMS)}"]
    data: dict[str, dict[str, object]] = {}
    with TemporaryDirectory() as folder:
        for kind in tqdm(kinds, desc="engines"):
            model, tokenizer = load(REFERENCE)
            hfc.compress(model, KINDS[kind], texts, tokenizer, hfc.DataOptions(max_length=POSITIONS))
            place = hfc.save(model, Path(folder) / kind, tokenizer)
            cells = {form: cell(place, Path(folder) / f"{kind}-{form}", form, options.get(form, {})) for form in FORMS}
            lines.append(f"| {kind} | {' | '.join(one.text.replace('|', ' ') for one in cells.values())} |")
            data[kind] = {form: vars(one) for form, one in cells.items()}
    write_result("engines", "\n".join(lines), data)


if __name__ == "__main__":
    main()
