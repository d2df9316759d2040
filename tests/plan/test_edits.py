"""Edits are plain data: they go through JSON unchanged, know their paths, and let nothing else in."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.errors import PlanError
from hf_compress.plan.edits import Edit, MergeBlocks, ModuleEdit, RemoveBlocks, StackEdit
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.edits import edit_from_dict, plan_from_json
from hf_compress.rewrite.edits.attention import NarrowAttention
from hf_compress.rewrite.edits.bottleneck import InsertBottleneck
from hf_compress.rewrite.edits.experts import NarrowExperts, SplitExperts
from hf_compress.rewrite.edits.ffn import LinearFFN, NarrowFFN, ReplaceActivation
from hf_compress.rewrite.edits.packed import PackLinear, SparsifyLinear
from hf_compress.rewrite.edits.sealed import Seal

MLP = "model.layers.0.mlp"
GATED = (f"{MLP}.gate_proj", f"{MLP}.up_proj")
DOWN = f"{MLP}.down_proj"

PROJECTIONS = ("query", "key", "value", "output")

# One of every kind, as JSON would have it: the names of the fields are part of the saved format.
WRITTEN = {
    RemoveBlocks: {"stack": "model.layers", "blocks": [1, 2]},
    MergeBlocks: {"stack": "model.layers", "kept": 0, "absorbed": [1, 2]},
    NarrowFFN: {"inputs": list(GATED), "output": DOWN, "width": 48, "bias": True},
    NarrowExperts: {"experts": f"{MLP}.experts", "width": 24},
    SplitExperts: {"experts": f"{MLP}.experts"},
    LinearFFN: {"inputs": list(GATED), "output": DOWN, "rank": 8, "bias": False, "activation": f"{MLP}.act_fn"},
    InsertBottleneck: {
        "block": "model.layers.0",
        "hidden": 64,
        "width": 16,
        "skip": 0.25,
        "norm": "lost",
        "select": "top",
        "active": 4,
        "gated": False,
    },
    PackLinear: {"module": DOWN, "group_size": 16, "planes": [64, 32, 3], "symmetric": False},
    SparsifyLinear: {"module": DOWN, "kept": 20, "planes": [9, 9], "group_size": 8, "symmetric": False, "rest": True},
    NarrowAttention: {**{name: f"model.{name}" for name in PROJECTIONS}, "heads": 4, "groups": 2, "width": 8},
    ReplaceActivation: {"activation": f"{MLP}.act_fn", "blend": "constant", "width": 96},
    Seal: {"module": "model.norm"},
}
KINDS = list(WRITTEN)
MODULE_KINDS = [kind for kind in KINDS if issubclass(kind, ModuleEdit)]

# The fields that name modules, and how many: one, several, or perhaps none.
PATHS = {
    NarrowFFN: {"inputs": "several", "output": "one"},
    NarrowExperts: {"experts": "one"},
    SplitExperts: {"experts": "one"},
    LinearFFN: {"inputs": "several", "output": "one", "activation": "perhaps"},
    InsertBottleneck: {"block": "one"},
    PackLinear: {"module": "one"},
    SparsifyLinear: {"module": "one"},
    NarrowAttention: dict.fromkeys(PROJECTIONS, "one"),
    ReplaceActivation: {"activation": "one"},
    Seal: {"module": "one"},
}
PATH_FIELDS = [
    *((kind, name, number) for kind, fields in PATHS.items() for name, number in fields.items()),
    *((kind, "stack", "one") for kind in (RemoveBlocks, MergeBlocks)),
]
SIZES = [
    *((kind, "width") for kind in (NarrowFFN, NarrowExperts, InsertBottleneck, ReplaceActivation, NarrowAttention)),
    *((LinearFFN, "rank"), (InsertBottleneck, "hidden"), (PackLinear, "group_size"), (SparsifyLinear, "group_size")),
    *((SparsifyLinear, "kept"), (NarrowAttention, "heads"), (NarrowAttention, "groups")),
]
SWITCHES = [
    *((NarrowFFN, "bias"), (LinearFFN, "bias"), (PackLinear, "symmetric")),
    *((SparsifyLinear, "symmetric"), (SparsifyLinear, "rest")),
]


def make(kind, **changes):
    return kind(**(WRITTEN[kind] | changes))


def refused(kind, name, value, message):
    with pytest.raises(PlanError, match=message) as raised:
        make(kind, **{name: value})
    assert len(str(raised.value)) < 400


# --- round trips ------------------------------------------------------------------------------------------------------

names = st.text("abcdefgh_0123456789XYZ", min_size=1, max_size=8)
paths = st.lists(names, min_size=1, max_size=6).map(".".join)
several = st.lists(paths, min_size=1, max_size=3).map(tuple)
sizes = st.integers(1, 2**31 - 1)
indices = st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True).map(tuple)


@st.composite
def merges(draw):
    kept, *absorbed = draw(st.lists(st.integers(0, 99), min_size=2, max_size=6, unique=True))
    return MergeBlocks(draw(paths), kept, tuple(absorbed))


@st.composite
def bottlenecks(draw):
    narrow, wide = sorted(draw(st.tuples(sizes, sizes)))
    skip = draw(st.one_of(st.floats(0, 1), st.integers(0, 1)))
    norm = draw(st.sampled_from(["kept", "lost", "none"]))
    return InsertBottleneck(draw(paths), wide, narrow, skip, norm, gated=draw(st.booleans()))


@st.composite
def activations(draw):
    blend = draw(st.sampled_from(["leaky", "identity", "constant"]))
    return ReplaceActivation(draw(paths), blend, draw(sizes) if blend == "constant" else None)


module_edits = st.one_of(
    st.builds(NarrowFFN, several, paths, sizes, st.booleans()),
    st.builds(NarrowExperts, paths, sizes),
    st.builds(SplitExperts, paths),
    st.builds(LinearFFN, several, paths, st.none() | sizes, st.booleans(), st.none() | paths),
    bottlenecks(),
    st.builds(PackLinear, paths, sizes, st.lists(sizes, min_size=1, max_size=16).map(tuple), st.booleans()),
    st.builds(
        SparsifyLinear, paths, sizes, st.lists(sizes, max_size=16).map(tuple), sizes, st.booleans(), st.booleans()
    ),
    activations(),
    st.builds(Seal, paths),
)
edits = st.one_of(st.builds(RemoveBlocks, paths, indices), merges(), module_edits)


@given(edits)
def test_json_gives_every_edit_back(edit):
    again = edit_from_dict(json.loads(json.dumps(edit.to_dict())))
    assert type(again) is type(edit)
    assert again == edit
    assert hash(again) == hash(edit)


@given(st.lists(module_edits, max_size=5))
def test_json_gives_a_plan_of_them_back(several):
    plan = Plan(tuple(several))
    assert plan_from_json(plan.to_json()) == plan


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_form_stays_readable(kind):
    assert make(kind).to_dict() == {"edit": kind.__name__} | {
        name: tuple(value) if isinstance(value, list) else value for name, value in WRITTEN[kind].items()
    }
    assert edit_from_dict({"edit": kind.__name__, **WRITTEN[kind]}) == make(kind)


def test_what_may_be_left_out():
    assert NarrowFFN(GATED, DOWN, 48) == make(NarrowFFN, bias=False)
    assert LinearFFN(GATED, DOWN) == make(LinearFFN, rank=None, bias=True, activation=None)
    assert InsertBottleneck("model.layers.0", 64, 16) == make(
        InsertBottleneck, skip=0.1, norm="kept", select="all", active=None, gated=False
    )
    assert PackLinear(DOWN, 16, (64, 32, 3)) == make(PackLinear, symmetric=True)
    assert ReplaceActivation(f"{MLP}.act_fn", "leaky") == make(ReplaceActivation, blend="leaky", width=None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_cannot_be_changed(kind):
    edit = make(kind)
    for field in dataclasses.fields(kind):
        with pytest.raises(AttributeError):
            setattr(edit, field.name, getattr(edit, field.name))


# --- paths ------------------------------------------------------------------------------------------------------------

NO_PATHS = [
    *("", ".", "..", "a..b", ".a", "a.", "../model", "a/b", "/model", "a\\b", "model.layers[0]", "model layers"),
    *("a\n", "a\0", "a-b", "modèle.layers", "模型", "٣", "a.b\u200b", "model.*"),
    *("x" * 101, "x" * 1000, ".".join(["a"] * 22), "a" * 10**6),
    *(None, True, 3, 1.5, b"model", {"model": 1}, {"model"}, object()),
]


@pytest.mark.parametrize(("kind", "name", "number"), PATH_FIELDS)
def test_what_is_no_path_of_a_module(kind, name, number):
    for value in NO_PATHS:
        if value is None and number == "perhaps":
            assert getattr(make(kind, **{name: None}), name) is None
        else:
            given = [GATED[0], value] if number == "several" else value
            refused(kind, name, given, f"^{name} must be the path of a module")


def test_what_is_a_path():
    """A dunder is harmless: a path is looked up among the modules alone."""
    for value in ("a", "0", "__class__", ".".join(["a"] * 21), "x" * 100, "model.layers.10.mlp.up_proj"):
        assert make(NarrowFFN, inputs=[value]).inputs == (value,)
        assert make(LinearFFN, inputs=[value] * 4).inputs == (value,) * 4
        assert make(NarrowFFN, output=value).output == value


@pytest.mark.parametrize(("kind", "name", "number"), PATH_FIELDS)
def test_one_path_is_not_several(kind, name, number):
    for value in ([DOWN], (DOWN,), []):
        refused(kind, name, [value] if number == "several" else value, f"^{name} must be the path of a module")


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_every_path_is_known(kind):
    expected = []
    for name in PATHS[kind]:
        value = WRITTEN[kind][name]
        expected += value if isinstance(value, list) else [value]
    assert sorted(make(kind).paths) == sorted(expected)


def test_a_path_that_was_left_out_is_neither_known_nor_moved():
    edit = make(LinearFFN, activation=None)
    assert edit.paths == (*GATED, DOWN)
    assert edit.moved(lambda path: f"x.{path}").activation is None


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_moving_renames_every_path_and_nothing_else(kind):
    edit = make(kind)
    moved = edit.moved(lambda path: f"language_model.{path}")
    assert type(moved) is kind
    for field in dataclasses.fields(kind):
        before, after = getattr(edit, field.name), getattr(moved, field.name)
        if field.name not in PATHS[kind]:
            assert after == before
        elif isinstance(before, tuple):
            assert after == tuple(f"language_model.{path}" for path in before)
        else:
            assert after == f"language_model.{before}"
    assert edit == make(kind)


@given(module_edits)
def test_moving_there_and_back(edit):
    assert edit.moved(lambda path: path) == edit
    assert edit.moved(lambda path: f"x.{path}").moved(lambda path: path.removeprefix("x.")) == edit
    assert edit.moved(lambda path: f"x.{path}").paths == tuple(f"x.{path}" for path in edit.paths)


def test_moving_to_what_is_no_path():
    with pytest.raises(PlanError, match="module must be the path of a module"):
        make(Seal).moved(lambda path: f"../{path}")


# --- numbers ----------------------------------------------------------------------------------------------------------

NO_SIZES = [0, -1, 2**31, 10**100, True, False, 1.0, float("nan"), "8", [8], {}]


@pytest.mark.parametrize(("kind", "name"), SIZES)
def test_what_is_no_size(kind, name):
    for value in NO_SIZES:
        refused(kind, name, value, f"^{name} must be a positive whole number")
    if (kind, name) == (LinearFFN, "rank"):
        assert make(kind, rank=None).rank is None
    elif kind is not ReplaceActivation:
        refused(kind, name, None, f"^{name} must be a positive whole number")


# A bare string, too, is no list of paths: it would be taken letter by letter.
NO_LISTS = ([], (), "a.b", "", None, 3, True, {DOWN: 1}, {DOWN}, iter([DOWN]), [DOWN] * 5, [DOWN] * 10**5)
NO_SKIPS = (-0.01, 1.01, float("nan"), float("inf"), True, False, "0.1", None, [0.1], "1" * 1000)
NO_PLANES = ([1] * 17, [1] * 1000, None, 3, "123", {1: 2}, {4})
NO_COUNTS = [[64, entry] for entry in (*NO_SIZES, None)]
NO_BLENDS = ("", "Leaky", "relu", None, 1, True, [], ["leaky"], {}, "x" * 1000)
NO_VALUES = [
    *((kind, "inputs", NO_LISTS, "a list of 1 to 4 paths of modules; got ") for kind in (NarrowFFN, LinearFFN)),
    *((kind, name, (0, 1, "true", None, [], 1.0), "true or false") for kind, name in SWITCHES),
    (InsertBottleneck, "skip", NO_SKIPS, r"a number in \[0, 1\]"),
    (PackLinear, "planes", ([], (), *NO_PLANES), "1 to 16 numbers of groups"),
    (SparsifyLinear, "planes", NO_PLANES, "up to 16 numbers of groups"),
    *((kind, "planes", NO_COUNTS, "a positive whole number") for kind in (PackLinear, SparsifyLinear)),
    (ReplaceActivation, "blend", NO_BLENDS, "one of leaky, identity, constant"),
]


@pytest.mark.parametrize(("kind", "name", "values", "message"), NO_VALUES)
def test_what_is_no_value_of_a_field(kind, name, values, message):
    for value in values:
        refused(kind, name, value, f"^{name} must be {message}")


LIMITED = [(InsertBottleneck, "width"), *((NarrowAttention, name) for name in ("heads", "groups"))]


@pytest.mark.parametrize(("kind", "name"), [entry for entry in SIZES if entry not in LIMITED])
def test_the_largest_size(kind, name):
    assert getattr(make(kind, **{name: 2**31 - 1}), name) == 2**31 - 1


@pytest.mark.parametrize("skip", [0, 0.0, 0.5, 1, 1.0])
def test_what_is_a_skip(skip):
    assert make(InsertBottleneck, skip=skip).skip == skip


def test_a_bottleneck_is_no_wider_than_the_stream():
    assert make(InsertBottleneck, width=64).width == 64
    with pytest.raises(PlanError, match="must be narrower than the stream, 64; got 65"):
        InsertBottleneck("model.layers.0", 64, 65)
    assert InsertBottleneck("model.layers.0", 64, 65, select="above").width == 65  # a dictionary may be wider


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer"}, "norm must be one of kept, lost, none; got 'layer'"),
        ({"select": None}, "select must be one of all, top, above; got None"),
        ({"active": None}, 'active is for select="top", and a number of features there; got None'),
        ({"active": 0}, "active is for select"),
        ({"active": True}, "active must be a whole number; got True"),
        ({"active": 17}, "of 16 features no 17 can be active"),
        ({"select": "all"}, "active is for select"),
        ({"gated": 1}, "gated must be True or False; got 1"),
    ],
)
def test_what_is_no_form_of_a_bottleneck(changes, message):
    with pytest.raises(PlanError, match=message):
        make(InsertBottleneck, **changes)


@pytest.mark.parametrize(("blend", "width"), [("leaky", 96), ("identity", "9" * 1000), ("constant", None)])
def test_only_constants_have_a_width(blend, width):
    with pytest.raises(PlanError, match='width is for the blend "constant", and needed there') as raised:
        make(ReplaceActivation, blend=blend, width=width)
    assert len(str(raised.value)) < 400


# --- what else a file may say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_from_elsewhere(kind):
    """Class attributes, too, are no fields."""
    for name in ("surprise", "path_fields", "paths", "__class__", "moved"):
        with pytest.raises(PlanError, match=f"edit {kind.__name__} has the wrong fields .*{name}"):
            edit_from_dict({"edit": kind.__name__, **WRITTEN[kind], name: ()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_is_missing(kind):
    for name in [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]:
        values = {key: value for key, value in WRITTEN[kind].items() if key != name}
        with pytest.raises(PlanError, match=f"edit {kind.__name__} has the wrong fields .*{name}"):
            edit_from_dict({"edit": kind.__name__, **values})


@pytest.mark.parametrize(
    "values",
    [
        *(None, 3, "Seal", [], ["Seal", "model"], {}, {"module": "model"}, {"edit": None}, {"edit": ["Seal"]}),
        *({"edit": {}}, {"edit": 1}, {"edit": "seal", "module": "model"}, {"edit": "Seal ", "module": "model"}),
        *({"edit": "Edit"}, {"edit": "ModuleEdit"}, {"edit": "StackEdit", "stack": "model.layers"}),
        *({"edit": "edit_from_dict"}, {"edit": "Plan"}, {"edit": "__init__"}, {"edit": "Explode" * 1000}),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_edit(values):
    with pytest.raises(PlanError, match="unknown edit in the plan") as raised:
        edit_from_dict(values)
    assert "upgrade hf-compress" in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("key", [1, "x" * 10**6], ids=["no string", "long"])
def test_a_message_does_not_grow_with_what_was_given(key):
    with pytest.raises(PlanError, match="wrong fields") as raised:
        edit_from_dict({"edit": "Seal", "module": "model", key: 1})
    assert len(str(raised.value)) < 600


def test_reading_leaves_what_was_read_alone():
    values = {"edit": "NarrowFFN", **WRITTEN[NarrowFFN]}
    before = json.dumps(values)
    edit_from_dict(values)
    assert json.dumps(values) == before


def test_two_edits_of_one_name_are_refused():
    with pytest.raises(TypeError, match="an edit called Seal already"):
        type("Seal", (ModuleEdit,), {})


@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_is_of_a_stack_or_of_modules(kind):
    assert issubclass(kind, Edit)
    assert issubclass(kind, StackEdit) != issubclass(kind, ModuleEdit)
    plan = Plan((make(kind),))
    assert (plan.stack_edits, plan.module_edits) in ((plan.edits, ()), ((), plan.edits))
