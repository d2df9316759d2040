"""Saving a compressed model: built beside its place, loaded again and compared, and only then put there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.adapters import check_no_adapters
from hf_compress.anatomy.dispatch import is_offloaded
from hf_compress.anatomy.offloaded import whole_state
from hf_compress.calibration.data import Batch
from hf_compress.calibration.media import Processor
from hf_compress.calibration.processes import by_first
from hf_compress.errors import ParityError
from hf_compress.report.card import model_card
from hf_compress.report.card_facts import CardDetails
from hf_compress.rewrite.aligned import aligned
from hf_compress.rewrite.probe import Probe, outputs_on, same_outputs, same_tensor
from hf_compress.storage.beside import write_beside
from hf_compress.storage.manifest import describe, verify_files, write_manifest
from hf_compress.storage.portable import make_portable
from hf_compress.storage.staging import check_writable, put_in_place, stage
from hf_compress.storage.weights import tensors_in, write_weights
from hf_compress.storage.written import load, outputs_of, same_bits, written


@by_first
def save(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Processor | None = None,
    *,
    overwrite: bool = False,
    probe: Batch | Mapping[str, Any] | None = None,
    portable: bool = False,
    card: ModelCard | None = None,
) -> Path:
    """Write `model`, its tokenizer, history and card, so that `from_pretrained(directory)` gives it back.

    The files are written to a hidden folder beside `directory`, loaded from there, and compared: every tensor, and the
    outputs on a probe batch, bit for bit. A manifest of their hashes comes last (see `verify_files`). Then the folder
    is put in its place, in one step where the system has it (Linux). Whatever happens, a `kill -9` or a power cut
    included, `directory` holds all of the new model, or what it held before; without such a step it may, for the moment
    between two renamings, hold nothing, and what it held waits in the hidden folder until a save succeeds. The next
    save to `directory` deletes what killed ones left beside it.

    Where torch.distributed has several processes, all have to call it: the first writes, and the others wait for it.

    Args:
        model: any model in memory. What is known of its history (see `history_of`) goes into a report beside it.
        directory: where it goes; its parents are made. Of a link, what it points to is replaced.
        tokenizer: saved beside the model; or its image processor, feature extractor, or processor.
        overwrite: whether a directory that exists may be replaced. It is replaced whole, not written into; `card` says
            when its README.md stays.
        probe: inputs for the comparison: a batch, or keyword arguments of the model's forward. When None, those that
            `compress` checked with, or else made up.
        portable: whether a checkpoint that needs the plugin brings a file that imports it under
            `trust_remote_code=True`. A plain checkpoint needs none, and gets none.
        card: the README.md. When None, the one in `directory` stays, with all that was edited there, if it is this very
            model's: the report beside it tells the same history, or the model has none and was loaded from there.
            Else one is made of the history, if there is one.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory exists and holds something, and `overwrite` is false.
        TypeError: the model carries adapters, or wrappers of theirs.
        UnsupportedModelError: the model does not run on the probe.
        ParityError: what was written does not load as the model in memory; nothing is left behind.
        ManifestError: a file changed between being written and being put in place; nothing is left behind.
        ValueError: `portable`, and the model's class is none of Transformers.
    """
    check_target(Path(directory), overwrite)
    check_no_adapters(model)
    inputs = Probe.of(model, probe)

    def write(folder: Path) -> None:
        _write(model, folder, Path(directory).resolve(), tokenizer, card, portable)
        if portable:
            make_portable(model, folder)

    return save_staged(directory, overwrite, write, lambda folder: verify(model, folder, inputs))


def save_staged(
    directory: str | Path, overwrite: bool, write: Callable[[Path], None], check: Callable[[Path], None]
) -> Path:
    """Have `write` fill a folder beside `directory`, and put it in its place if `check` does not raise; see `save`.

    Whether something may be replaced there, `check_target` has said before.
    """
    target = Path(directory).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with stage(target) as folder:
        write(folder)
        _share(folder)
        files = describe(folder)  # before they are loaded and compared, so that it is these that were
        check(folder)
        write_manifest(folder, files)
        verify_files(folder)
        put_in_place(folder, target, overwrite)
    return Path(directory)


def check_target(directory: Path, overwrite: bool) -> None:
    """Raise where a directory cannot be written: FileExistsError where it holds something and may not be replaced."""
    if directory.exists() and not overwrite and (directory.is_file() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty: choose another, or pass overwrite=True")
    check_writable(directory.resolve().parent if directory.exists() else directory)


def _write(
    model: PreTrainedModel,
    folder: Path,
    target: Path,
    tokenizer: Processor | None,
    card: ModelCard | None,
    portable: bool,
) -> None:
    write_weights(model, folder)
    details = CardDetails(name=target.name, tokenizer=tokenizer is not None, portable=portable)
    write_beside(model, folder, target, tokenizer, card, lambda: model_card(model, details=details))


def _share(folder: Path) -> None:
    """Let the weights be read by whom the umask lets: safetensors makes them for their owner alone."""
    files = [path for path in folder.iterdir() if path.is_file()]
    modes = [path.stat().st_mode for path in files if path.suffix != ".safetensors"]
    for path in files:
        path.chmod(modes[0])


def verify(model: PreTrainedModel, folder: Path, probe: Probe) -> None:
    """Raise unless the model loaded from `folder` is `model`: the same tensors, and the same outputs on the probe.

    Of the loaded one no more is in memory than the weights of the module that runs, as long as nothing differs.
    """
    with written(model, folder) as loaded:
        for name, difference in _differences(model, loaded, folder):
            raise ParityError(f"the saved model does not load as it is in memory: {name} {difference}")
        if not _gives_the_same(model, loaded, folder, probe):
            raise ParityError("the saved model has the same tensors as the one in memory, but gives other outputs")


def _differences(model: PreTrainedModel, loaded: PreTrainedModel, folder: Path) -> Iterator[tuple[str, str]]:
    """What tells the tensors of a model from those in the files, and from those that were loaded from them."""
    state = whole_state(model)
    for name, tensor in tensors_in(folder).items():
        if name in state and tensor.dtype != state[name].dtype:
            yield name, f"was written as {tensor.dtype} instead of {state[name].dtype}"
    yield from tensor_differences(state, loaded.state_dict(), same_bits)


def _gives_the_same(model: PreTrainedModel, loaded: PreTrainedModel, folder: Path, probe: Probe) -> bool:
    """Whether two models with the same tensors give the same outputs."""
    with aligned(model):
        expected = outputs_on(model, probe)
    with suppress(Exception):  # a module that reads the weights of another finds them on the CPU
        if same_outputs(expected, outputs_of(loaded, model, probe)):
            return True
    if is_offloaded(model):
        return False
    again = load(model, folder, device_map={"": model.device}).train(model.training)
    own_memory(again)  # or finds them not aligned
    return same_outputs(outputs_on(model, probe), outputs_on(again, probe))


def own_memory(model: PreTrainedModel) -> None:
    """Copy every parameter into memory of its own.

    A loaded parameter lies in the mapped file, at an offset that is seldom a multiple of 64 bytes, and a few kernels
    round differently there. That is no difference between the models.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def tensor_differences(
    first: dict[str, Tensor], second: dict[str, Tensor], same: Callable[[Tensor, Tensor], bool] = same_tensor
) -> list[tuple[str, str]]:
    """The names of the tensors that are not the same in both, and what is wrong with each."""
    missing = [(name, "is missing") for name in first.keys() - second.keys()]
    added = [(name, "appears from nowhere") for name in second.keys() - first.keys()]
    changed = [(n, "has other values") for n in first.keys() & second.keys() if not same(first[n], second[n])]
    return sorted(missing + added + changed)
