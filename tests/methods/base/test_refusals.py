"""What settings refuse: each field by its own annotation and metadata, and what two of them cannot say together."""

import math
from collections.abc import Iterator
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from hf_compress.calibration.data import DataOptions
from hf_compress.checks import expected
from hf_compress.methods.base.settings import CompressionConfig, config_class, method_names
from hf_compress.methods.illc.config import Reduction
from hf_compress.methods.illc.reductions import REDUCTIONS
from hf_compress.methods.mka.config import Similarity
from hf_compress.numerics.clustering import CLUSTERINGS
from hf_compress.numerics.manifold import MANIFOLDS
from hf_compress.numerics.similarity import SIMILARITIES
from hf_compress.training.heal_config import DistillationConfig

METHODS = {name: config_class(name) for name in method_names()}
CLASSES: dict[str, type] = {**METHODS, "data": DataOptions, "distillation": DistillationConfig}
FIELDS = [(name, field.name) for name, cls in CLASSES.items() for field in fields(cls)]
NAN = math.nan

# --- one field --------------------------------------------------------------------------------------------------------


def parts(kind: Any) -> tuple[Any, ...]:
    """What a field may be, apart from None; of a list, its items."""
    kinds = [kind] if get_origin(kind) in (None, Literal, tuple) or len(get_args(kind)) == 1 else get_args(kind)
    return tuple(kind for kind in kinds if kind is not NoneType)


def ends(within: str) -> tuple[float, float]:
    low, high = within.strip("[]()").split(",")
    return float(low), float(high)


def wrong(kind: Any, within: str) -> Iterator[Any]:
    """Values that are no such thing, or lie outside."""
    if get_origin(kind) is Literal:
        yield from ("magic", get_args(kind)[0].upper(), 1, True, [get_args(kind)[0]])
    elif items := get_args(kind):
        good = inside(items[0], within)[0]
        yield from (good, str(good), (), {good: good}, [[good]], torch.zeros(2, 3))
        if ... not in items and get_origin(kind) is tuple:
            yield from ((good,) * (len(items) - 1), (good,) * (len(items) + 1))
        yield from ((good, bad) for bad in wrong(items[0], within))
    elif kind is bool:
        yield from (0, 1, 0.0, "no", [True])
    elif kind is str:
        yield from (5, True, ["model.layers"])
    else:
        low, high = ends(within)
        yield from ("x", "1", True, [1], {}, NAN)
        yield from (end for end in (low - 1, high + 1) if math.isfinite(end))
        yield from (end for end, open_ in ((low, within[0] == "("), (high, within[-1] == ")")) if open_)
        if kind is int:
            yield from (low + 1.5, float(low + 1))


def inside(kind: type, within: str) -> list[Any]:
    """Values that lie inside, the ends that do among them."""
    low, high = ends(within)
    middle = low + 1 if high == math.inf else (low + high) / 2 if low > -math.inf else high - 1
    found = [middle if math.isfinite(middle) else 0.0, *([low] * (within[0] == "[")), *([high] * (within[-1] == "]"))]
    return [int(value) for value in found] if kind is int else found


def refusal(cls: type, field: str, value: Any) -> str:
    """What is said against a value, alone; it may be of other fields, such as that no amount is given."""
    try:
        cls(**{field: value})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_field_refuses_what_it_cannot_be(name: str, field: str) -> None:
    """The message names the value. What it may be, it may be; rules between fields come later."""
    cls = CLASSES[name]
    metadata, kind = cls.__dataclass_fields__[field].metadata, get_type_hints(cls)[field]
    within = metadata.get("within", "")
    for one in parts(kind):
        numbers = {float, int} & {one, *get_args(one)}
        assert bool(within) == bool(numbers), "a number says where it lies"
        for value in wrong(one, within):
            with pytest.raises(ValueError, match=rf"^{field} must be ") as caught:
                cls(**{field: value})
            assert metadata.get("help", "") in str(caught.value)
            assert str(caught.value).endswith(repr(value))
        good = get_args(one) if get_origin(one) is Literal else inside(one, within) if one in (int, float) else ()
        for value in good:
            assert not refusal(cls, field, value).startswith(f"{field} must be {expected(kind, within)}")
    if NoneType not in get_args(kind):
        with pytest.raises(ValueError, match=rf"^{field} must be .*; got None"):
            cls(**{field: None})


@pytest.mark.parametrize("name", METHODS)
def test_every_field_says_what_it_is(name: str) -> None:
    assert all(field.metadata.get("help") for field in fields(METHODS[name]))


