"""Saving a compressed model: staged beside its place, loaded again and compared, and only then put there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.calibration.data import Batch
from hf_compress.errors import ParityError
from hf_compress.parity import Probe, outputs_on, quiet, same_outputs, same_tensor
from hf_compress.report.report import CompressionReport

REPORT_FILE = "compression_report.json"


def save(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
    probe: Batch | None = None,
) -> Path:
    """Write `model`, its tokenizer and its compression report, so that `from_pretrained(directory)` gives it back.

    The files are written to a sibling folder, loaded from there, and compared: every tensor, and the outputs on a probe
    batch, bit for bit. Then the folder is renamed. `directory` holds all of it, or what it held before.

    Args:
        model: any model in memory; with a `compression_report` when it comes from `compress`.
        directory: where it goes; its parents are made.
        tokenizer: saved beside the model.
        overwrite: whether a directory that exists may be replaced. It is replaced whole, not written into.
        probe: inputs for the comparison; made up when None.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory exists and holds something, and `overwrite` is false.
        ParityError: what was written does not load as the model in memory; nothing is left behind.
    """
    target = Path(directory)
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write(model, staged, tokenizer)
        verify(model, staged, Probe.of(model, probe))
        _put_in_place(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return target


def check_target(directory: Path, overwrite: bool) -> None:
    """Raise FileExistsError where the directory holds something and may not be replaced."""
    if directory.exists() and not overwrite and (directory.is_file() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} exists and is not empty: choose another, or pass overwrite=True (--overwrite)"
        )


def _write(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    with quiet():
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    report = getattr(model, "compression_report", None)
    if isinstance(report, CompressionReport):
        report.to_json(folder / REPORT_FILE)


def verify(model: PreTrainedModel, folder: Path, probe: Probe) -> None:
    """Raise unless the model loaded from `folder` is `model`: the same tensors, and the same outputs on the probe."""
    with quiet():
        loaded = type(model).from_pretrained(folder, dtype=model.dtype, device_map={"": model.device})
    for name, difference in _tensor_differences(model.state_dict(), loaded.state_dict()):
        raise ParityError(f"the saved model does not load as it is in memory: {name} {difference}")
    loaded.train(model.training)
    own_memory(loaded)
    if not same_outputs(outputs_on(model, probe), outputs_on(loaded, probe)):
        raise ParityError("the saved model has the same tensors as the one in memory, but gives other outputs")


def own_memory(model: PreTrainedModel) -> None:
    """Copy every parameter into memory of its own.

    A loaded parameter lies in the mapped file, at an offset that is seldom a multiple of 64 bytes, and a few kernels
    round differently there. That is no difference between the models.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def _tensor_differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[tuple[str, str]]:
    """The names of the tensors that are not the same in both, and what is wrong with each."""
    missing = [(name, "is missing") for name in first.keys() - second.keys()]
    added = [(name, "appears from nowhere") for name in second.keys() - first.keys()]
    changed = [(n, "has other values") for n in first.keys() & second.keys() if not same_tensor(first[n], second[n])]
    return sorted(missing + added + changed)


def _put_in_place(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`, putting aside and then deleting what was there."""
    os.chmod(staged, 0o777 & ~_umask())
    if not target.exists():
        staged.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(aside / target.name)
        staged.rename(target)
    except BaseException:
        if not target.exists():
            (aside / target.name).rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
