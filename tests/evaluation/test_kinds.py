"""A metric is measured of the models that it fits, and of no others."""

import pytest
import transformers

from hf_compress import evaluate, perplexity
from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.harness import run_tasks
from hf_compress.evaluation.kinds import check_predicts_text
from hf_compress.evaluation.size import parameter_count
from tests.helpers.tiny import tiny_kind, tiny_model, tiny_seq2seq_model

OTHERS = {
    "classifier": (transformers.BertForSequenceClassification, "bert", "predicts the next token"),
    "classifier of a decoder": (transformers.LlamaForSequenceClassification, "llama", "predicts the next token"),
    "masked": (transformers.BertForMaskedLM, "bert", "predicts the next token"),
    "encoder": (transformers.BertModel, "bert", "predicts the next token"),
    "decoder without a head": (transformers.LlamaModel, "llama", "predicts the next token"),
    "bidirectional, by a causal name": (transformers.BertLMHeadModel, "bert", "reads those after it"),
    "permuted": (transformers.XLNetLMHeadModel, "xlnet", "reads those after it"),
    "images": (transformers.ViTForImageClassification, "vit", "predicts the next token"),
}


@pytest.fixture(params=OTHERS)
def other(request):
    kind, model_type, message = OTHERS[request.param]
    return tiny_kind(kind, model_type), message


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "mamba", "bloom", "bert"])
def test_causal_models_pass(kind):
    """Also a BERT that is a decoder."""
    check_predicts_text(tiny_model(kind), "perplexity")
    check_predicts_text(tiny_model(kind).bfloat16(), "perplexity")


@pytest.mark.parametrize(
    "make",
    [lambda: tiny_kind(transformers.ViTForImageClassification, "vit"), lambda: tiny_seq2seq_model("t5")],
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
    rows = evaluate(tiny_kind(transformers.BertForSequenceClassification, "bert")).rows()
    assert [row[0] for row in rows] == ["parameters", "stored bytes", "tokens/s"]
