"""Training in two processes (torchrun, gloo) comes to what it comes to in one, over the same batches."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers.run_in_processes import CASES, fitted, run
from tests.helpers.runs import same, state_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes have written."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.run_in_processes", str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_as_in_one_process(case, two, tmp_path):
    one = run(case, tmp_path, 1)
    ends = [load_file(two / case / f"rank {rank}" / "end.safetensors") for rank in (0, 1)]
    assert same(ends[0], ends[1])
    assert ends[0].keys() == one.keys()
    for name, value in one.items():
        assert torch.allclose(ends[0][name], value, atol=2e-5, rtol=1e-4), name
    assert [(two / case / f"rank {rank}" / "saved").exists() for rank in (0, 1)] == [True, False]
    kind = AutoModelForSequenceClassification if case == "dense" else AutoModelForCausalLM
    loaded = state_of(kind.from_pretrained(two / case / "rank 0" / "saved"))
    assert same(loaded, {name: value for name, value in ends[0].items() if name in loaded})


def test_bottlenecks_are_fitted_as_in_one_process(two):
    ends, one = [load_file(two / f"fitted {rank}.safetensors") for rank in (0, 1)], fitted(1)
    assert same(ends[0], ends[1])
    assert len(one["errors"]) == 16
    for name, value in one.items():
        assert torch.allclose(ends[0][name], value, atol=1e-5, rtol=1e-4), name


def test_changes_in_mid_run_are_refused(two):
    for rank in (0, 1):
        assert "would let 2 processes drift apart" in (two / f"refusal {rank}").read_text()
