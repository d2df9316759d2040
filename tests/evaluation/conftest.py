"""A model, texts and a task of lm-eval, made on the spot: no test here needs a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.helpers.language import tiny_llama, words

TASK = """\
task: tiny_cloze
custom_dataset: !function tiny_data.load
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
DATA = """\
import json
from collections.abc import Callable
from pathlib import Path

import datasets


def load(**_):
    lines = Path(__file__).with_name("tiny.jsonl").read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
"""


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def texts() -> list[str]:
    return [words(count, seed=count) for count in (30, 1, 75, 12)]


@pytest.fixture
def questions() -> list[dict]:
    return [
        {
            "context": words(6, seed=100 + number),
            "choices": [words(3, seed=200 + 4 * number + choice) for choice in range(4)],
            "answer": number % 4,
        }
        for number in range(12)
    ]


@pytest.fixture
def task_folder(tmp_path: Path, questions: list[dict]) -> Path:
    """A folder with one lm-eval task, `tiny_cloze`."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny_cloze.yaml").write_text(TASK)
    (folder / "tiny_data.py").write_text(DATA)
    (folder / "tiny.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder
