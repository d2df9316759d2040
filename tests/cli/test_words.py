"""Messages that speak of parameters as Python does, in the words of each command."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer

import hf_compress
from hf_compress.cli import app
from hf_compress.cli.words import in_its_words, unloadable
from hf_compress.methods.base.settings import config_class, method_names

COMMANDS = typer.main.get_command(app).commands
SETTINGS = {field.name for name in method_names() for field in fields(config_class(name))}


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("compress", "pass calibration=, such as texts", "pass --calibration, such as texts"),
        ("compress", "choose another, or pass overwrite=True", "choose another, or pass --overwrite"),
        ("compress", "save with portable=False", "save with --no-portable"),
        ("compress", "load it with dtype=torch.bfloat16, or not", "load it with --dtype bfloat16, or not"),
        ("compress", "by text_column= (got 'body')", "by --text-column (got 'body')"),
        ("compress", "batch_size must be 1; got 0", "--batch-size must be 1; got 0"),
        ("compress", "ratio must lie in (0, 1); got 2", "--ratio must lie in (0, 1); got 2"),
        ("compress", "num_merges=6 takes 6 of 6", "--num 6 takes 6 of 6"),
        ("compress", "num_layers must be at least 1", "--num must be at least 1"),
        ("compress", "got ratio=0.5 and num_blocks=None", "got --ratio 0.5 and no --num"),
        ("compress", "gamma= or width=; got gamma=None", "--set gamma=… or --set width=…; got no gamma"),
        ("compress", "leave out allocation='adaptive'", "leave out --set allocation=adaptive"),
        ("compress", "give split=(8, 4), or prune=False", "give --set 'split=[8, 4]', or --set prune=false"),
        ("compress", "compare within layers (scope=); or", "compare within layers (--set scope=…); or"),
        ("analyze", "for similarity='cka' with components=8", "for --similarity cka with components=8"),
        ("evaluate", "no column 'a' for text_columns=; it has b", "no column 'a' for --text-column; it has b"),
        ("push", "create_pr=True opens: leave revision='z' out", "--pull-request opens: leave --revision z out"),
        ("push", "repo_id must be 'a/b'; commit_message is empty", "REPO_ID must be 'a/b'; --message is empty"),
    ],
)
def test_in_the_words_of_a_command(command, message, expected):
    assert in_its_words(message, COMMANDS[command]) == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate", "calibration= is another command's"),
        ("compress", "call Trainer(callbacks=[x]) or load(dtype=float)"),
        ("compress", "/data/seed=0/model.ratio=2: missing"),
        ("compress", "--set takes field=value; got 'ratio=x'"),
        ("compress", "ratio==1 is not"),
        ("compress", "it has ratio, num_blocks, criterion"),
        ("compress", "the model has no output for this device"),
        ("compress", "model.layers.0.max_length is gone"),
    ],
)
def test_what_only_looks_like_a_parameter_stays(command, message):
    """Calls, paths, quotations, comparisons, names in a list, words of prose."""
    assert in_its_words(message, COMMANDS[command]) == message


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_known_by_its_parameter(command):
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "option":
            value = "True" if parameter.is_flag else "7"
            words = in_its_words(f"pass {parameter.name}={value}, or not", COMMANDS[command])
            assert words == f"pass {parameter.opts[0]}{'' if parameter.is_flag else ' 7'}, or not"


def test_every_setting_is_known():
    options = {parameter.name for parameter in COMMANDS["compress"].params}
    for name in SETTINGS - options:
        expected = "--num 7" if name.startswith("num_") else f"--set {name}=7"
        assert in_its_words(f"pass {name}=7", COMMANDS["compress"]) == f"pass {expected}"


def test_which_model_did_not_load():
    def from_pretrained(pretrained_model_name_or_path, depth=2):
        if not depth:
            raise KeyError("inner")
        from_pretrained(f"{pretrained_model_name_or_path}-{depth}", depth - 1)

    with pytest.raises(KeyError) as failed:
        from_pretrained("the/model")
    assert unloadable(failed.value) == "the/model"
    with pytest.raises(KeyError) as failed:
        {}["a"]
    assert unloadable(failed.value) is None


def test_no_message_of_the_package_names_an_option_beside_its_parameter():
    """One of both is enough: they are translated."""
    for path in Path(hf_compress.__file__).parent.rglob("*.py"):
        if path.parent.name != "cli":
            assert not re.search(r"=\w* ?\(--|=, or --", path.read_text()), path
