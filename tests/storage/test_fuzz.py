"""Whatever a downloaded repository says, loading it gives the model or a plain error, soon and in little memory.

Errors are plain when they are of this library (all ValueErrors), say that a file cannot be read (OSError, and
SafetensorError for one that is not what it should be) or are the RuntimeError by which Transformers refuses weights of
the wrong shape. A config that stock Transformers cannot build without the record either may fail as it fails there.
"""

import copy
import json
import math
import struct
from dataclasses import fields

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from hf_compress.rewrite.edits import EDITS
from hf_compress.rewrite.probe import quiet
from tests.helpers.untrusted import LONG, check, config_of, copied, replace_weights, write_config

quickly = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
thoroughly = settings(quickly, max_examples=1000, print_blob=True)


# --- what could be in a file ------------------------------------------------------------------------------------------


# JSON that stands in the file for these words, which are shorter to report.
NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 7, 32, 63, 64, 65, 10**4, 10**6, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from(["", ".", "..", "../../x", "/etc/passwd", "model.layers.0/../1", "model..layers", "\x00", "ü"]),
    st.sampled_from(sorted(LONG)),
    st.sampled_from(["model.layers.0.mlp.__class__", "model.layers.-1", "__dict__", "lm_head", "model", "torch.load"]),
    st.recursive(st.none() | NUMBERS | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4), max_leaves=6),
    st.dictionaries(st.text(max_size=5), NUMBERS, max_size=3),
)
KINDS = sorted(EDITS)


def field_values(paths):
    """What the fields of edits could be, by their names: modules that there are, and sizes that might fit."""
    path, size = st.sampled_from(paths), st.sampled_from([1, 2, 4, 8, 16, 31, 32, 48, 64, 99, 128, 2**20, 2**31 - 1])
    return {
        **dict.fromkeys(("output", "activation", "block", "module", "experts", "stack", "query", "key", "value"), path),
        **dict.fromkeys(("width", "hidden", "rank", "group_size", "groups", "heads"), size | st.none()),
        **dict.fromkeys(("bias", "symmetric", "rest", "gated"), st.booleans()),
        "inputs": st.lists(path, min_size=1, max_size=3),
        "planes": st.lists(size, min_size=1, max_size=4),
        "blend": st.sampled_from(["leaky", "identity", "constant"]),
        "skip": st.floats(0, 1),
        "kept": size,
        "norm": st.sampled_from(["kept", "lost", "none"]),
        "select": st.sampled_from(["all", "top", "above"]),
        "active": size | st.none(),
        "blocks": st.lists(size, min_size=1, max_size=3),
        "absorbed": st.lists(size, min_size=1, max_size=3),
    }


@st.composite
def made_up_edits(draw, paths):
    """An edit with the right fields."""
    kind, values = EDITS[draw(st.sampled_from(KINDS))], field_values(paths)
    return {"edit": kind.__name__, **{field.name: draw(values[field.name]) for field in fields(kind)}}


def test_every_edit_can_be_made_up():
    """Fields of new edits have to be known here, or they are never tried."""
    known = field_values(["model"]).keys()
    assert {field.name for kind in EDITS.values() for field in fields(kind)} <= known


@st.composite
def changes_of_plans(draw, plan, paths):
    """A plan with something done to it, once to three times."""
    plan = copy.deepcopy(plan)
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["drop", "double", "swap", "field", "path", "gone", "new field", "kind", "edit"]))
        if not plan or what == "edit":
            plan.insert(draw(st.integers(0, len(plan))), draw(made_up_edits(paths) | ODD))
            continue
        index = draw(st.integers(0, len(plan) - 1))
        edit = plan[index]
        if what == "drop":
            del plan[index]
        elif what == "double":
            plan.insert(index, copy.deepcopy(edit))
        elif what == "swap":
            plan.reverse()
        elif isinstance(edit, dict):
            change_edit(draw, edit, what, paths)
    return plan


