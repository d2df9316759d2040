"""Plans are plain data: they go through JSON unchanged, and nothing else comes in."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.plan.edits import MergeBlocks, RemoveBlocks
from hf_compress.plan.plan import PLAN_VERSION, Plan
from hf_compress.rewrite.edits import plan_from_json

LAYERS = "model.layers"
indices = st.lists(st.integers(0, 99), min_size=2, max_size=12, unique=True)


@st.composite
def plans(draw) -> Plan:
    """Edits of up to two stacks that take no block out twice."""
    edits = []
    for stack in draw(st.lists(st.sampled_from([LAYERS, "encoder.block"]), unique=True)):
        blocks = draw(indices)
        cut = draw(st.integers(1, len(blocks) - 1))
        edits.append(RemoveBlocks(stack, tuple(blocks[:cut])))
        if len(blocks) - cut > 1:
            edits.append(MergeBlocks(stack, blocks[cut], tuple(blocks[cut + 1 :])))
    return Plan(tuple(edits))


@given(plans())
def test_json_round_trip(plan):
    assert plan_from_json(plan.to_json()) == plan


@given(plans())
def test_what_is_removed_is_sorted_and_all_of_it(plan):
    for stack in plan.stacks:
        edits = [edit for edit in plan.edits if edit.stack == stack]
        expected = [i for edit in edits for i in (edit.blocks if isinstance(edit, RemoveBlocks) else edit.absorbed)]
        assert list(plan.removed(stack)) == sorted(expected)
    assert plan.removed("another.stack") == ()


def test_order_of_the_indices_does_not_matter():
    assert RemoveBlocks(LAYERS, (3, 1)) == RemoveBlocks(LAYERS, (1, 3))
    assert RemoveBlocks(LAYERS, [3, 1]).blocks == (1, 3)


def test_tensors_and_notes_stay_out_of_json():
    plan = Plan((RemoveBlocks(LAYERS, (1,)),), {"a": torch.zeros(2)}, {"similarity": 0.5})
    assert set(json.loads(plan.to_json())) == {"version", "edits"}


@pytest.mark.parametrize("blocks", [(), (1, 1), (-1,), (True,), (1.0,), ("1",), 3, None])
def test_indices_are_distinct_and_counted_from_zero(blocks):
    with pytest.raises(ValueError, match="blocks must be"):
        RemoveBlocks(LAYERS, blocks)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (lambda: (RemoveBlocks(LAYERS, (1, 2)), RemoveBlocks(LAYERS, (2,))), "takes a block of model.layers out twice"),
        (lambda: (MergeBlocks(LAYERS, 1, (2,)), RemoveBlocks(LAYERS, (1,))), "both merges into and removes"),
        (lambda: (MergeBlocks(LAYERS, 1, (1, 2)),), "both kept and absorbed"),
        (lambda: (MergeBlocks(LAYERS, -1, (2,)),), "kept must be"),
        (lambda: (MergeBlocks(LAYERS, 1, ()),), "absorbed must be"),
    ],
)
def test_edits_that_contradict_each_other(edits, message):
    with pytest.raises(ValueError, match=message):
        Plan(edits())


def test_the_same_index_in_two_stacks_is_no_contradiction():
    plan = Plan((RemoveBlocks("a", (1,)), RemoveBlocks("b", (1,))))
    assert plan.stacks == ("a", "b")


def written(**changes) -> str:
    edit = {"edit": "RemoveBlocks", "stack": LAYERS, "blocks": [1]}
    return json.dumps({"version": PLAN_VERSION, "edits": [edit | changes]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "a plan is a JSON object"),
        ('{"version": 1}', "a plan is a JSON object"),
        (json.dumps({"version": PLAN_VERSION + 1, "edits": []}), "upgrade hf-compress"),
        (json.dumps({"edits": []}), "version None"),
        (json.dumps({"version": PLAN_VERSION, "edits": [3]}), "unknown edit"),
        (written(edit="Explode"), "unknown edit"),
        (written(surprise=1), r"wrong fields \['blocks', 'stack', 'surprise'\]"),
        (written(blocks=[1, 1]), "distinct block indices"),
        (written(blocks=["1"]), "distinct block indices"),
        (written(stack=3), "must be the path of a module"),
    ],
)
def test_what_is_no_plan_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        plan_from_json(text)


def test_a_written_plan_is_read():
    assert plan_from_json(written()) == Plan((RemoveBlocks(LAYERS, (1,)),))
