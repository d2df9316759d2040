"""A tiny random Llama and word tokenizers, made on the spot: no test here needs a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
POSITIONS = 48

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


def word_tokenizer(add_special: bool) -> PreTrainedTokenizerFast:
    """One token a word; with `<s> … </s>` around each text if asked."""
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if add_special:
        backend.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", WORDS.index("<s>")), ("</s>", WORDS.index("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def words(count: int, seed: int) -> str:
    """A text of that many random words of the tokenizer's vocabulary."""
    picks = torch.randint(4, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[pick] for pick in picks.tolist())


def tiny_llama(layers: int = 2, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.4,  # far from uniform predictions, so that a wrong context shows
        tie_word_embeddings=tied,
        bos_token_id=WORDS.index("<s>"),
        eos_token_id=WORDS.index("</s>"),
        pad_token_id=WORDS.index("<pad>"),
    )
    return LlamaForCausalLM(config).eval()


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