def change_edit(draw, edit, what, paths):
    name = draw(st.sampled_from(sorted(edit) or ["edit"]))
    if what == "gone":
        edit.pop(name, None)
    elif what == "path":
        named = [n for n in edit if n in ("inputs", "output", "activation", "block", "module", "experts")]
        edit[draw(st.sampled_from(named or ["module"]))] = draw(st.sampled_from(paths))
    elif what == "kind":
        edit["edit"] = draw(st.sampled_from([*KINDS, "Edit", "ModuleEdit", "os.system", ""]))
    else:
        edit["unknown" if what == "new field" else name] = draw(ODD)


@st.composite
def changes_of_configs(draw, config):
    """A config with one to three of its fields, not the record, changed, gone or new."""
    config = copy.deepcopy(config)
    for _ in range(draw(st.integers(1, 3))):
        part = config
        names = sorted(set(config) - {"quantization_config", "model_type"})
        name = draw(st.sampled_from([*names, "new", "num_experts", "intermediate_size", "layer_types", "auto_map"]))
        if part.get(name) and isinstance(part[name], dict):
            part, name = part[name], draw(st.sampled_from(sorted(part[name])))
        if draw(st.integers(0, 9)) == 0:
            part.pop(name, None)
        elif type(part.get(name)) is int and draw(st.booleans()):
            part[name] = draw(st.sampled_from([part[name] + 1, part[name] - 1, 2 * part[name], part[name] // 2]))
        else:
            part[name] = draw(NUMBERS | ODD)
    return config


def damaged(draw, data):
    """A safetensors file that is cut, has another header, or other tensors; no strategy, which would keep them all."""
    (length,) = struct.unpack("<Q", data[:8])
    what = draw(st.sampled_from(["cut", "length", "bytes", "header", "tensor", "drop", "rename", "add"]))
    if what == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if what == "length":
        return (
            struct.pack("<Q", draw(st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]))) + data[8:]
        )
    if what == "bytes":
        place = draw(st.integers(8, 8 + length - 1))
        return data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place + 1 :]
    if what == "header":
        header = json.loads(data[8 : 8 + length])
        tensor = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
        field = draw(st.sampled_from(sorted(tensor)))
        tensor[field] = draw(
            ODD | st.sampled_from(["I32", "F16", "U8", "F8_E4M3", "BOOL", "C64"]) | st.lists(NUMBERS, max_size=3)
        )
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    tensors = safetensors.torch.load(data)
    name = draw(st.sampled_from(sorted(tensors)))
    if what == "tensor":
        shape = draw(st.lists(st.integers(0, 64), max_size=3))
        tensors[name] = torch.ones(shape, dtype=draw(st.sampled_from([torch.float32, torch.int64, torch.uint8])))
    elif what == "add":
        tensors[draw(st.sampled_from(["x", "model.x", f"{name}.more", "a" * 10**5]))] = torch.ones(3)
    else:
        value = tensors.pop(name)
        if what == "rename":
            tensors[f"{name}x"] = value
    return safetensors.torch.save(tensors, {"format": "pt"})


# --- the property, on what could be in a file -------------------------------------------------------------------------


def fuzz_plans(source, folder, draw):
    config = config_of(source)
    with quiet(), torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    paths = [path for path, _ in stock.named_modules() if path]
    record = config["quantization_config"]
    record["plan"] = draw(changes_of_plans(record["plan"], paths))
    write_config(folder, config)


def fuzz_configs(source, folder, draw):
    write_config(folder, draw(changes_of_configs(config_of(source))))


def fuzz_files(source, folder, draw):
    replace_weights(folder, damaged(draw, (source / "model.safetensors").read_bytes()))


@pytest.mark.parametrize("fuzz", [fuzz_plans, fuzz_configs, fuzz_files])
@pytest.mark.parametrize("how", [quickly, pytest.param(thoroughly, marks=pytest.mark.slow)], ids=["quick", "thorough"])
def test_a_whole_model_or_a_plain_error(fuzz, how, checkpoints):
    def fuzzed(data):
        source = checkpoints[data.draw(st.sampled_from(sorted(checkpoints)))]
        with copied(source) as folder:
            fuzz(source, folder, data.draw)
            check(folder)

    how(given(st.data())(fuzzed))()


def test_unchanged_they_load(checkpoints):
    for source in checkpoints.values():
        with copied(source) as folder:
            assert not isinstance(check(folder), Exception)
