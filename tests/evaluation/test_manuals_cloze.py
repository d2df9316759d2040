"""The shipped task pack: every item is sound, and the reference model is well above chance on it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress.evaluation.harness import TASK_PACK, run_tasks

REFERENCE = Path(__file__).parents[2] / "examples" / "reference"
FILE = TASK_PACK / "manuals_cloze" / "manuals_cloze.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def items():
    return lines_of(FILE)


def test_items_are_well_formed(items):
    assert len(items) == 500
    for item in items:
        assert len(item["choices"]) == len(set(item["choices"])) == 4
        assert item["answer"] in range(4)
        assert {len(choice.split()) for choice in item["choices"]} == {5}
        right = len(item["choices"][item["answer"]])
        assert all(abs(len(choice) - right) <= 0.15 * right for choice in item["choices"])
        assert all(choice == choice.strip() for choice in [item["context"], *item["choices"]])
    assert len({item["context"] for item in items}) == 500


def test_the_place_of_the_answer_gives_nothing_away(items):
    counts = [sum(item["answer"] == place for item in items) for place in range(4)]
    # 125 each are expected; 30 is three standard deviations (sqrt(500 * 1/4 * 3/4) = 9.7)
    assert all(abs(count - 125) < 30 for count in counts)


def test_the_length_of_the_answer_gives_nothing_away(items):
    for extreme in (max, min):
        chosen = sum(extreme(item["choices"], key=len) == item["choices"][item["answer"]] for item in items)
        assert chosen / 500 < 0.35


def test_the_right_choice_follows_the_context_and_the_others_do_not(items):
    heldout = lines_of(REFERENCE / "heldout.jsonl")
    texts = [record["text"] for record in heldout]
    for item in items:
        home = heldout[item["document"]]
        assert home["source"] == item["source"]
        for place, choice in enumerate(item["choices"]):
            follows = f"{item['context']} {choice}" in home["text"]
            assert follows == (place == item["answer"])
            assert any(choice in text for text in texts)


@pytest.mark.slow
def test_the_script_makes_the_shipped_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_cloze.py", "--output", str(tmp_path / "again.jsonl")])
    runpy.run_path(str(REFERENCE / "make_cloze.py"), run_name="__main__")
    assert (tmp_path / "again.jsonl").read_bytes() == FILE.read_bytes()


@pytest.mark.slow
def test_the_reference_model_is_well_above_chance_and_well_below_all():
    folder = REFERENCE / "manuals-llama-12l"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    metrics = run_tasks(model, tokenizer, "manuals_cloze", limit=150)["results"]["manuals_cloze"]
    assert metrics["acc,none"] - 4 * metrics["acc_stderr,none"] > 0.25
    assert metrics["acc,none"] + 4 * metrics["acc_stderr,none"] < 1
