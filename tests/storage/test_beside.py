"""What lies beside a model that is saved over itself: nothing is lost without a word."""

import logging

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_compress import DropBlocksConfig, compress, save, verify_files
from hf_compress.report.report import REPORT_FILE

DROP = DropBlocksConfig(num_blocks=1, criterion="last")
MINE = "---\nlicense: mit\n---\n\nWritten by hand.\n"


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    return save(compress(model, DROP), tmp_path / "small", tokenizer)


def over_itself(folder, change=lambda model: None, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    return save(model, folder, overwrite=True, **kwargs)


def test_card_and_report_are_there_again(folder, tokenizer):
    names = ("README.md", REPORT_FILE)
    before = [(folder / name).read_text() for name in names]
    over_itself(folder, tokenizer=tokenizer)
    assert [(folder / name).read_text() for name in names] == before
    assert verify_files(folder)


def test_a_copy_elsewhere_gets_them_too(folder, tmp_path):
    copy = save(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "copy")
    assert (copy / REPORT_FILE).read_text() == (folder / REPORT_FILE).read_text()
    assert 'from_pretrained("path/to/copy")' in (copy / "README.md").read_text()


def test_a_card_that_was_edited_stays(folder, model):
    (folder / "README.md").write_text(MINE)
    over_itself(folder)
    assert (folder / "README.md").read_text() == MINE
    save(model, folder, overwrite=True)  # which has just been made, and was saved there
    assert (folder / "README.md").read_text() == MINE
    over_itself(folder, card=ModelCard("---\nlicense: mit\n---\n\nAnother.\n"))
    assert "Another." in (folder / "README.md").read_text()


def test_a_change_gets_a_new_card_and_says_so(folder, caplog):
    (folder / "README.md").write_text(MINE)
    with caplog.at_level(logging.WARNING):
        over_itself(folder, lambda model: compress(model, DROP))
    assert "README.md is replaced by a new card" in caplog.text
    assert "2. drop_blocks" in (folder / "README.md").read_text()


def test_a_model_of_another_size_than_the_card_says_gets_a_new_one(folder):
    save(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), folder, overwrite=True)
    assert "most are bfloat16" in (folder / "README.md").read_text()


@pytest.mark.parametrize("report", [None, '{"version": 99}'], ids=["none", "of another version"])
def test_without_a_history_what_lies_there_stays(model, tmp_path, report):
    folder = save(model, tmp_path / "plain")
    (folder / "README.md").write_text(MINE)
    if report is not None:
        (folder / REPORT_FILE).write_text(report)
    over_itself(folder)
    assert (folder / "README.md").read_text() == MINE
    assert (folder / REPORT_FILE).exists() is (report is not None)
    assert verify_files(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert not {"README.md", REPORT_FILE} & {path.name for path in save(again, tmp_path / "copy").iterdir()}


def test_a_report_of_what_the_model_was_goes_and_the_card_stays(folder, caplog):
    (folder / "README.md").write_text(MINE)
    over_itself(folder, lambda model: model.resize_token_embeddings(70, mean_resizing=False))
    assert "its history is not known" in caplog.text
    assert (folder / "README.md").read_text() == MINE
    assert not (folder / REPORT_FILE).exists()


def test_another_model_does_not_get_the_card_that_lay_there(folder, make_llama):
    save(make_llama(3), folder, overwrite=True)
    assert not (folder / "README.md").exists()
