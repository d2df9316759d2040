"""Packed models in the format of compressed-tensors, which stock Transformers and vLLM load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.adapters import check_no_adapters
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Batch
from hf_compress.calibration.media import Processor
from hf_compress.calibration.processes import by_first
from hf_compress.errors import ParityError, UnsupportedModelError, one_line
from hf_compress.modules.kernels import check_no_kernels
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.rewrite.config_fields import RECORD_FIELD, described
from hf_compress.rewrite.edits.packed import PackLinear
from hf_compress.rewrite.probe import Probe, outputs_on, quiet, same_outputs, same_tensor
from hf_compress.rewrite.record import recorded
from hf_compress.storage.beside import write_beside
from hf_compress.storage.pack_quantized import BITS, PARTS, Packed, decode, encode, quantization_of
from hf_compress.storage.save import check_target, own_memory, save_staged, tensor_differences

logger = logging.getLogger(__name__)

_OTHERWISE = "save with hf_compress.save, which says everything"
_REMEDY = f"compress with LRPConfig(bits=…, per='module'), or {_OTHERWISE}"


@by_first
def save_compressed_tensors(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Processor | None = None,
    *,
    overwrite: bool = False,
    probe: Batch | Mapping[str, Any] | None = None,
    card: ModelCard | None = None,
) -> Path:
    """Write a model with packed linear maps so that whoever has compressed-tensors installed loads it, without us.

    What was written is read again: every weight must decode to just what the packed module computes with, every other
    tensor be the same, and the stock model, with the decoded weights, give the same outputs on a probe batch, bit for
    bit. All that takes no compressed-tensors, but memory for the decoded model. Files are put in place as by `save`.

    vLLM computes queries, keys and values in one product, and gate and up: they need one number of bits, and get it
    with per="module". Its Marlin kernels take groups of 32, 64 or 128, and stored zeros with 4 bits only. Transformers
    (5.23) loads no stored zeros with compressed-tensors 0.18 to 0.20, of which a warning tells. Where some maps have 4
    bits and some 8, never ask it for `dequantize=True`: it then reads all in one way, and says nothing.

    Args:
        model: packed, each map in one number of bits, 4 or 8, and in no other way changed beyond what its config says.
        directory, tokenizer, overwrite, probe: as for `save`.
        card: the README.md. When None, the one in `directory` stays if it is this very model's (see `save`); else there
            is none.

    Returns:
        The directory.

    Raises:
        UnsupportedModelError: the format cannot say what the model is; the message names the module and the remedy.
        FileExistsError, ParityError, ManifestError: as for `save`.
    """
    check_target(Path(directory), overwrite)
    check_no_adapters(model)
    check_no_kernels(model)
    stock = _stock(model)
    packed = _packed(model, stock)
    inputs = Probe.of(model, probe)
    linears = [path for path, module in stock.named_modules() if isinstance(module, nn.Linear)]
    quantization = quantization_of(packed, [path for path in linears if path not in packed])
    if zeros := [path for path, module in packed.items() if not module.packing.symmetric]:
        logger.warning(
            "%s stores zeros, as do %d others, which Transformers does not load with compressed-tensors 0.18 to 0.20: "
            "compress with symmetric=True for that",
            zeros[0],
            len(zeros) - 1,
        )

    def write(folder: Path) -> None:
        tensors = _others(model, packed)
        for path, module in packed.items():
            tensors |= {f"{path}.{name}": tensor for name, tensor in encode(module, model.dtype).items()}
        with Undo() as undo, quiet():
            undo.set(model.config, RECORD_FIELD, quantization)
            model.save_pretrained(folder, state_dict=tensors)
        write_beside(model, folder, Path(directory).resolve(), tokenizer, card)

    return save_staged(directory, overwrite, write, lambda folder: _verify(model, folder, packed, quantization, inputs))


def _stock(model: PreTrainedModel) -> PreTrainedModel:
    """The model that other tools make of the config alone, on meta; UnsupportedModelError where it is another one."""
    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise UnsupportedModelError(
            f"{kind.__module__}.{kind.__name__} is no model class of Transformers, so that nothing else would load it: "
            "load the model without trust_remote_code, or save with hf_compress.save"
        )
    for edit in recorded(model.config):
        if not isinstance(edit, PackLinear):
            raise UnsupportedModelError(
                f"{edit.paths[0]} was changed in a way ({type(edit).__name__}) that compressed-tensors cannot say: "
                f"{_OTHERWISE}"
            )
    return described(model, ())


def _packed(model: PreTrainedModel, stock: PreTrainedModel) -> dict[str, MixedPrecisionLinear]:
    """The packed linear maps, by path; UnsupportedModelError where the format cannot say one of them."""
    named = model.named_modules(remove_duplicate=False)
    packed = {path: module for path, module in named if isinstance(module, MixedPrecisionLinear)}
    if not packed:
        raise UnsupportedModelError(f"{type(model).__name__} has no packed linear maps: {_REMEDY}")
    tied = {name for pair in stock.all_tied_weights_keys.items() for name in pair}
    users = [id(module) for module in packed.values()]
    for path, module in packed.items():
        problem = _problem(module, stock.get_submodule(path), model.dtype)
        if users.count(id(module)) > 1 or f"{path}.weight" in tied:
            problem = f"is shared with another module: {_OTHERWISE}"
        if problem:
            raise UnsupportedModelError(f"{path} {problem}")
    return packed


def _problem(module: MixedPrecisionLinear, stock: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the format cannot say a packed map, in words, and what to do."""
    packing = module.packing
    found = sorted(set(module.bits.tolist()))
    if type(stock) is not nn.Linear:
        return f"is a {type(stock).__name__} in Transformers, and compressed-tensors packs Linear alone: {_OTHERWISE}"
    if len(found) > 1:
        return f"has groups of {', '.join(map(str, found))} bits, where the format has one number a module: {_REMEDY}"
    if found[0] not in BITS:
        return f"is packed in {found[0]} bits, where {' or '.join(map(str, BITS))} are read alike everywhere: {_REMEDY}"
    if packing.inputs != module.in_features:
        return (
            f"reads {module.in_features} inputs, which are no whole groups of {packing.group_size}: compress with a "
            f"group_size= that divides them, or {_OTHERWISE}"
        )
    steps = module.steps.view(torch.bfloat16).double()
    if not torch.equal(steps.to(dtype).double(), steps):
        return (
            f"has steps from {float(steps.min()):.3g} to {float(steps.max()):.3g}, which {dtype} does not hold: load "
            f"the model in bfloat16 or float32 before it is compressed, or {_OTHERWISE}"
        )
    return None


