"""export(): a saved model in the form of another engine, loaded there at once, and compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.calibration.media import Processor
from hf_compress.calibration.vocabulary import position_limit
from hf_compress.checks import check, check_names
from hf_compress.engines.agreement import Agreement, Reference, agreement
from hf_compress.engines.gguf import Gguf
from hf_compress.engines.graphs import Onnx, OpenVino
from hf_compress.engines.target import Target
from hf_compress.engines.vllm.target import Vllm
from hf_compress.evaluation.loading import load_saved
from hf_compress.evaluation.processors import load_processor
from hf_compress.report.history import add_stage, history_of, model_size
from hf_compress.report.stages import WRITTEN_OUT, Stage, Step
from hf_compress.rewrite.dense import write_out
from hf_compress.storage.compressed_tensors import save_compressed_tensors
from hf_compress.storage.save import check_target, save, save_staged

TARGETS: dict[str, type[Target]] = {target.name: target for target in (Gguf, Onnx, OpenVino, Vllm)}
DENSE, COMPRESSED_TENSORS = "dense", "compressed-tensors"  # which Transformers loads
FORMS = (DENSE, COMPRESSED_TENSORS, *TARGETS)

PROMPTS, LENGTH, WORDS = 4, 24, 16  # prompts, tokens of each, and tokens after them
"""What an engine is compared by."""


@dataclass(frozen=True)
class Exported:
    """What `export` has written.

    Attributes:
        folder: where it lies.
        form: what it is.
        agreement: of the engine with Transformers; None where Transformers loads it, to the same bits.
        bytes: of all files.
    """

    folder: Path
    form: str
    agreement: Agreement | None
    bytes: int

    def __str__(self) -> str:
        told = "the same outputs, bit for bit" if self.agreement is None else str(self.agreement)
        return f"{self.folder}: {self.form}, {self.bytes:,} bytes; {told}"


def export(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    tolerance: float | None = None,
    prompts: Iterable[str] | None = None,
    **options: Any,
) -> Exported:
    """Write a saved model for another engine, load it there, and hold what it says to what Transformers says.

    The engine goes on with a few prompts, greedily: every token must be the one that the model in Transformers says, in
    float32, and log-probabilities may differ by `tolerance`. Where they do not, nothing is left behind.

    Args:
        source: a directory with a model, or a model's name on the Hub; what `save` wrote, or any other.
        output: a folder for what is written; its parents are made.
        to: `dense` (an ordinary checkpoint, packed and sparse weights written out as matrices), `compressed-tensors`
            (see `save_compressed_tensors`), `gguf` (llama.cpp), `onnx` (ONNX Runtime), `openvino`, or `vllm` (what
            `save` writes, held to vLLM).
        overwrite: whether a folder that exists may be replaced.
        tolerance: in nats; the engine's own when None.
        prompts: to compare by; random tokens when None.
        options: of the form: `outtype` ("bf16", "f16", "f32", "q8_0") and `pre_tokenizer` for gguf; `python`, the
            interpreter of the environment with vLLM, for vllm.

    Raises:
        ValueError: an unknown form; UnsupportedModelError, one that cannot say what the model is, and why.
        ImportError: a package is missing, by name.
        FileExistsError: the folder exists, and `overwrite` is false.
        ParityError: the engine says something else.
    """
    if to not in FORMS:
        raise ValueError(f"to is {to!r}; expected one of {', '.join(FORMS)}")
    check("tolerance", tolerance, float | None, "(0, inf)")
    check_target(Path(output), overwrite)
    check_names(to, options, TARGETS[to].options if to in TARGETS else ())
    target = TARGETS[to](**options) if to in TARGETS else None
    if target is not None:
        target.check_installed()
    model = load_saved(str(source), dtype=target.dtype if target else "auto").eval()
    processor = load_processor(str(source))
    agreed = None
    if target is not None:
        if target.writes_out:
            write_out(model)
        target.check(model)
        agreed = _export(target, model, processor, Path(output), overwrite, tolerance, prompts)
    elif to == DENSE:
        _write_out(model)
        save(model, output, processor, overwrite=overwrite)
    else:
        save_compressed_tensors(model, output, processor, overwrite=overwrite)
    files = (path for path in Path(output).rglob("*") if path.is_file())
    return Exported(Path(output), to, agreed, sum(path.stat().st_size for path in files))


def _export(
    target: Target,
    model: PreTrainedModel,
    processor: Processor | None,
    output: Path,
    overwrite: bool,
    tolerance: float | None,
    prompts: Iterable[str] | None,
) -> Agreement:
    asked = _prompts(model, processor, prompts)
    agreed: list[Agreement] = []
    allowed = tolerance or target.tolerance(model)

    def compare(folder: Path) -> None:
        reference = Reference(model.float())
        with target.speaker(folder, model) as speaker:
            target.check_written(speaker, processor)
            agreed.append(agreement(reference, speaker, asked, WORDS, allowed, target.engine))

    save_staged(output, overwrite, lambda folder: target.write(model, processor, folder, asked), compare)
    return agreed[0]


def _prompts(model: PreTrainedModel, processor: Any, texts: Iterable[str] | None) -> list[Sequence[int]]:
    """Token ids to go on with: of texts, or random ones."""
    room = max(1, (position_limit(model.config) or LENGTH + WORDS) - WORDS)
    length = min(LENGTH, room)
    if texts is not None:
        if processor is None:
            raise ValueError("prompts are texts, and the model has no tokenizer: leave them out")
        found = [processor(text)["input_ids"][:length] for text in texts]
        if not found or not all(found):
            raise ValueError("prompts: give at least one text, and none that is empty")
        return found
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    drawn: list[Sequence[int]] = torch.randint(vocabulary, (PROMPTS, length), generator=generator).tolist()
    return drawn


def _write_out(model: PreTrainedModel) -> None:
    """Write weights out, and have the model's history tell it."""
    history, before, start = history_of(model), model_size(model), perf_counter()
    if write_out(model) and history is not None:
        steps = [Step("write weights out", perf_counter() - start)]
        stage = Stage(WRITTEN_OUT, {}, before, model_size(model), [], {}, steps, {}, None)
        add_stage(model, stage, history)
