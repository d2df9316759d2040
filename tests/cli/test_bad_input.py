"""Whatever is wrong on the command line: one line that names it, exit code 2, nothing written."""

import json
import shutil
from typing import get_args, get_type_hints

import pytest
import typer

from hf_compress.cli import app
from tests.helpers import command_line

COMMANDS = typer.main.get_command(app).commands
DROP = ("--method", "drop_blocks", "--num", "1")


def refused(home, *arguments):
    """The line with which a command refuses its arguments; HOME in them stands for the folder. Nothing is written."""
    before = sorted(home.rglob("*"))
    line = command_line.refused(*(argument.replace("HOME", str(home)) for argument in arguments))
    assert sorted(home.rglob("*")) == before
    return line.replace(str(home), "HOME")


REQUIRED = {"compress": ("HOME/model",), "analyze": ("HOME/model", "--calibration", "HOME/texts.jsonl")}
REQUIRED |= dict.fromkeys(("evaluate", "info", "report", "verify"), ("HOME/model",)) | {
    "export": ("HOME/model", "--to", "dense", "--output", "HOME/exported"),
    "push": ("HOME/model", "me/small"),
    "sweep": ("HOME/model", "--output", "HOME/swept", "--texts", "HOME/texts.jsonl"),
}
HINTS = {command.callback.__name__: get_type_hints(command.callback) for command in app.registered_commands}
NUMBERS = [
    (command, parameter.opts[0])
    for command in COMMANDS
    for parameter in COMMANDS[command].params
    if {int, float} & {HINTS[command][parameter.name], *get_args(HINTS[command][parameter.name])}
]


def test_there_are_numbers_among_the_options():
    assert len(NUMBERS) >= 10


@pytest.mark.parametrize(("command", "option"), NUMBERS)
@pytest.mark.parametrize("value", ["x", "-1", "0", "nan"])
def test_numbers(command, option, value, home):
    if (option, value) == ("--seed", "0"):
        return
    if command == "compress":
        amount = () if option in ("--ratio", "--num") else ("--num", "1")
        arguments = ("--method", "drop_blocks", "--set", "criterion=random", "--plan", *amount)
    else:
        arguments = ()
    assert option in refused(home, command, *REQUIRED.get(command, ()), *arguments, option, value)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_no_command_has(command, home):
    assert "--zzz" in refused(home, command, *REQUIRED.get(command, ()), "--zzz")
    if command != "evaluate":  # which takes any number of models
        assert f"{command} --help" in refused(home, command, *REQUIRED.get(command, ()), "too", "much", "to ask")


def test_what_is_left_out(home):
    for command in REQUIRED:
        assert "Missing argument" in refused(home, command)
    assert "--calibration" in refused(home, "analyze", "HOME/model")
    assert "zzz" in refused(home, "zzz")
    assert "--zzz" in refused(home, "--zzz")


def _config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def _file(name, content):
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_bytes(content) and None


def _without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


