"""The algebra of edits against the slowest oracle: a list of blocks, from which one plan after another takes some."""

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from hf_compress.plan.algebra import Removal, survivors
from hf_compress.plan.edits import MergeBlocks, RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.edits.ffn import LinearFFN, NarrowFFN, ReplaceActivation
from hf_compress.rewrite.edits.sealed import Seal

STACK, LENGTH = "model.h", 14  # numbers of one digit and of two
ELSEWHERE = (Seal("model.g.1.norm"), Seal("model.h2.1.norm"), Seal("norm"))


def seal(block):
    return Seal(f"{STACK}.{block}.norm")


@st.composite
def chains(draw):
    """Plans one after another, each for the model that those before leave, and what the oracle has at the end.

    Of every block that is left, in order: which blocks it stands for, and the number of the plan that sealed it last.
    """
    blocks = [({index}, None) for index in range(LENGTH)]
    plans = []
    for number in range(draw(st.integers(1, 4))):
        gone = draw(st.lists(st.integers(0, len(blocks) - 1), max_size=min(4, len(blocks) - 1), unique=True))
        cut = draw(st.integers(0, len(gone)))
        edits = [RemoveBlocks(STACK, gone[:cut])] if cut else []
        edits += [MergeBlocks(STACK, gone[cut], gone[cut + 1 :])] if len(gone) > cut + 1 else []
        taken = {index for edit in edits for index in edit.removed_blocks()}
        sealed = draw(st.sets(st.sampled_from([i for i in range(len(blocks)) if i not in taken]), max_size=3))
        tensors = {f"{STACK}.{index}.norm.weight": number for index in sealed}
        plans.append(Plan((*map(seal, sealed), *edits), tensors))
        blocks = [(own, number if index in sealed else last) for index, (own, last) in enumerate(blocks)]
        for edit in edits:
            if isinstance(edit, MergeBlocks):
                blocks[edit.kept][0].update(*(blocks[index][0] for index in edit.absorbed))
        blocks = [block for index, block in enumerate(blocks) if index not in taken]
    return plans, [own for own, _ in blocks], [last for _, last in blocks]


@given(chains())
def test_plans_one_after_another_are_one_plan(chain):
    plans, stands_for, sealed = chain
    plan = reduce(Plan.then, plans, Plan(ELSEWHERE))
    gone = set(plan.removed(STACK))
    first = [min(own - gone) for own in stands_for]
    assert gone == set(range(LENGTH)) - set(first)
    assert survivors(plan.edits, STACK, LENGTH) == dict(zip(first, map(max, stands_for), strict=True))
    left = {index: number for index, number in zip(first, sealed, strict=True) if number is not None}
    assert set(plan.module_edits) == {*map(seal, left), *ELSEWHERE}
    assert plan.tensors == {f"{STACK}.{index}.norm.weight": number for index, number in left.items()}
    now = [index for index, number in enumerate(sealed) if number is not None]
    assert set(Removal.of(plan.edits).left_of(plan.module_edits)) == {*map(seal, now), *ELSEWHERE}


def test_a_block_stands_for_the_last_of_all_that_were_merged_into_it():
    assert survivors([MergeBlocks(STACK, 0, (2,)), MergeBlocks(STACK, 0, (1,))], STACK, 4) == {0: 2, 3: 3}


@given(chains())
def test_numbers_before_and_after_a_removal(chain):
    for plan in chain[0]:
        removal = Removal.of(plan.edits)
        left = [index for index in range(LENGTH) if index not in plan.removed(STACK)]
        assert [removal.before(STACK, new) for new in range(len(left))] == left
        assert [removal.after(STACK, old) for old in left] == list(range(len(left)))
        for old in left:
            assert removal.path_before(removal.path_after(f"{STACK}.{old}.mlp.up")) == f"{STACK}.{old}.mlp.up"


def test_what_an_ffn_that_became_linear_was_before_is_not_said():
    inputs, output = ("h.0.up",), "h.0.down"
    first = Plan((NarrowFFN(inputs, output, 8), ReplaceActivation("h.0.act", "leaky"), Seal("h.0.norm")))
    linear = LinearFFN(inputs, output, activation="h.0.act")
    assert first.then(Plan((linear,))).edits == (Seal("h.0.norm"), linear)
    assert first.then(Plan((NarrowFFN(inputs, output, 4),))).edits == (*first.edits[1:], NarrowFFN(inputs, output, 4))
