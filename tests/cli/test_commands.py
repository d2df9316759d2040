"""The command line: what it prints, writes, and exits with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.cli.reference import MODEL, REFERENCE
from hf_compress.cli.settings import config_from
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.methods.illc import ILLCConfig
from hf_compress.methods.mka import MKAConfig
from hf_compress.report.markdown import human_bytes
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import narrow_ffn
from hf_compress.storage.save import save
from tests.helpers.command_line import LAST, done, refused, run
from tests.helpers.language import tiny_llama
from tests.helpers.tiny import tiny_kind

COMMANDS = ("compress", "analyze", "evaluate", "info", "report", "verify", "push", "demo", "methods")


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda c: " ".join(c) or "all")
def test_help_imports_nothing_slow(command):
    code = (
        "import sys; from hf_compress.cli import main\n"
        f"sys.argv = ['hf-compress', *{command!r}, '--help']\n"
        "try:\n    main()\nfinally:\n"
        "    print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    before = os.times().children_user
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert os.times().children_user - before < 2  # of its own, whatever else runs
    assert printed.splitlines()[-1] == "[]"
    assert "Usage: hf-compress" in printed


def test_methods_are_listed_with_papers_and_settings():
    shown = done("methods")
    for part in ("mka", "drop_blocks", "arxiv.org/abs/2406.16330", "num_merges", "share of the blocks to merge away"):
        assert part in shown


# --- compress ---------------------------------------------------------------------------------------------------------


def test_compress_saves_a_model_that_plain_transformers_loads(model_folder, text_file, tmp_path):
    output = tmp_path / "small"
    shown = done("compress", model_folder, "--ratio", "0.34", "--calibration", text_file, "--output", output)
    assert "MergeBlocks" in shown
    assert f'AutoModelForCausalLM.from_pretrained("{output}")' in shown.replace("\n", "")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert len(model.model.layers) == 4
    assert (output / "tokenizer.json").exists()
    assert json.loads((output / "compression_report.json").read_text())["stages"][0]["method"] == "mka"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_plan_shows_edits_and_sizes_and_writes_nothing(model_folder, text_file, tmp_path):
    output, before = tmp_path / "small", sorted(Path(model_folder).iterdir())
    arguments = ("--method", "drop_blocks", "--num", "2", "--calibration", text_file, "--output", output)
    shown = done("compress", model_folder, *arguments, "--plan")
    dense = tiny_llama(6)
    left = dense.num_parameters() - 2 * sum(p.numel() for p in dense.model.layers[0].parameters())
    for part in ("RemoveBlocks", f"{dense.num_parameters():,}", f"{left:,}", f"{4 * left:,}", "nothing was written"):
        assert part in shown
    assert list(tmp_path.iterdir()) == []
    assert sorted(Path(model_folder).iterdir()) == before


@pytest.mark.parametrize("method", ["mka", "illc", "lrp", "layer_collapse", "adaptive_compress", "drop_blocks"])
def test_dry_run_says_what_it_would_take_and_does_nothing(method, model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.api.one_method.plan_for", None)
    arguments = ("--method", method, "--ratio", "0.5", "--calibration", text_file, "--output", tmp_path / "small")
    told = done("compress", model_folder, *arguments, "--dry-run")
    assert re.search(r"time: about \d+\.\d s, for \d+\.\d passes over the data", told)
    assert "memory: about" in told
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_killed_goes_on_only_when_asked(model_folder, text_file, tmp_path, monkeypatch):
    output, left = tmp_path / "small", tmp_path / "small.partial"
    command = ("compress", model_folder, "--method", "illc", "--ratio", "0.5", "--calibration", text_file)
    command = (*command, "--max-memory", "1GiB", "--output", output)
    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.storage.save.save", interrupted)
        result = run(*command)
    assert result.exit_code == 130
    assert f"What is finished is kept in {left}: the same" in " ".join(result.stderr.split())
    assert "delete it" in refused(*command)
    assert "settings: seed was 0 and is 1" in refused(*command, "--set", "seed=1", "--resume")
    solved = len(list((left / "results").iterdir()))
    with monkeypatch.context() as patched:
        patched.setattr("hf_compress.methods.base.narrowing.Narrowing._plan", interrupted)
        done(*command, "--resume")
    assert solved == 6
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert (
        AutoModelForCausalLM.from_pretrained(output).config.intermediate_size < tiny_llama(6).config.intermediate_size
    )


def test_what_is_none_of_a_run_s_is_never_deleted(model_folder, text_file, tmp_path):
    """Neither what was in a workdir before, nor a model that is saved in one."""
    (tmp_path / "thesis.txt").write_text("all of it")
    command = ("compress", model_folder, *LAST, "--num", "1", "--calibration", text_file, "--workdir", tmp_path)
    assert "lie one in the other" in refused(*command, "--output", tmp_path / "small")
    assert "lie one in the other" in refused(*command[:-1], tmp_path / "out" / "work", "--output", tmp_path / "out")
    assert "holds thesis.txt" in refused(*command, "--plan", "--resume")
    assert "no such directory" in refused("compress", "./no model", *command[2:], "--plan", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "work").mkdir()
    done(*command[:-1], tmp_path / "work", "--output", tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "thesis.txt"]


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_budget_leaves_the_model_on_the_disk_and_the_result_the_same(model_folder, text_file, tmp_path):
    command = (
        "compress",
        model_folder,
        "--method",
        "lrp",
        "--set",
        "bits=6",
        "--set",
        "group_size=16",
        "--calibration",
        text_file,
    )
    done(*command, "--output", tmp_path / "one")
    done(*command, "--output", tmp_path / "two", "--max-memory", "1GiB", "--workdir", tmp_path / "work")
    names = [path.name for path in (tmp_path / "one").glob("*.safetensors")]
    assert [(tmp_path / "one" / n).read_bytes() for n in names] == [(tmp_path / "two" / n).read_bytes() for n in names]
    assert "takes about" in refused(*command, "--output", tmp_path / "three", "--max-memory", "1KB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_method_without_data_needs_no_calibration(model_folder):
    assert "left out: 3–5" in done("compress", model_folder, *LAST, "--ratio", "0.5", "--plan")


def test_an_output_that_exists_is_refused_at_once_and_replaced_on_request(model_folder, tmp_path):
    (tmp_path / "mine").write_text("keep")
    arguments = ("compress", model_folder, *LAST, "--num", "1")
    assert "exists and is not empty" in refused(*arguments, "--output", tmp_path)
    assert (tmp_path / "mine").read_text() == "keep"
    done(*arguments, "--output", tmp_path, "--overwrite")
    assert not (tmp_path / "mine").exists()
    assert (tmp_path / "config.json").exists()


def test_the_seed_is_the_method_s(model_folder):
    arguments = ("--method", "drop_blocks", "--num", "2", "--set", "criterion=random", "--plan")
    outputs = [done("compress", model_folder, *arguments, "--seed", seed) for seed in "0012"]
    runs = [re.findall("left out: ([0-9, –]+)", output)[0] for output in outputs]
    assert runs[0] == runs[1]
    assert len(set(runs)) > 1


def test_no_command_imports_what_only_training_needs(model_folder, text_file):
    """PEFT comes with Transformers' Trainer, and bitsandbytes with PEFT; it warns of what nobody has asked for."""
    compress = ("compress", model_folder, "--method", "drop_blocks", "--num", "1", "--calibration", text_file)
    lines = [
        (*compress, "--plan"),
        ("analyze", model_folder, "--calibration", text_file),
        ("evaluate", model_folder, "--texts", text_file),
        ("info", model_folder),
        ("methods",),
    ]
    code = (
        "import sys; from typer.testing import CliRunner; from hf_compress.cli import app\n"
        f"codes = [CliRunner().invoke(app, line).exit_code for line in {lines!r}]\n"
        "print(codes, [name for name in ('peft', 'bitsandbytes', 'transformers.trainer') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[0, 0, 0, 0, 0] []"


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        MKAConfig(num_merges=3, variant="paper", similarity="cka", alpha=0.25, iterative=False, bandwidth=1e-5),
        DropBlocksConfig(ratio=0.4, criterion="random", seed=7, stack="model.layers"),
    ],
    ids=["mka", "drop_blocks"],
)
def test_a_recipe_says_all_that_a_config_says(config, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for text in (yaml.safe_dump(config.to_dict()), config.to_json()):
        recipe.write_text(text)
        assert config_from(None, recipe) == config


OURS = "method: mka\nratio: 0.5\nvariant: paper\nalpha: 0.1\n"


@pytest.mark.parametrize(
    ("recipe", "method", "options", "expected"),
    [
        (OURS, None, {"num": 2}, MKAConfig(num_merges=2, variant="paper", alpha=0.1)),
        (OURS, None, {"ratio": 0.2, "settings": ["alpha=1e-3"]}, MKAConfig(ratio=0.2, variant="paper", alpha=0.001)),
        (OURS, None, {"settings": ["alpha=null", "num_merges=1"]}, MKAConfig(num_merges=1, variant="paper")),
        ("method: illc\ngamma: 0.5\n", None, {"ratio": 0.25}, ILLCConfig(ratio=0.25)),
        ("ratio: 0.5\n", "drop_blocks", {"seed": 3}, DropBlocksConfig(ratio=0.5, seed=3)),
    ],
)
def test_options_win_over_the_recipe(recipe, method, options, expected, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert config_from(method, tmp_path / "recipe.yaml", **options) == expected


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", "1.5"), "--ratio must be a number in (0, 1) (share of the blocks to merge away); got 1.5"),
        (("--ratio", "0.5", "--num", "2"), "give --ratio or --num, only one of them; got --ratio 0.5 and --num 2"),
        ((), "say how much to merge"),
        (("--method", "magic"), "unknown method 'magic'; known are adaptive_compress, "),
        (("--method", "LayerColapse"), "unknown method 'LayerColapse' (did you mean 'layer_collapse'?)"),
        (("--method", "Layer-Collapse", "--ratio", "1.5"), "--ratio must be a number in (0, 1)"),
        (("--ratio", "0.5", "--set", "variannt=paper"), "did you mean 'variant'?"),
        (("--ratio", "0.5", "--set", "variant"), "--set takes field=value"),
        (("--ratio", "0.5", "--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--ratio", "0.5", "--calibration", "nowhere.jsonl"), "nowhere.jsonl: no such file or folder"),
        (("--ratio", "0.5"), "needs calibration data"),
        (("--ratio", "0.5", "--dtype", "int3"), "--dtype must be one of auto, float32"),
        (("--num", "6", "--calibration", "TEXTS"), "--num 6 takes 6 of 6 blocks and leaves none"),
        (("--num", "1", "--calibration", "TEXTS", "--samples", "3"), "3 calibration samples are too few"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, model_folder, text_file, tmp_path):
    given = [text_file if argument == "TEXTS" else argument for argument in arguments]
    assert message in refused("compress", model_folder, "--output", tmp_path / "out", *given)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_comes_from(model_folder):
    result = run("--debug", "compress", model_folder, "--ratio", "1.5", "--plan")
    assert isinstance(result.exception, ValueError)


def test_an_interruption_exits_with_130_and_leaves_nothing_half_written(model_folder, text_file, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_compress.storage.save.verify", interrupted)  # the files are written by then
    arguments = ("--method", "drop_blocks", "--num", "1", "--calibration", text_file, "--output", tmp_path / "out")
    result = run("compress", model_folder, *arguments)
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"], "by which --resume goes on"


# --- looking ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(model_folder, tmp_path):
    done("compress", model_folder, *LAST, "--num", "2", "--output", tmp_path / "small")
    return tmp_path / "small"


def test_info_says_what_was_done_and_checks_it(small, model_folder):
    shown = done("info", small)
    for part in ("left out: 4–5", "criterion=last", "stored:", "a plain checkpoint", "parity check passed"):
        assert part in shown
    assert "no compression report" in done("info", model_folder)


def test_info_shows_the_record_of_a_model_that_needs_the_plugin(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    apply(narrow_ffn(Anatomy(model).block(1), range(8)), model)
    shown = done("info", save(model, tmp_path / "narrow"))
    for part in ("loads with `import hf_compress`", "NarrowFFN", "model.layers.1", "8 hidden units", "check passed"):
        assert part in shown


def test_verify_reads_every_file(small):
    assert re.search(r"^\d+ files are as they were written", done("verify", small))
    with (small / "config.json").open("a") as file:
        file.write(" ")
    assert "config.json was changed" in refused("verify", small)


def test_push_says_that_it_is_offline(small):
    line = refused("push", small, "me/small")
    assert re.search("pushing to me/small failed: .*(no token|HF_HUB_OFFLINE)", line)


def test_info_fails_where_weights_are_missing_or_the_report_is_another_s(small):
    report = small / "compression_report.json"
    content = json.loads(report.read_text())
    content["stages"][0]["after"] = {"parameters": 3, "bytes": 4, "blocks": {"model.layers": 1}}
    report.write_text(json.dumps(content))
    result = run("info", small)
    assert (result.exit_code, "the report speaks of 3 parameters" in result.stdout) == (1, True)
    report.write_text("{}")
    refused("info", small)
    report.unlink()
    weights = load_file(small / "model.safetensors")
    weights.pop("model.layers.0.mlp.down_proj.weight")
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    result = run("info", small)
    assert (result.exit_code, "model.layers.0.mlp.down_proj.weight" in result.stdout) == (1, True)


def test_analyze_prints_and_writes_a_picture(model_folder, text_file, tmp_path):
    shown = done("analyze", model_folder, "--calibration", text_file, "--output", tmp_path / "look")
    assert "similarity to next" in shown
    assert "what would be taken out" in shown
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == ["analysis.json", "similarity.png"]


def test_evaluate_measures_perplexity_and_writes_json(model_folder, text_file, tmp_path):
    assert "perplexity" in done("evaluate", model_folder, "--texts", text_file, "--limit", "4", "--output", tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["perplexity"]["documents"] == 4


OTHER_MODELS = {
    "classifier": (transformers.BertForSequenceClassification, "bert"),
    "masked": (transformers.BertForMaskedLM, "bert"),
    "images": (transformers.ViTForImageClassification, "vit"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_evaluate_takes_the_head_that_was_saved(kind, text_file, tmp_path):
    model = tiny_kind(*OTHER_MODELS[kind])
    model.save_pretrained(tmp_path)
    for metric in (("--texts", text_file), ("--tasks", "manuals_cloze")):
        assert type(model).__name__ in refused("evaluate", tmp_path, *metric)
        assert not run("evaluate", tmp_path, *metric).stdout
    shown = done("evaluate", tmp_path)
    assert f"{model.num_parameters():,}" in shown
    assert ("tokens/s" in shown) is (kind != "images")


def test_a_second_change_on_the_command_line_tells_the_first(small, tmp_path):
    shown = done("compress", small, *LAST, "--num", "1", "--output", small, "--overwrite")
    assert "1. drop_blocks" in shown
    assert "2. drop_blocks" in shown
    assert "2. drop_blocks" in (small / "README.md").read_text()
    shown = done("info", small)
    for part in ("left out: 4–5", "left out: 3", "original"):
        assert part in shown


def test_sizes_are_written_for_people():
    assert [human_bytes(n) for n in (12, 21_901_824, 3 * 10**12)] == ["12 bytes", "21.9 MB", "3.0 TB"]


# --- demo -------------------------------------------------------------------------------------------------------------


def test_the_demo_outside_of_a_clone_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_compress.cli.reference.REFERENCE", tmp_path / "nowhere")
    assert "clone of the repository, and run `make demo`" in refused("demo", "--output", tmp_path / "out")


@pytest.mark.slow
def test_the_demo_beats_its_controls(tmp_path):
    shown = done("demo", "--quick", "--output", tmp_path / "out")
    assert "bit for bit" in shown
    lines = [line for line in shown.splitlines() if "±" in line]
    perplexities = [float(line.split("│")[4].split("±")[0]) for line in lines]
    assert len(perplexities) == 5
    assert perplexities[0] < perplexities[1] == min(perplexities[1:])
    dense = AutoModelForCausalLM.from_pretrained(REFERENCE / MODEL)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (len(dense.model.layers), len(loaded.model.layers)) == (12, 9)
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "setting", "name", "expected"),
    [
        ("AdaptiveCompress", "layers=2,5", "layers", (2, 5)),
        ("adaptive-compress", "layers=3", "layers", (3,)),
        ("adaptive_compress", "layers=[2, 5]", "layers", (2, 5)),
        ("LRP", "pattern=1,2", "pattern", (1, 2)),
    ],
)
def test_lists_are_written_with_commas(method, setting, name, expected):
    more = ["granularity=n:m"] if method == "LRP" else []
    assert getattr(config_from(method, settings=[setting, *more]), name) == expected