# What lies where, apart from the classes: an interval that is wrong there shows here.
OUTSIDE: dict[str, dict[str, tuple[Any, ...]]] = {
    "adaptive_compress": {
        "layers": ([-1], [1.0], [True], ["1"], [], 3, "13"),
        "fractions": ([0.0], [0.5, 1.01], [NAN], ["half"], ()),
        "retention_init": (0, 1.01),
        "retention_final": (0, -0.5, 1.01, NAN),
        "warmup_steps": (-1,),
        "decay_steps": (-1, 1.5),
        "ema": (1, -0.1),
        "skip": (1, -0.1),
        "outliers": (1,),
        **dict.fromkeys(("l1", "contrastive", "aux"), (-0.1,)),
        **dict.fromkeys(("expansion", "dead_steps", "updates", "epochs", "learning_rate"), (0,)),
    },
    "drop_blocks": {"num_blocks": (0, -1, 1.5)},
    "illc": {
        "gamma": (0, 1.5, -1),
        "head_gamma": (0, 1.5),
        "width": (0, -3, 2.5),
        "example": ((NAN, 1.0), (), ("a", 1), 3.0),
        **dict.fromkeys(("kernel_width", "tokens", "cluster_tokens"), (0,)),
    },
    "layer_collapse": {
        "target_r2": (1.0, NAN),
        "ramp": (-0.1, 1.5),
        "alpha_init": (1.01, -0.1),
        **dict.fromkeys(("penalty", "lc"), (-1.0,)),
        **dict.fromkeys(("num_layers", "rank", "choice_samples", "alpha_lr", "tolerance"), (0,)),
    },
    "lrp": {
        "sparsity": (0, 1, 1.5, -0.1),
        "temper": (-0.1, 1.1),
        "pattern": ((0, 4), (-1, 4), (2,), (1, 2, 4), (2.0, 4), 24, "24"),
        "split": ((8, 1), (17, 4), (8,), (8.0, 4), "84"),
        "bits": (1.9, 17, 0),
        **dict.fromkeys(("tokens", "group_size", "target_bytes"), (0,)),
    },
    "mka": {
        "threshold": (-0.1, 2),
        "alpha": (-0.1, 1.1),
        "time": (-1.0,),
        **dict.fromkeys(("num_merges", "components", "neighbors", "choice_samples", "refit_tokens"), (0, 2.5)),
        "bandwidth": (0,),
    },
    "data": dict.fromkeys(("batch_size", "max_length", "max_samples"), (0, -1, 1.5)) | {"seed": (-1, 1.5)},
    "distillation": {"label_share": (-0.1, 1.5), "stream_weight": (-1.0,), "temperature": (0.0,)},
}


@pytest.mark.parametrize("name", CLASSES)
def test_where_numbers_lie(name: str) -> None:
    own = {field.name for field in fields(CLASSES[name])}
    shared = {"seed": (-1, 0.5), "ratio": (0, 1, -1, 2.5)}
    for field, values in {**{one: shared[one] for one in own & set(shared)}, **OUTSIDE[name]}.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{field} must be "):
                CLASSES[name](**{field: value})


def test_choices_are_what_there_is() -> None:
    """Those of a `Literal` are written out for editors; what they name stands in a registry."""
    hints = {name: get_type_hints(METHODS[name]) for name in ("mka", "illc")}
    assert set(get_args(Similarity)) == {*SIMILARITIES, "block_influence"}
    assert set(get_args(hints["mka"]["manifold"])) == set(MANIFOLDS)
    assert set(get_args(Reduction)) == set(REDUCTIONS)
    assert set(get_args(hints["illc"]["clustering"])) == set(CLUSTERINGS)


# --- fields together --------------------------------------------------------------------------------------------------

