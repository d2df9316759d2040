"""A metric is measured of the models that it fits, and of no others."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_compress import evaluate, perplexity
from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.harness import run_tasks
from hf_compress.evaluation.kinds import check_predicts_text
from hf_compress.evaluation.size import parameter_count
from tests.helpers.language import WORDS, tiny_llama
from tests.helpers.tiny import tiny_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {**SIZES, "image_size": 8, "patch_size": 4}


def bert(kind, **more):
    return kind(BertConfig(**SIZES, vocab_size=len(WORDS), initializer_range=0.4, **more))


OTHERS = {
    "classifier": (lambda: bert(BertForSequenceClassification), "predicts the next token"),
    "classifier of a decoder": (
        lambda: LlamaForSequenceClassification(tiny_llama(2).config),
        "predicts the next token",
    ),
    "masked": (lambda: bert(BertForMaskedLM), "predicts the next token"),
    "encoder": (lambda: bert(BertModel), "predicts the next token"),
    "decoder without a head": (lambda: tiny_llama(2).model, "predicts the next token"),
    "bidirectional, by a causal name": (lambda: bert(BertLMHeadModel), "reads those after it"),
    "permuted": (
        lambda: XLNetLMHeadModel(
            XLNetConfig(vocab_size=len(WORDS), d_model=32, n_layer=2, n_head=2, d_inner=32, initializer_range=0.4)
        ),
        "reads those after it",
    ),
    "images": (lambda: ViTForImageClassification(ViTConfig(**VIT)), "predicts the next token"),
}


@pytest.fixture(params=OTHERS)
def other(request):
    torch.manual_seed(0)
    make, message = OTHERS[request.param]
    return make().eval(), message


def test_there_is_no_perplexity_of_others(other, tokenizer, texts):
    model, message = other
    for measure in (lambda: perplexity(model, tokenizer, texts), lambda: evaluate(model, tokenizer, texts=texts)):
        with pytest.raises(UnsupportedModelError, match=f"perplexity needs .*{message}"):
            measure()


def test_there_are_no_lm_eval_scores_of_others(other, tokenizer):
    model, message = other
    for measure in (
        lambda: run_tasks(model, tokenizer, "manuals_cloze", limit=1),
        lambda: evaluate(model, tokenizer, tasks="manuals_cloze"),
        lambda: evaluate(model, tasks="manuals_cloze"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"lm-eval tasks needs .*{message}"):
            measure()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "mamba", "bloom"])
def test_causal_models_pass(kind):
    check_predicts_text(tiny_model(kind), "perplexity")
    check_predicts_text(tiny_model(kind).bfloat16(), "perplexity")


def test_a_bert_that_is_a_decoder_passes():
    check_predicts_text(bert(BertLMHeadModel, is_decoder=True), "perplexity")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTForImageClassification(ViTConfig(**VIT)),
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
    ],
    ids=["images", "two sides"],
)
def test_of_a_model_that_reads_more_than_tokens_the_size_is_measured(make):
    model = make()
    result = evaluate(model)
    assert result.parameters == parameter_count(model)
    assert result.throughput is None
    assert [row[0] for row in result.rows()] == ["parameters", "stored bytes"]
    assert result.to_dict()["throughput"] is None


def test_a_classifier_has_size_and_speed():
    assert [row[0] for row in evaluate(bert(BertForSequenceClassification)).rows()] == [
        "parameters",
        "stored bytes",
        "tokens/s",
    ]
