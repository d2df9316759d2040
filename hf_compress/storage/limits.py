"""Bounds on what a downloaded checkpoint may ask for, checked before its model takes time or memory.

Anybody can upload a config.json. Stock Transformers builds whatever it says: a billion blocks, or an embedding of a
terabyte, first initialised at random and then refused because the file holds a smaller one. Of a checkpoint with a
record of its structure more can be asked, since only this library writes such: its weights are in safetensors files,
and all of the model is in them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.stacks import reachable_configs
from hf_compress.errors import PlanError

_MAX_NUMBER = 2**31  # above every width, vocabulary and context that there is
_MAX_BLOCKS = 1_000  # of one side; the deepest transformer published has 500 on each
_MAX_EXPERTS = 2**16  # of all blocks together, since each may be a module of its own
_ROWS = frozenset({"doge"})  # model types whose experts are rows of a table instead, and many
_SPARE_ENTRIES = 2**27  # of tensors, beyond what the files hold: a new head, tables that are computed
_BLOCKS = re.compile(
    r"(layers?|blocks|stages|codebooks|quantizers|networks|hidden_groups|group_num|num_inputs|_depth)$"
    r"|(^depths?|^ngram_size|_per_ngram|_per_stack)$"
)  # fields that count blocks, or other modules
_EXPERTS = re.compile(r"experts$|expert_num$")
_TOLD = "mark_tied_weights_as_initialized"


def check_config(config: PreTrainedConfig) -> None:
    """Refuse numbers that no model has, before anything is built from them.

    Raises:
        PlanError: naming the field.
    """
    if not _is_names(config.architectures):
        raise PlanError("config.json: architectures must be a list of names")
    blocks, experts = 1, 1
    for part in reachable_configs(config):
        for name, value in vars(part).items():
            most = max(map(abs, _numbers(value)), default=0)
            counts_blocks = bool(_BLOCKS.search(name))
            limit = _MAX_BLOCKS if counts_blocks else _MAX_NUMBER
            if most > limit:
                raise PlanError(f"config.json: {name[:100]} is {str(most)[:30]}; at most {limit:,} is loaded")
            if counts_blocks:
                blocks = max(blocks, most)
            elif _EXPERTS.search(name) and part.model_type not in _ROWS:
                experts = max(experts, most)
    if blocks * experts > _MAX_EXPERTS:
        raise PlanError(f"config.json: {experts:,} experts in {blocks:,} blocks; at most {_MAX_EXPERTS:,} are loaded")


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers that a field's value is or lists."""
    for entry in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(entry, int) and not isinstance(entry, bool):
            yield entry


def check_files(files: Sequence[str], source: str | None) -> None:
    """Refuse weights that are not in safetensors files of the checkpoint: others are pickles, which can hold a program.

    Args:
        files: paths, as an index in the checkpoint may have named them.
        source: the folder that the model is loaded from, or its name on the Hub, where there are no paths to others.

    Raises:
        PlanError: naming the file.
    """
    folder = os.path.abspath(source) if source and os.path.isdir(source) else None
    for file in files:
        if not file.endswith(".safetensors"):
            raise PlanError(f"a compressed model is loaded from safetensors files alone; this one has {_last(file)}")
        if folder and os.path.commonpath([folder, os.path.abspath(file)]) != folder:
            raise PlanError(f"the index names a file outside of the checkpoint: {_last(file)}")


def _last(path: str) -> str:
    return os.path.basename(path)[:100]


def check_size(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Refuse a model on the meta device whose tensors would take far more memory than its files.

    A byte of a file is at most one entry of a tensor. Tied weights are still apart here, hence twice that.

    Raises:
        PlanError: the model has more entries than that, and than a small model.
    """
    held = sum(os.path.getsize(file) for file in files)
    asked = sum(tensor.numel() for tensor in {*model.parameters(), *model.buffers()})
    if asked > 2 * held + _SPARE_ENTRIES:
        raise PlanError(f"config.json asks for {asked:,} entries in tensors, but the files have only {held:,} bytes")


def refuse_missing(model: PreTrainedModel, changed: Collection[str]) -> None:
    """Have the loading of `model` stop where Transformers would only warn of missing weights and make some up.

    Or, in some versions, take weights of another shape without a word, as it lets quantizers do.

    Made-up weights are right for a new head, which the files cannot have. They are wrong for the tensors `changed` by
    the record, and for all of them where config.json does not say that it was another class that was saved.

    Which weights the files have, sharded, renamed or converted as they may be, Transformers tells in one place: to a
    method of the model, which is covered on this one model until it is called. Nothing is made up before.

    Raises:
        PlanError: from within `from_pretrained`.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    saved = type(model).__name__ in (model.config.architectures or [type(model).__name__])

    def told(info: Any) -> None:
        delattr(model, _TOLD)
        getattr(model, _TOLD)(info)
        wrong = {name: "missing" for name in _missing(model, info.missing_keys) if saved or name in changed}
        other = {name for name, *_ in info.mismatched_keys if name in changed}
        other |= {name for name, tensor in model.state_dict().items() if tensor.shape != shapes.get(name, tensor.shape)}
        wrong |= dict.fromkeys(other, "of another shape")
        if wrong:
            named = ", ".join(f"{name[:100]} ({what})" for name, what in sorted(wrong.items())[:5])
            raise PlanError(f"the files do not have the tensors that config.json asks for: {named}")

    setattr(model, _TOLD, told)


def _missing(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Those of `names`, which the files do not have, that will not be tied to others and may not be left out."""
    ties: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        ties.setdefault(source, {source}).add(target)
    given = {name for tied in ties.values() if not tied <= set(names) for name in tied}
    optional = model._keys_to_ignore_on_load_missing or ()
    return {name for name in names if name not in given and not any(re.search(key, name) for key in optional)}


def check_told(model: PreTrainedModel) -> None:
    """Raise RuntimeError when `model` was loaded without the check for missing weights."""
    if _TOLD in vars(model):
        raise RuntimeError("this version of Transformers does not say which weights are missing: upgrade hf-compress")
