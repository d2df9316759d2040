"""What saving takes of memory beyond the model's own, measured from outside of the process that saves."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is no mapped file's")

SCRIPT = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
import hf_compress.storage.save as storage
from hf_compress.rewrite.parity import check_parity
from hf_compress.rewrite.probe import Probe

folder, place, kind = sys.argv[1:]
heads = dict(num_attention_heads=8, num_key_value_heads=8)
if kind == "dense":
    sizes = dict(vocab_size=12000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
else:
    sizes = dict(vocab_size=4000, hidden_size=512, moe_intermediate_size=512, num_hidden_layers=12, head_dim=64)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)).eval()
held = sum(parameter.nbytes for parameter in model.parameters())
if place == "disk":
    model.save_pretrained(folder + "/checkpoint")
    del model
    kind = LlamaForCausalLM if kind == "dense" else Qwen3MoeForCausalLM
    model = kind.from_pretrained(folder + "/checkpoint", device_map={"": "disk"}, offload_folder=folder + "/converted")
small = LlamaForCausalLM(LlamaConfig(vocab_size=90, hidden_size=8, intermediate_size=8, num_attention_heads=2)).eval()
storage.save(small, folder + "/small")  # so that what is imported late is there before anything is measured
probe = Probe.of(model)
for task in ("parity", "save"):
    print(task, held, flush=True)
    input()
    check_parity(model, probe) if task == "parity" else storage.save(model, folder + "/out")
    print("done", flush=True)
"""


# Freed tensors of less than 32 MB, as those that experts are taken apart into here, glibc else keeps on its heap.
TENSORS_GO_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def anonymous(process: subprocess.Popen) -> int:
    """The bytes in memory that a process has from no file."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def wait(process: subprocess.Popen) -> int:
    """Let a process do its next task; the most anonymous memory that it takes meanwhile, beyond what it had."""
    before = most = anonymous(process)
    process.stdin.write("\n")
    process.stdin.flush()
    while not select.select([process.stdout], [], [], 0.001)[0]:
        most = max(most, anonymous(process))
    assert process.stdout.readline() == "done\n"
    return most - before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_nothing_takes_a_second_copy_of_the_weights(tmp_path, place, kind):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), place, kind]
    taken = {}
    environment = os.environ | (TENSORS_GO_BACK if kind == "mixture" else {})
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(2):
            task, held = process.stdout.readline().split()
            taken[task] = wait(process) / int(held)
        assert int(held) > 360e6
        assert place == "disk" or anonymous(process) > int(held)
    print({task: f"{share:+.0%}" for task, share in taken.items()})
    assert taken["parity"] < 0.1
    assert taken["save"] < 0.25
