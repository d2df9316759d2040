"""Edits in words: a line for each decision, and the bits of packed weights counted by hand."""

import pytest

from hf_compress.plan.edits import EDITS
from hf_compress.report.edits import bits_of, decisions


def narrow(block, width, part="mlp"):
    paths = {name: f"model.layers.{block}.{part}.{name}_proj" for name in ("gate", "up", "down")}
    return {
        "edit": "NarrowFFN",
        "inputs": [paths["gate"], paths["up"]],
        "output": paths["down"],
        "width": width,
        "bias": False,
    }


def pack(module, planes, **more):
    return {"edit": "PackLinear", "module": module, "group_size": 16, "planes": planes, "symmetric": True, **more}


CASES = {
    "merged": (
        [
            {"edit": "MergeBlocks", "stack": "h", "kept": 2, "absorbed": [3, 4]},
            {"edit": "MergeBlocks", "stack": "h", "kept": 8, "absorbed": [9]},
        ],
        ["h: block 2 stands for blocks 2–4; block 8 stands for blocks 8–9"],
    ),
    "left out": ([{"edit": "RemoveBlocks", "stack": "h", "blocks": [0, 6, 7]}], ["h: left out: 0, 6–7"]),
    "one width": (
        [narrow(block, 8) for block in (0, 1, 2, 5)],
        ["NarrowFFN, model.layers.0–2, 5.mlp.down_proj: 8 hidden units"],
    ),
    "widths": (
        [narrow(block, width) for block, width in enumerate((1024, 96, 352))],
        ["NarrowFFN, model.layers.0–2.mlp.down_proj: 96 to 1024 hidden units"],
    ),
    "experts": (
        [narrow(block, 4 + expert, f"experts.{expert}") for block in (0, 1) for expert in range(3)],
        ["NarrowFFN, model.layers.0–1.experts.*.down_proj: 4 to 6 hidden units"],
    ),
    "bottlenecks": (
        [
            {"edit": "InsertBottleneck", "block": f"h.{block}", "hidden": 32, "width": width}
            for block, width in ((1, 16), (3, 20))
        ],
        ["InsertBottleneck, h.1, 3: 16 to 20 features of a stream of 32"],
    ),
    "linear, with a bias and without": (
        [
            {"edit": "LinearFFN", "inputs": [f"h.{block}.up"], "output": f"h.{block}.down", "bias": bool(block)}
            for block in (0, 1)
        ],
        ["LinearFFN, h.0–1.down: one linear map, no bias; one linear map"],
    ),
    "sparse": (
        [{"edit": "SparsifyLinear", "module": f"h.{block}.up", "kept": 1000 + block} for block in (0, 1)],
        ["SparsifyLinear, h.0–1.up: 1,000 to 1,001 weights kept"],
    ),
    "packed": (
        [pack("h.0.up", [4, 4, 2]), pack("h.1.down", [4, 4])],
        ["PackLinear, 2 linear maps: 2.25 bits a weight on average (2 to 3), 3.75 with the steps of groups"],
    ),
    "sparse and packed": (
        [pack("h.0.up", [4, 4]) | {"edit": "SparsifyLinear", "kept": 60, "rest": False}],
        ["SparsifyLinear, 1 linear maps: 60 weights kept, in 2 bits a weight on average, 3.5 with the steps of groups"],
    ),
    "unheard of": ([{"edit": "New", "size": 3}, {"edit": "New", "size": 5}], ["New, : size: 3 to 5"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("name", CASES)
def test_decisions(name):
    edits, lines = CASES[name]
    assert decisions(edits) == lines


def test_every_edit_says_what_it_does():
    """Without which there is no line for it."""
    assert all("describe" in vars(kind) for kind in EDITS.values())


def test_bits_are_counted():
    """Of 4 + 8 groups of 16: 2 + 6 with one bit, 2 with three, 2 with two; steps and widths take 24 bits, zeros 8."""
    bits = bits_of([pack("a.0", [4, 2, 2], symmetric=False), pack("b.0", [8, 2]), narrow(0, 8)])
    assert bits.maps == 2
    assert bits.weights == {1: 128, 2: 32, 3: 32}
    assert bits.average == (128 + 2 * 32 + 3 * 32) / 192
    assert bits.stored == bits.average + (4 * 32 + 8 * 24) / 192


@pytest.mark.parametrize("planes", [None, [], "1", ["x"], [0], [None, 2], {}])
def test_what_packs_nothing_has_no_bits(planes):
    assert bits_of([{"edit": "New", "planes": planes, "group_size": 16}]) is None
