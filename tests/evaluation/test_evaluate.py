import json
import math

import pytest
import torch

from hf_compress.evaluation.evaluate import EvaluationResult, TaskScore, evaluate, task_scores
from hf_compress.evaluation.perplexity import Perplexity, perplexity
from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.evaluation.speed import Throughput


@pytest.fixture
def result():
    return EvaluationResult(
        name="small",
        parameters=1234,
        stored_bytes=5000,
        throughput=Throughput(1000.0, math.nan, 1, 16, 1),
        perplexity=Perplexity(20.0, math.log(20), 0.05, 100, 2, "documents"),
        scores=(TaskScore("cloze", "acc", 0.5, 0.1, True, 26), TaskScore("cloze", "f1", 0.25, math.nan, None, 26)),
    )


def test_a_directory_and_the_live_model_score_alike(model, tokenizer, texts, task_folder, tmp_path):
    directory = tmp_path / "tiny-llama"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    given = {"texts": texts, "include_path": task_folder}
    live = evaluate(model, tokenizer, tasks="tiny_cloze", **given)
    read = evaluate(directory, tasks=["tiny_cloze"], output_dir=tmp_path / "out", batch_size=3, **given)
    assert (live.name, read.name) == ("LlamaForCausalLM", "tiny-llama")
    assert live.scores == read.scores
    assert [(score.metric, score.documents, score.higher_is_better) for score in live.scores] == [("acc", 12, True)]
    assert live.perplexity.loss == pytest.approx(perplexity(model, tokenizer, texts).loss, rel=1e-6)
    assert read.perplexity.loss == pytest.approx(live.perplexity.loss, rel=1e-6)
    assert live.parameters == read.parameters == parameter_count(model)
    assert live.stored_bytes == stored_bytes(model)
    assert read.stored_bytes == (directory / "model.safetensors").stat().st_size
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == read.to_dict()
    assert len(list((tmp_path / "out").glob("tiny-llama/results_*.json"))) == 1


def test_sizes_alone_need_no_tokenizer(model):
    measured = evaluate(model)
    assert (measured.perplexity, measured.scores) == (None, ())
    assert [row[0] for row in measured.rows()] == ["parameters", "stored bytes", "tokens/s"]


def test_json_has_every_number_and_no_nan(result):
    content = json.loads(result.to_json())
    assert content == result.to_dict()
    assert content["perplexity"]["value_standard_error"] == pytest.approx(1.0)
    assert content["throughput"]["standard_error"] is None
    told = {"task": "cloze", "metric": "acc", "value": 0.5, "standard_error": 0.1}
    assert content["scores"][0] == told | {"higher_is_better": True, "documents": 26}
    assert content["scores"][1]["standard_error"] is None


def test_the_table_shows_values_and_errors_in_columns(result):
    assert result.table().splitlines() == [
        "small          value  std. error",
        "--------------------------------",
        "parameters     1,234",
        "stored bytes   5,000",
        "tokens/s       1,000",
        "perplexity     20.00        1.00",
        "cloze acc     0.5000      0.1000",
        "cloze f1      0.2500",
    ]


def test_every_metric_and_filter_of_lm_eval_is_kept():
    harness = {
        "results": {
            "math": {
                "name": "math",
                "alias": "math",
                "sample_len": 3,
                "exact_match,strict": 0.5,
                "exact_match_stderr,strict": 0.1,
                "exact_match,flexible": 0.75,
                "exact_match_stderr,flexible": "N/A",
            }
        },
        "higher_is_better": {"math": {"exact_match": True}},
        "n-samples": {"math": {"original": 9, "effective": 3}},
    }
    strict, flexible = task_scores(harness)
    assert strict == TaskScore("math", "exact_match,strict", 0.5, 0.1, True, 3)
    assert (flexible.metric, flexible.value) == ("exact_match,flexible", 0.75)
    assert math.isnan(flexible.standard_error)


def test_tasks_and_texts_need_a_tokenizer(model):
    with pytest.raises(ValueError, match=r"tokenizer is None.*pass the model's tokenizer"):
        evaluate(model, texts=["w1 w2"])
    with pytest.raises(ValueError, match="tokenizer is None"):
        evaluate(model, tasks=["manuals_cloze"])


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model is a Linear.*expected a PreTrainedModel or a directory"):
        evaluate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not a directory; expected one that save_pretrained has written"):
        evaluate(tmp_path / "none")
