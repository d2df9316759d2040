"""What saving takes of memory beyond the model's own, measured from outside of the process that saves."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is no mapped file's")

PREPARE = """
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
small = LlamaForCausalLM(LlamaConfig(vocab_size=90, hidden_size=8, intermediate_size=8, num_hidden_layers=1)).eval()
storage.save(small, folder + "/small")  # so that what is imported late is there before anything is measured
probe = Probe.of(model)
check_parity(small, Probe.of(small))
"""
TASKS = {"save": 'storage.save(model, folder + "/out")', "parity": "check_parity(model, probe)"}
GO = "print(held, flush=True); input()"


def anonymous(process: subprocess.Popen) -> int:
    """The bytes in memory that a process has from no file."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("task", TASKS)
def test_nothing_takes_a_second_copy_of_the_weights(tmp_path, task, place, kind):
    script = f"{PREPARE}\n{GO}\n{TASKS[task]}\n"
    command = [sys.executable, "-c", script, str(tmp_path), place, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        held = int(process.stdout.readline())
        before = most = anonymous(process)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            most = max(most, anonymous(process))
            time.sleep(0.001)
    assert process.returncode == 0
    assert held > 380e6
    assert before > held or place == "disk"
    print(f"{task} {place} {kind}: {held / 1e6:.0f} MB, {(most - before) / 1e6:+.0f} MB")
    assert most - before < 0.25 * held
