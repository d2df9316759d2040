"""`hf-compress sweep`: a folder with the table, the picture and the models, and what it refuses."""

import csv
import json

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.command_line import done, refused
from tests.helpers.language import words

METHODS = "drop_blocks,illc:tokens=200"


@pytest.fixture(scope="module")
def held_out(home):
    path = home / "held out.jsonl"
    path.write_text("".join(json.dumps({"text": words(20, seed)}) + "\n" for seed in range(50, 58)))
    return str(path)


@pytest.fixture
def arguments(model_folder, text_file, held_out, tmp_path):
    places = ("sweep", model_folder, "--output", str(tmp_path / "swept"), "--methods", METHODS)
    return (*places, "--calibration", text_file, "--texts", held_out, "--limit", "4", "--no-speed")


def rows(folder):
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_a_sweep_leaves_and_goes_on_from(arguments, model_folder, tmp_path):
    output = tmp_path / "swept"
    text = done(*arguments, "--ratios", "0.34", "--best", "1")
    names = [row["name"] for row in rows(output)]
    assert {"drop_blocks ratio=0.34", "illc tokens=200 ratio=0.34"} < set(names)
    assert len(names) == 4  # with the original, and the control
    assert (output / "sweep.png").stat().st_size > 1000
    assert "Wrote sweep.csv, sweep.json and sweep.png into" in text
    (saved,) = (output / "models").iterdir()
    original = AutoModelForCausalLM.from_pretrained(model_folder)
    assert AutoModelForCausalLM.from_pretrained(saved).num_parameters() < original.num_parameters()
    before = rows(output)
    done(*arguments, "--ratios", "0.34,0.5", "--no-controls")
    after = {row["name"]: row for row in rows(output)}
    assert {"drop_blocks ratio=0.5", "illc tokens=200 ratio=0.5"} < set(after)
    again = [row for row in before if row["name"] in after]
    assert len(again) == 3
    assert all(after[row["name"]] == row for row in again)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ratios", "a half"), "--ratios takes numbers in (0, 1), with commas between; got 'a half'"),
        (("--ratios", ","), "a sweep needs --methods and --ratios: one of each, at least"),
        (("--methods", ""), "a sweep needs --methods and --ratios: one of each, at least"),
        (("--methods", "ilcl"), "ilcl"),
        (("--ratios", "1.5"), "1.5"),
    ],
)
def test_what_is_refused_before_any_work(arguments, tmp_path, more, message):
    assert message in refused(*arguments, *more)
    assert not (tmp_path / "swept").exists()


def test_there_has_to_be_something_to_measure_and_other_texts_to_calibrate_by(model_folder, text_file, tmp_path):
    places = ("sweep", model_folder, "--output", str(tmp_path / "swept"), "--calibration", text_file)
    assert "say what to measure: --texts, --tasks or --labelled" in refused(*places)
    assert "give other texts" in refused(*places, "--texts", text_file)
