"""Runs that are killed at random instants and begun again, until they come to their end: `test_resume` looks at that.

python -m tests.helpers.run_killed FOLDER KILLS NAME... prints, by the name of the settings, how often a run was killed
and whether it ended with the same bits as one that was not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from tests.helpers.every_method import SETTINGS
from tests.helpers.tiny import tiny_model

IDS = torch.randint(4, 90, (48, 16), generator=torch.Generator().manual_seed(3))


def run(name: str, workdir: Path | None, end: Path) -> None:
    model = hfc.compress(tiny_model("llama"), SETTINGS[name], IDS, compute=hfc.Compute(workdir=workdir))
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, end)


def child(name: str, workdir: Path, end: Path) -> int:
    """A process of its own that does the run; its number."""
    number = os.fork()
    if number == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no bars of progress
        run(name, workdir, end)
        os._exit(0)
    return number


def killed(number: int, seconds: float) -> bool:
    """Whether a process was killed after so long, because it had not come to its end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.002)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return True


def killed_and_resumed(name: str, folder: Path, kills: int) -> dict[str, list[int] | bool]:
    """How often runs were killed, one after another until there are enough, and whether all came to the same."""
    whole, resumed, work = folder / "whole.safetensors", folder / "resumed.safetensors", folder / "work"
    start = time.monotonic()
    run(name, None, whole)
    seconds = time.monotonic() - start
    found: list[int] = []
    same = True
    while sum(found) < kills:
        shutil.rmtree(work, ignore_errors=True)
        found.append(0)
        while killed(child(name, work, resumed), random.uniform(0, seconds) if sum(found) < kills else 600):
            found[-1] += 1
        one, other = load_file(whole), load_file(resumed)
        same &= one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return {"kills": found, "same": same}


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(0)
    where, kills = Path(sys.argv[1]), int(sys.argv[2])
    print(json.dumps({name: killed_and_resumed(name, where, kills) for name in sys.argv[3:]}))