PAPER, HALF, FOUR = {"variant": "paper"}, {"sparsity": 0.5}, {"bits": 4}
KEPT, ADAPTIVE = {"gamma": 0.5}, {"gamma": 0.5, "allocation": "adaptive"}
TOGETHER = {
    "adaptive_compress": [
        ({"layers": [1], "fractions": [0.5]}, r"give layers= or fractions=, only one .*; got layers=\(1,\) and frac"),
        ({"layers": [1, 1]}, "layers names a place twice"),
        ({"fractions": [0.5, 0.5]}, "fractions names a place twice"),
        ({"retention_init": 0.5}, "retention must not increase.*0.5.*0.95"),
        ({"retention_init": 0.5, "retention_final": 0.6}, "retention must not increase.*0.5.*0.6"),
        ({"retention_init": 0.5, "ratio": 0.4}, "retention must not increase.*0.5.*0.6"),
        ({"retention_final": 0.5, "ratio": 0.5}, "give retention_final= or ratio=, only one of them"),
    ],
    "drop_blocks": [
        ({}, "say how much to leave out: ratio="),
        ({"ratio": 0.5, "num_blocks": 2}, "give ratio= or num_blocks=, only one of them; got ratio=0.5 and num_blo"),
    ],
    "illc": [
        ({}, "ratio=, or gamma= or width= to keep; for attention, head_gamma="),
        ({"gamma": 0.5, "width": 8}, "give gamma= or width=, only one of them; got gamma=0.5 and width=8"),
        ({"gamma": 0.5, "ratio": 0.5}, "give gamma= or ratio=, only one of them"),
        ({"width": 8, "ratio": 0.5}, "give width= or ratio=, only one of them"),
        (KEPT | {"kernel_width": 1.0}, "kernel_width .* give example= too"),
        (ADAPTIVE | {"plain": True}, "plain=True keeps one width .*'adaptive'.*leave out plain"),
        (KEPT | {"plain": True, "bias": True}, "plain=True keeps .* the biases that there are"),
        (KEPT | {"plain": True, "compensation": "bias"}, "plain=True keeps .* the biases that there are"),
        (ADAPTIVE | PAPER, "reduction='average' keeps none: take representative"),
        (ADAPTIVE | {"reduction": "average"}, "take representative"),
        (KEPT | {"head_gamma": 0.5, **PAPER}, "head_gamma keeps whole heads, and reduction='average' clusters"),
        ({"head_gamma": 0.5, "reduction": "representative"}, "reduction='representative' clusters"),
    ],
    "layer_collapse": [
        ({}, "ratio=, num_layers= or target_r2=; got none"),
        ({"ratio": 0.5, "target_r2": 0.5}, "give ratio= or target_r2=, only one"),
        ({"ratio": 0.5, "num_layers": 2}, "give ratio= or num_layers=, only one"),
        (PAPER | {"ratio": 0.5, "num_layers": 2}, "give ratio= or num_layers=, only one"),
        (PAPER | {"target_r2": 0.5}, "target_r2 is for variant='closed_form'"),
        (PAPER | {"gradual": True}, "gradual=True is for variant='closed_form'"),
        ({"num_layers": 1, "gradual": True, "ramp": 0}, "needs steps to rise in: give a ramp above 0"),
        (PAPER | {"alpha": "scheduled", "ramp": 0}, "needs steps to rise in"),
    ],
    "lrp": [
        ({}, "say what to do: sparsity= or ratio= to prune, bits= or target_bytes= for precision, or both"),
        ({"granularity": "neuron"}, "say what to do: sparsity="),
        (HALF | {"ratio": 0.5}, "give sparsity= or ratio=, only one of them; got sparsity=0.5 and ratio=0.5"),
        (FOUR | {"target_bytes": 1000}, "give bits= or target_bytes=, only one of them; got bits=4 and target_by"),
        *((FOUR | {"group_size": bad}, f"must be a multiple of 8, .*; got {bad}") for bad in (1, 4, 12, 63)),
        *(
            ({"granularity": "n:m", "pattern": bad}, r"two whole numbers n < m, such as \(2, 4\); got \(4, ")
            for bad in ((4, 4), [4, 2])
        ),
        (HALF | {"granularity": "n:m"}, r"granularity='n:m' keeps 2 of 4: leave out sparsity=0\.5"),
        ({"ratio": 0.5, "granularity": "n:m"}, r"keeps 2 of 4: leave out ratio=0\.5"),
        (HALF | {"split": (8, 4)}, "split is the paper's: give variant='paper', or bits= for groups of weights"),
        *((one | {"prune": False}, "prune=False is the paper's") for one in (HALF, {"granularity": "n:m"})),
        *(
            (PAPER | {"granularity": one}, f"leaves out weights or neurons; got granularity='{one}'")
            for one in ("row", "head", "n:m", "block")
        ),
        *(
            (PAPER | more, r"however much that is, .*leave out sparsity, ratio, bits and target_bytes; .*=\(8, 4\)")
            for more in (HALF, FOUR, {"target_bytes": 9}, {"ratio": 0.5})
        ),
        *((PAPER | {"split": bad}, "split must be .* the larger first; got") for bad in ((4, 8), [8, 8])),
        (PAPER | {"split": (8, 4)}, "split weights are told apart by a mask, .*: prune neurons, or none"),
        (PAPER | {"prune": False}, "prune=False leaves nothing to do without split="),
        (HALF | {"per": "module"}, r"per='module' says who shares .*: give bits= or target_bytes= with it"),
        (PAPER | {"per": "module"}, "per='module' says who shares a number of bits: give bits="),
        *(
            (FOUR | {"per": "module", **more}, "per='module' is for maps that are whole, .*: prune neurons or heads")
            for more in (HALF, {"granularity": "n:m"}, HALF | {"granularity": "row"})
        ),
    ],
    "mka": [
        ({}, "say how much to merge: ratio="),
        ({"threshold": 0.5}, "or, in the paper variant, threshold="),
        ({"ratio": 0.5, "threshold": 0.5}, "belong to variant='paper'"),
        ({"ratio": 0.5, "alpha": 0.5}, "belong to variant='paper'"),
        ({"ratio": 0.5, "num_merges": 2}, "give ratio= or num_merges=, only one of them; got ratio=0.5 and num_mer"),
    ],
}


@pytest.mark.parametrize(("method", "values", "message"), [(m, *row) for m, rows in TOGETHER.items() for row in rows])
def test_what_does_not_go_together(method: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[method](**values)
    with pytest.raises(ValueError, match=message):
        CompressionConfig.from_dict({"method": method, **values})
