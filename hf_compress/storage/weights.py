"""Writing a model's weights without a second copy of them in memory."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_compress.anatomy.dispatch import is_offloaded
from hf_compress.anatomy.offloaded import whole_state
from hf_compress.anatomy.undo import Undo
from hf_compress.rewrite.probe import quiet

_BLOCK = re.compile(r".*?\.\d+\.")  # how the names of a block's tensors begin

State = dict[str, Tensor]


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Have Transformers write a model, the same files as by `save_pretrained`, beside which there is room for a copy.

    What is offloaded is mapped from where it lies. What is written in another form than it is used in, as experts one
    by one, is converted block by block and put aside, where Transformers would do that with all of it in memory.
    """
    with quiet(), TemporaryDirectory(dir=folder.parent) as aside, Undo() as undo:
        converts = _converts(model)
        if not converts and not is_offloaded(model):
            model.save_pretrained(folder)
            return
        state = _saved(model)
        if converts:
            state = _converted(model, state, Path(aside))
        undo.unset(model, "hf_device_map")  # by which Transformers would look for tensors on meta, a shard at a time
        model.save_pretrained(folder, state_dict=state, save_original_format=False)


def tensors_in(folder: Path) -> State:
    """All that is in the safetensors files of a folder, mapped."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in _mapped(path).items()}


def _mapped(path: Path) -> State:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)


def _converts(model: PreTrainedModel) -> bool:
    """Whether Transformers writes some of a model's tensors in another form than they have in memory."""
    state = {name: t.to("meta") for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    return any(state.get(name) is not tensor for name, tensor in revert_weight_conversion(model, dict(state)).items())


def _saved(model: PreTrainedModel) -> State:
    """The tensors of a model that are written, each once."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in whole_state(model).items() if name not in ignored}
    return remove_tied_weights_from_state_dict(state, model)


def _converted(model: PreTrainedModel, state: State, aside: Path) -> State:
    """Tensors in the form that is written; those that are copies, or parts, of others are mapped from files in `aside`.

    Parts of one tensor would be copied on the way, all of them at once.
    """

    def block(name: str) -> str:
        found = _BLOCK.match(name)
        return found[0] if found else ""

    whole: State = {}
    for number, (_, names) in enumerate(groupby(sorted(state, key=block), block)):
        whole |= _converted_block(model, {name: state[name] for name in names}, aside / f"{number}.safetensors")
    return whole


def _converted_block(model: PreTrainedModel, block: State, file: Path) -> State:
    own = {(tensor.data_ptr(), tensor.nbytes) for tensor in block.values()}
    written = revert_weight_conversion(model, dict(block))
    if others := {name: t.contiguous() for name, t in written.items() if (t.data_ptr(), t.nbytes) not in own}:
        save_file(others, file)
        written |= _mapped(file)
    return written
