"""What vLLM calls when it starts: from then on it loads what `save` writes, whatever the record of the structure says.

Models that their config describes need nothing of this. Of others, vLLM is to take Transformers' own class, which it
does for any family that it has none for, and to carry out the recorded edits before it puts its own layers in the place
of the model's. Then narrower FFNs, linear ones and bottlenecks are computed by vLLM's kernels as ever. Packed and
sparse weights are written out as matrices while they are read.

Three places of vLLM are wrapped, each found by name; a version without one of them is refused in words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from torch import Tensor
from wrapt import register_post_import_hook, wrap_function_wrapper

from hf_compress.engines.vllm.structure import Structure, structure_of
from hf_compress.engines.vllm.weights import written_out
from hf_compress.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_IMPLEMENTATION = "transformers"  # vLLM's word for a model that Transformers' class makes
_WRAPPED = "_hf_compress"  # what is put on a module of vLLM once something in it is wrapped


def register() -> None:
    """Teach vLLM, in each of its processes; the entry point `vllm.general_plugins`. Twice does no harm."""
    _when_imported("vllm.config.model", "ModelConfig.get_model_arch_config", _choose_class)
    _when_imported("vllm.model_executor.models.transformers.base", "Base._create_hf_to_vllm_mapper", _rebuild)
    _when_imported("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.get_all_weights", _read)


def _when_imported(module: str, name: str, wrapper: Callable[..., Any]) -> None:
    def wrap(imported: Any) -> None:
        if hasattr(imported, _WRAPPED):
            return
        try:
            wrap_function_wrapper(imported, name, wrapper)
        except AttributeError:
            version = import_module("vllm").__version__
            logger.error("vLLM %s has no %s.%s: it cannot load what hf_compress has changed", version, module, name)
            return
        setattr(imported, _WRAPPED, True)

    register_post_import_hook(wrap, module)


def _choose_class(wrapped: Callable[[], Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the record out of a config that vLLM has read, where it would look for a quantization."""
    structure = structure_of(model.hf_config)
    if structure is not None and structure.edits:
        if model.model_impl not in ("auto", _IMPLEMENTATION):
            raise UnsupportedModelError(
                f"model_impl is {model.model_impl!r}, by which vLLM builds the model from its config; that cannot say "
                f"{structure.edits[0].paths[-1]}: {structure.edits[0].describe()}. Leave model_impl out"
            )
        model.model_impl = _IMPLEMENTATION
    return wrapped(*args, **kwargs)


def _rebuild(wrapped: Callable[[], None], own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Carry out the record on the model that Transformers' class has made, before vLLM looks at its modules."""
    structure = structure_of(own.config)
    if structure is not None:
        structure.rebuild(own.model, own.model_config, own.tp_group.world_size)
    wrapped(*args, **kwargs)


def _read(wrapped: Callable[..., Any], loader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give vLLM the weights of a checkpoint as matrices, by the names that they have without a record."""
    settings = args[0] if args else kwargs["model_config"]
    weights: Iterator[tuple[str, Tensor]] = wrapped(*args, **kwargs)
    structure: Structure | None = structure_of(settings.hf_config)
    return weights if structure is None else written_out(weights, structure, settings.hf_config, settings.dtype)
