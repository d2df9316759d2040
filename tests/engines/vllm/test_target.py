"""Checkpoints that are held to vLLM: to itself where it is installed, and else to a process that stands in for it."""

import os
import sys
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.engines.agreement import Reference, agreement
from hf_compress.engines.vllm.target import Vllm
from hf_compress.errors import ParityError, UnsupportedModelError
from tests.helpers.engines import CHANGES, fewer_heads, vllm_python, wide_llama
from tests.helpers.linears import lrp, made

# In the place of an interpreter: says that all is installed, and then what Transformers says.
PARROT = """
    import json, sys, torch
    if sys.argv[1] == "-c":
        print({missing!r})
        raise SystemExit
    from hf_compress.engines.agreement import Reference
    from transformers import AutoModelForCausalLM
    import hf_compress
    print("starting", file=sys.stderr)
    {first}
    model = Reference(AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.float32).eval())
    print("{{}}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        words = [[word.token {shift}, word.likeliest] for word in model.say(asked["prompt"], asked["count"])]
        print(json.dumps({{"words": words}}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    """Makes an interpreter that stands in for the one with vLLM."""

    def make(missing="", first="pass", shift=""):
        script, python = tmp_path / "stand_in.py", tmp_path / "python"
        script.write_text(dedent(PARROT).format(missing=missing, first=first, shift=shift))
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        python.chmod(0o755)
        return str(python)

    return make


@pytest.fixture
def saved(tmp_path):
    def make(change="linear", model=None):
        model = model or wide_llama()
        if change == "heads":
            fewer_heads(model)
        elif CHANGES[change] is not None:
            hfc.compress(model, CHANGES[change], torch.randint(2, 250, (16, 24)))
        return hfc.save(model, tmp_path / "model")

    return make


@pytest.mark.parametrize("change", ["linear", "packed"])
def test_what_is_written_is_the_checkpoint(change, stand_in, saved, tmp_path):
    folder = saved(change)
    found = hfc.export(folder, tmp_path / "out", "vllm", python=stand_in())
    assert found.agreement.prompts == 4
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (tmp_path / "out" / "README.md").read_text().startswith("---")
    assert hfc.history_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is not None
    hfc.verify_files(tmp_path / "out")


@pytest.mark.parametrize(
    ("process", "error", "told"),
    [
        ({"missing": " vllm hf-compress"}, ImportError, r"has no vllm, hf-compress: pip install vllm hf-compress"),
        ({"first": "raise SystemExit(1)"}, UnsupportedModelError, r"its process has ended: starting"),
        (
            {"first": "print(json.dumps({'error': 'no such family'})); raise SystemExit(1)"},
            UnsupportedModelError,
            "vLLM cannot run the model: no such family",
        ),
        (
            {"first": "print('{}', flush=True); raise SystemExit(1)"},
            UnsupportedModelError,
            r"its process has ended: starting",
        ),
        ({"shift": "if sys.exit(1) else 0"}, UnsupportedModelError, r"its process has ended: starting"),
        ({"shift": "+ 1"}, ParityError, "vLLM does not say what Transformers says: token 1 after prompt 1"),
    ],
)
def test_nothing_is_left_of_what_vllm_does_not_run(process, error, told, stand_in, saved, tmp_path):
    folder, python = saved(), stand_in(**process)
    with pytest.raises(error, match=told):
        hfc.export(folder, tmp_path / "out", "vllm", python=python)
    assert sorted(os.listdir(tmp_path)) == ["model", "python", "stand_in.py"]


def test_an_interpreter_that_is_none_is_named(saved, tmp_path):
    with pytest.raises(ValueError, match=r"python is '/no/such', which does not run"):
        hfc.export(saved(), tmp_path / "out", "vllm", python="/no/such")


def test_models_that_vllm_is_not_asked_about(stand_in, tmp_path):
    hfc.save(made("BERT"), tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification does not"):
        hfc.export(tmp_path / "bert", tmp_path / "out", "vllm", python=stand_in())
    model = made("Mixtral")
    lrp(model, bits=6, group_size=16)
    hfc.save(model, tmp_path / "mixtral")
    with pytest.raises(UnsupportedModelError, match=r"stored apart: write them out first"):
        hfc.export(tmp_path / "mixtral", tmp_path / "out", "vllm", python=stand_in())


@pytest.mark.slow
@pytest.mark.parametrize("change", [*(change for change in CHANGES if change != "as it was"), "heads"])
def test_vllm_says_what_transformers_says(change, saved, tmp_path):
    found = hfc.export(saved(change), tmp_path / "out", "vllm", python=vllm_python())
    assert found.agreement.tokens >= 4
    assert found.agreement.ties == 0
    assert found.agreement.largest_difference < 1e-4


@pytest.mark.slow
def test_vllm_computes_with_weights_of_compressed_tensors(tmp_path):
    """Its kernel for a CPU is for four bits, and in bfloat16."""
    model = wide_llama()
    model.save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    hfc.compress(model, hfc.LRPConfig(bits=4.375, per="module"), torch.randint(2, 250, (16, 24)))
    folder = hfc.save_compressed_tensors(model, tmp_path / "model")
    with Vllm(vllm_python(), "bfloat16").speaker(folder, model) as speaker:
        found = agreement(Reference(model), speaker, [[5, 6, 7, 8], [9, 8, 7, 6]], 16, 0.2, "vLLM")
    assert found.tokens >= 2


@pytest.mark.slow
def test_what_vllm_tells_is_passed_on(saved):
    folder, python = saved("as it was"), vllm_python()
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = pytest.raises(UnsupportedModelError, match=r"vLLM cannot run the model: .*model\.norm\.weight")
    with told, Vllm(python).speaker(folder, None):
        pass