def _others(model: PreTrainedModel, packed: Packed) -> dict[str, Tensor]:
    """The tensors of a model but for what is packed."""
    own = {f"{path}.{name}" for path, module in packed.items() for name in module.state_dict() if name != "bias"}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in own}


def _verify(
    model: PreTrainedModel, folder: Path, packed: Packed, quantization: Mapping[str, Any], inputs: Probe
) -> None:
    """Raise unless the files, read as others read them, are the model in memory."""
    config = type(model.config).from_pretrained(folder)
    said = vars(config).pop(RECORD_FIELD, None)
    if said != quantization:
        raise ParityError(f"config.json does not say how the weights are packed, but {str(said)[:200]}")
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    expected = _others(model, packed)
    _check_names(tensors, {*expected, *(f"{path}.{name}" for path in packed for name in PARTS)})
    for group in said["config_groups"].values():
        for path in group["targets"]:
            parts = {name: tensors.pop(f"{path}.{name}") for name in PARTS if f"{path}.{name}" in tensors}
            weight = decode(parts, group["weights"]).to(model.device)
            expected[f"{path}.weight"] = packed[path].unpacked().to(model.dtype)
            if not same_tensor(weight, expected[f"{path}.weight"]):
                raise ParityError(f"what was written of {path} decodes to other weights than it has in memory")
            tensors[f"{path}.weight"] = weight
    loaded = _load(model, config, tensors)
    for name, difference in tensor_differences(expected, loaded.state_dict()):
        raise ParityError(f"the written model does not load as it is in memory: {name} {difference}")
    if not same_outputs(outputs_on(model, inputs), outputs_on(loaded, inputs)):
        raise ParityError("the written model has the same tensors as the one in memory, but gives other outputs")


def _check_names(written: Mapping[str, Tensor], names: set[str]) -> None:
    """Raise UnsupportedModelError where Transformers writes tensors under other names than the model has for them.

    By those in config.json nobody would then find what is packed; and experts that are written one by one Transformers
    itself takes for packed ones.
    """
    if others := sorted(written.keys() - names):
        raise UnsupportedModelError(
            f"Transformers writes {others[0]}, under a name that the model has not in memory, and would not load it "
            f"with packed weights beside it: {_OTHERWISE}"
        )


def _load(model: PreTrainedModel, config: Any, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """What stock Transformers makes of a config without a record and decoded tensors."""
    loader: Any = type(model).from_pretrained
    attention = model.config._attn_implementation  # which no file says, and another may round differently
    device = {"": model.device}
    try:
        with quiet():
            loaded = loader(
                None,
                config=config,
                state_dict=tensors,
                dtype=model.dtype,
                device_map=device,
                attn_implementation=attention,
            )
    except Exception as error:
        raise ParityError(f"the written model does not load: {one_line(error)}") from error
    own_memory(loaded)
    if model.can_generate():
        loaded.generation_config = model.generation_config  # which is in a file of its own
    return loaded
