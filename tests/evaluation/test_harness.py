import json
import math
import random
import sys

import numpy as np
import pytest
import torch

from hf_compress.evaluation import harness
from hf_compress.evaluation.harness import TASK_PACK, read_task_file, run_tasks


def slow_accuracy(model, tokenizer, questions):
    """The share of questions whose right choice is the likeliest, one choice at a time."""
    right = 0
    for question in questions:
        start = len(tokenizer(question["context"])["input_ids"])
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(question["context"] + " " + choice)["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids))))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(questions)


def test_scores_are_those_of_the_definition(model, tokenizer, task_folder, questions):
    results = run_tasks(model, tokenizer, "tiny_cloze", include_path=task_folder)
    accuracy = slow_accuracy(model, tokenizer, questions)
    assert 0 < accuracy < 1  # otherwise a constant would pass
    metrics = results["results"]["tiny_cloze"]
    assert metrics["acc,none"] == pytest.approx(accuracy)
    error = math.sqrt(accuracy * (1 - accuracy) / (len(questions) - 1))
    assert metrics["acc_stderr,none"] == pytest.approx(error)


def test_a_padding_token_without_an_embedding(model, tokenizer, task_folder):
    """Added to the tokenizer alone: lm-eval takes another."""
    expected = run_tasks(model, tokenizer, "tiny_cloze", include_path=task_folder)["results"]
    assert harness._padding(tokenizer, model).pad_token_id == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert harness._padding(tokenizer, model).pad_token_id is None
    assert run_tasks(model, tokenizer, "tiny_cloze", include_path=task_folder)["results"] == expected
    assert tokenizer.pad_token == "[PAD]"


def test_the_models_own_files_are_written(model, tokenizer, task_folder, tmp_path):
    results = run_tasks(model, tokenizer, ["tiny_cloze"], include_path=[task_folder], limit=5, output_dir=tmp_path)
    [file] = (tmp_path / "LlamaForCausalLM").glob("results_*.json")
    written = json.loads(file.read_text())
    assert written["results"]["tiny_cloze"]["acc,none"] == results["results"]["tiny_cloze"]["acc,none"]
    [samples] = (tmp_path / "LlamaForCausalLM").glob("samples_tiny_cloze_*.jsonl")
    assert len(samples.read_text().splitlines()) == 5


def test_files_that_cannot_be_written_are_an_error(model, tokenizer, task_folder, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="lm-eval wrote 0 of 2 result files"):
        run_tasks(model, tokenizer, "tiny_cloze", include_path=task_folder, limit=2, output_dir=tmp_path / "out")


def test_leaves_everything_as_it_was(model, tokenizer, task_folder, capfd, caplog):
    model.train()
    tokenizer.pad_token = None
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    run_tasks(model, tokenizer, "tiny_cloze", include_path=task_folder, limit=2, seed=7)
    assert model.training
    assert tokenizer.pad_token is None
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert (torch.get_rng_state() == states[2]).all()
    assert "it/s" not in capfd.readouterr().err  # progress bars stay off what is not a terminal
    assert "already-initialized model" not in caplog.text


def test_what_is_not_a_progress_bar_passes_through(capsys):
    with harness._no_bars_off_terminal():
        print("before", file=sys.stderr)
        sys.stderr.write("\r 50%|#####     |")
        sys.stderr.write("\n")
        print("after", file=sys.stderr)
    assert capsys.readouterr().err == "before\nafter\n"


def test_the_task_pack_is_found_from_any_directory(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.config.max_position_embeddings = 512
    results = run_tasks(model, tokenizer, ["manuals_cloze"], limit=2)
    found = set(results["results"]["manuals_cloze"])
    assert {"acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"} <= found
    assert results["n-samples"]["manuals_cloze"] == {"original": 500, "effective": 2}
    assert len(read_task_file("manuals_cloze/manuals_cloze.jsonl", version=1.0)["test"]) == 500


def test_own_tasks_do_not_wait_for_lm_evals(task_folder):
    manager = harness._task_manager(["manuals_cloze", "tiny_cloze"], [TASK_PACK, task_folder])
    assert manager.all_tasks == ["manuals_cloze", "tiny_cloze"]


@pytest.mark.slow
def test_an_unknown_task_is_named_beside_what_there_is(model, tokenizer, task_folder):
    with pytest.raises(ValueError, match=r"Unknown tasks \['hellaswog'\].*'manuals_cloze', 'tiny_cloze'.*'hellaswag'"):
        run_tasks(model, tokenizer, ["tiny_cloze", "hellaswog"], include_path=task_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "tasks is empty.*manuals_cloze"),
        ({"include_path": "no/such/folder"}, "'no/such/folder' is not a folder"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"limit": 0}, "limit is 0; expected"),
        ({"limit": 2.5}, "limit is 2.5; expected"),
    ],
)
def test_bad_arguments(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_tasks(model, tokenizer, **{"tasks": ["manuals_cloze"], **arguments})


def test_without_lm_eval_the_error_says_what_to_install(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install hf-compress\[evaluation\]"):
        run_tasks(model, tokenizer, ["manuals_cloze"])