BROKEN = {
    "no JSON": (_file("config.json", b"{"), "not a valid JSON file"),
    "a list": (_file("config.json", b"[]"), "does not load"),
    "no type": (_config(model_type=None), "does not load"),
    "another type": (_config(model_type="zzz"), "model type `zzz`"),
    "a word for a number": (_config(num_hidden_layers="four"), "expected int, got str"),
    "heads that do not fit": (_config(num_attention_heads=3), "does not load"),
    "another activation": (_config(hidden_act="zzz"), "does not load: KeyError: 'zzz'"),
    "another dtype": (_config(dtype="zzz"), "does not load"),
    "another class": (_config(architectures=["pipeline"]), "the class pipeline"),
    "no class": (_config(architectures=5), "the class 5"),
    "fewer words": (_config(vocab_size=9), "such as lm_head.weight"),
    "a record of later": (
        _config(quantization_config={"quant_method": "hf_compress", "version": 99, "plan": []}),
        "does not load: this plan has version 99",
    ),
    "no weights": (_file("model.safetensors", None), "does not load"),
    "cut weights": (_file("model.safetensors", b"abcdefghijklmnop"), "does not load: SafetensorError"),
    "empty weights": (_file("model.safetensors", b""), "does not load: SafetensorError"),
    "no tokenizer": (_without_tokenizer, "no tokenizer that loads, and texts need one"),
    "a broken tokenizer": (_file("tokenizer.json", b"{"), "no tokenizer that loads, and texts need one"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_models(kind, home, tmp_path):
    change, message = BROKEN[kind]
    folder = shutil.copytree(home / "model", tmp_path / "broken")
    change(folder)
    texts = ("--calibration", "HOME/texts.jsonl")
    for arguments in (("compress", str(folder), *DROP, *texts, "--plan"), ("analyze", str(folder), *texts)):
        line = refused(home, *arguments)
        assert message in line
        assert str(folder) in line
    assert str(folder) in refused(home, "evaluate", str(folder), "--texts", "HOME/texts.jsonl", "--limit", "3")


@pytest.mark.parametrize("command", ["compress", "analyze", "evaluate", "info", "report", "verify", "push"])
@pytest.mark.parametrize("name", ["HOME/nowhere", "HOME/an empty folder", "HOME/a file", "no such name"])
def test_no_models(command, name, home):
    more = {"compress": (*DROP, "--plan"), "analyze": ("--calibration", "HOME/texts.jsonl"), "push": ("me/small",)}
    assert name in refused(home, command, name, *more.get(command, ()))


TEXTS = {
    "empty.jsonl": (b"", "holds no texts"),
    "empty.txt": (b"\n \n", "holds no texts"),
    "empty.csv": (b"", "cannot be read"),
    "no.jsonl": (b'hello\n{"a"\n', "cannot be read"),
    "no.json": (b"{", "cannot be read"),
    "no.parquet": (b"hello", ""),
    "no.txt": (b"\xff\xfe", "is not UTF-8 text"),
    "other.xyz": (b"hello", "not from '.xyz'"),
    "numbers.jsonl": (b'{"text": 1}\n', "not a text"),
    "columns.jsonl": (b'{"a": "x", "b": "y"}\n', "name the one with the texts by --text-column"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_none(name, home, tmp_path):
    content, message = TEXTS[name]
    path = tmp_path / name
    path.write_bytes(content)
    model = "HOME/model"
    for arguments in (
        ("compress", model, *DROP, "--plan", "--calibration", str(path)),
        ("analyze", model, "--calibration", str(path)),
        ("evaluate", model, "--texts", str(path)),
    ):
        line = refused(home, *arguments)
        assert message in line
        assert name in line or name == "no.parquet"


@pytest.mark.parametrize("source", ["HOME/nowhere.jsonl", "HOME/an empty folder", "a:b:c:d", "no such name"])
def test_texts_that_are_not_there(source, home):
    assert source in refused(home, "compress", "HOME/model", *DROP, "--plan", "--calibration", source)
    assert source in refused(home, "analyze", "HOME/model", "--calibration", source)
    assert source in refused(home, "evaluate", "HOME/model", "--texts", source)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "cpu:x", ""])
def test_devices(device, home):
    for command in ("compress", "analyze", "info"):
        assert f"--device must be one that PyTorch computes on here, such as cpu; got {device!r}" in refused(
            home, command, *REQUIRED[command], "--device", device
        )


@pytest.mark.parametrize(
    "output", ["HOME/a file", "HOME/a file/below", "/dev/null/x", pytest.param("/proc/x", id="no folder to write in")]
)
def test_places_that_cannot_be_written_are_told_before_any_work(output, home, monkeypatch):
    def working(*_, **__):
        raise AssertionError("work has begun")

    monkeypatch.setattr("hf_compress.calibration.files.load_texts", working)
    for command in ("compress", "analyze", "evaluate"):
        texts = ("--texts" if command == "evaluate" else "--calibration", "HOME/texts.jsonl")
        more = DROP if command == "compress" else ()
        assert output.split("/x")[0] in refused(home, command, "HOME/model", *texts, *more, "--output", output)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (b"[", "is not YAML"),
        (b"[1]", "a recipe is a mapping"),
        (b"", "a recipe is a mapping"),
        (b"1: 2", "a recipe is a mapping, 'method' and its fields; got the fields [1]"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"method: zzz", "unknown method 'zzz'"),
        (b"method: mka\nnum_merges: {a: 1}", "--num must be a whole number"),
        (b"method: mka\nnum_merges: 1\niterative: nope", "iterative must be True or False"),
        (b"method: mka\nnum_merges: 1\nstack: 5", "stack must be a string"),
        (b"method: illc", "say how much: --ratio, or --set gamma=… or --set width=… to keep; for attention, "),
        (b"method: mka\ngamma: 0.5", "mka has no setting 'gamma' (say how much by --ratio or --num)"),
    ],
)
def test_recipes(recipe, message, home, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(recipe)
    line = refused(home, "compress", "HOME/model", "--plan", "--recipe", str(tmp_path / "recipe.yaml"))
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("push", "HOME/model", "a/b/c"), "REPO_ID must be 'name' or 'namespace/name'"),
        (
            ("push", "HOME/model", "me/x", "--pull-request", "--revision", "z"),
            "leave --revision z out, or --pull-request",
        ),
        (("push", "HOME/model", "me/x", "--message", ""), "--message is empty"),
        (("compress", "any", "--ratio", "0.5"), "--output DIR; or --plan or --dry-run"),
        (("analyze", "HOME/model", "--calibration", "HOME/texts.jsonl", "--similarity", "zzz"), "--similarity must be"),
        (("evaluate", "HOME/model", "--include-path", "HOME/a file", "--tasks", "zzz"), "--include-path"),
    ],
)
def test_what_single_commands_refuse(arguments, message, home):
    assert message in refused(home, *arguments)
