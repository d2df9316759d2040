"""Packed and sparse weights written out as matrices, so that a model is one that any tool reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.dispatch import is_offloaded
from hf_compress.anatomy.experts import expert_tables
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.compact import CompactLinear
from hf_compress.modules.experts import Expert, SeparateExperts
from hf_compress.modules.kernels import check_no_kernels
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.config_fields import described
from hf_compress.rewrite.edits.experts import SplitExperts
from hf_compress.rewrite.edits.packed import StoreLinear
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.record import record, recorded, unsealed
from hf_compress.rewrite.site import Site


@torch.no_grad()
def write_out(model: PreTrainedModel) -> list[str]:
    """Give every packed or sparse linear map of `model` the matrix that it computes with, in the model's dtype.

    Experts that were taken apart for it are put together again. The config says afterwards what is left to be said:
    often nothing. The model gives what it gave; its size is that of the matrices.

    Returns:
        The paths of the modules that were written out.

    Raises:
        UnsupportedModelError: the model is offloaded, or computes with kernels that keep no weights.
    """
    if is_offloaded(model):
        raise UnsupportedModelError("weights are written out in memory, and the model is offloaded: load it whole")
    check_no_kernels(model)
    undo = Undo()
    try:
        return _write_out(model, undo)
    except BaseException:
        undo.rollback()
        raise


def _write_out(model: PreTrainedModel, undo: Undo) -> list[str]:
    unsealed(Plan(), model, undo)
    left = [edit for edit in recorded(model.config) if not isinstance(edit, (StoreLinear, SplitExperts, Seal))]
    stock, site, paths = described(model, left), Site(model, undo), _compact(model)
    mixtures = any(isinstance(model.get_submodule(path), SeparateExperts) for path in paths)
    for path in paths:
        own = model.get_submodule(path)
        new = _experts(own, stock, path) if isinstance(own, SeparateExperts) else _linear(own, stock, path)
        site.replace(path, new)
    if mixtures:
        _save_as_the_class_does(model, undo)
    record(model, left, undo)
    return paths


def _save_as_the_class_does(model: PreTrainedModel, undo: Undo) -> None:
    """Have Transformers write experts as files of this class have them.

    It does to a model that is saved the inverse of what it did when it was loaded, and then experts were apart.
    """
    done = getattr(model, "_weight_conversions", None)
    if done is None:  # it was not loaded
        return
    known = {pattern for one in done for pattern in one.source_patterns}
    own = [one for one in get_model_conversion_mapping(model, add_legacy=False) if isinstance(one, WeightConverter)]
    undo.set(
        model, "_weight_conversions", [*(one for one in own if not known.intersection(one.source_patterns)), *done]
    )


def _compact(model: PreTrainedModel) -> list[str]:
    """Paths of compact linear maps, and of mixtures in whose place the model's class has one module."""
    mixtures = [path for path, module in model.named_modules() if isinstance(module, SeparateExperts)]
    linears = [path for path, module in model.named_modules() if isinstance(module, CompactLinear)]
    inside = tuple(f"{path}." for path in mixtures)
    return [*mixtures, *(path for path in linears if not path.startswith(inside))]


def _linear(own: nn.Module, stock: PreTrainedModel, path: str) -> nn.Module:
    """The map that the model's class has there, with the matrix of the compact one."""
    assert isinstance(own, CompactLinear)
    new = stock.get_submodule(path)
    matrix = _matrix(own, stock.dtype)
    new._parameters["weight"] = nn.Parameter(matrix.T.contiguous() if isinstance(new, Conv1D) else matrix)
    if new._parameters.get("bias") is not None:
        new._parameters["bias"] = own._parameters["bias"]
    return new


def _experts(own: SeparateExperts, stock: PreTrainedModel, path: str) -> nn.Module:
    """The module that holds the tensors of all experts."""
    new = stock.get_submodule(path)
    device = next(iter(own.state_dict().values())).device
    held = {name: parameter for name, parameter in new._parameters.items() if parameter is not None}
    new._parameters |= {name: nn.Parameter(torch.empty_like(one, device=device)) for name, one in held.items()}
    tables = expert_tables(new)
    for number, expert in enumerate(own.experts):
        for name, table in tables.items():
            table[number].copy_(_part(expert, name, stock.dtype))
    return new


def _part(expert: Expert, name: str, dtype: torch.dtype) -> Tensor:
    """The weight or the bias of one of an expert's maps, by its name in `expert_tables`."""
    linear = expert.get_submodule(name.partition(".")[0])
    if name.endswith("weight"):
        return _matrix(linear, dtype)
    bias = linear._parameters["bias"]
    assert bias is not None
    return bias


def _matrix(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs), a tensor of its own."""
    weight = linear.dense(dtype) if isinstance(linear, CompactLinear) else linear.get_parameter("weight")
    return weight.detach().to(dtype).clone()
