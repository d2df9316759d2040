"""kill -9 at any instant of a save: what is at the target afterwards is the old model, the new one, or loads as none.

One process of its own imports everything and builds the models; each save that is to be killed is a fork of it.
"""

import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

import hf_compress.storage.save as save_module
import hf_compress.storage.staging as staging
from hf_compress.storage.manifest import ManifestError, verify_files
from hf_compress.storage.save import save
from tests.helpers.language import tiny_llama, word_tokenizer

ROOT = Path(__file__).parents[2]
TRIALS = 6  # in each step of each situation: 120 kills, at instants spread over 1.2 times what the step takes
STEPS = {"_write": "write", "verify": "compare", "write_manifest": "seal", "put_in_place": "place"}
KILLED_IN = ("start", *STEPS.values())
MODELS = {"old": 5, "new": 6}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and an exchange of folders"),
]


def model_of(seed: int) -> LlamaForCausalLM:
    """One of several models of the same shapes, so that files of two of them would load together."""
    config = tiny_llama().config
    config.rms_norm_eps = float(f"1e-{seed}")
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def is_whole(folder: Path) -> bool:
    try:
        return bool(verify_files(folder))
    except ManifestError:
        return False


class Saves:
    """Saves of the new model to one place, and what is there after they were killed."""

    def __init__(self, root: Path, older: bool, sharded: bool, prepare: Callable[[], object] = lambda: None) -> None:
        self.target, self.older, self.prepare = root / "models" / "out", older, prepare
        self.shards = "10KB" if sharded else "1GB"
        self.lives_for: int | None = None  # what it may do to files from when it puts them in place, until it is killed
        self.models = {name: model_of(seed) for name, seed in MODELS.items()}
        self.tokenizer = word_tokenizer(add_special=False)
        self.kept = save(self.models["old"], root / "old", self.tokenizer)
        self.target.parent.mkdir()

    def start(self) -> tuple[int, TextIO]:
        """Fork a process that saves; its number, and a pipe in which it names each step before it takes it.

        What an earlier save left beside the target stays: this one has to live with it.
        """
        shutil.rmtree(self.target, ignore_errors=True)
        if self.older:
            shutil.copytree(self.kept, self.target)
        reading, writing = os.pipe()
        if child := os.fork():
            os.close(writing)
            return child, open(reading)
        try:
            self._save(writing)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)  # not back into what the parent was at

    def _save(self, pipe: int) -> None:
        own: Any = LlamaForCausalLM.save_pretrained
        LlamaForCausalLM.save_pretrained = lambda *a, **k: own(*a, **k, max_shard_size=self.shards)  # type: ignore
        for function, step in STEPS.items():
            _announce(function, step, pipe)
        self.prepare()
        if self.lives_for is not None:
            die_placing(self.lives_for)
        os.write(pipe, b"start\n")
        save(self.models["new"], self.target, self.tokenizer, overwrite=self.older)
        os.write(pipe, b"end\n")

    def run(self) -> dict[str, float]:
        """Save; gives how long each step took, in seconds."""
        child, pipe = self.start()
        with pipe:
            begun = {line.strip(): time.perf_counter() for line in pipe}
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a save failed of itself"
        return {step: end - begin for (step, begin), end in zip(begun.items(), [*begun.values()][1:], strict=False)}

    def killed(self, step: str, seconds: float) -> str:
        """Save, and kill it so long after it began a step; gives the step that it died in."""
        child, pipe = self.start()
        with pipe:
            assert f"{step}\n" in pipe  # reads up to there
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return [step, *pipe.read().split()][-1]

    def at(self, folder: Path) -> str:
        """Which model a folder gives: old, new, none; or a mixture."""
        try:
            loaded = LlamaForCausalLM.from_pretrained(folder)
        except Exception:
            return "none"
        state = loaded.state_dict()
        for name, model in self.models.items():
            tensors = model.state_dict()
            same = state.keys() == tensors.keys() and all(torch.equal(state[key], tensors[key]) for key in tensors)
            if same and loaded.config.rms_norm_eps == model.config.rms_norm_eps:
                return name
        return "a mixture"

    def stages(self) -> list[Path]:
        return [path for path in self.target.parent.iterdir() if path != self.target]

    def problems(self, step: str) -> list[str]:
        """What is wrong after a save was killed at a step."""
        found = []
        at = self.at(self.target)
        if at == "a mixture" or (at != "none" and not is_whole(self.target)):
            found.append(f"{at} at the target, with files that are not all of one save")
        for stage in self.stages():
            if self.at(stage) != "none":
                found.append("a stage that loads")
            if self.at(stage / "new") == "a mixture":
                found.append("a mixture in a stage")
            if step in ("start", "write", "compare") and is_whole(stage / "new"):
                found.append("a stage that was not compared yet, but looks finished")
        return [f"killed at {step}: {problem}" for problem in found]

    def after(self) -> dict[str, Any]:
        """What one more save comes to, that nothing disturbs; and which files it leaves beside its target."""
        self.lives_for = None
        self.run()
        left = [str(path) for stage in self.stages() for path in stage.rglob("*") if path.stat().st_size]
        return {"at": self.at(self.target), "whole": is_whole(self.target), "left": left}


def _announce(function: str, step: str, pipe: int) -> None:
    own: Any = getattr(save_module, function)

    def announced(*args: Any, **kwargs: Any) -> Any:
        os.write(pipe, f"{step}\n".encode())
        return own(*args, **kwargs)

    setattr(save_module, function, announced)


# --- what a save does otherwise, or where it kills itself -------------------------------------------------------------


def in_two_steps() -> None:
    staging._exchange = lambda *_: False


def die_placing(lives_for: int) -> None:
    """Be killed before the next thing that is done to a file, once so many were done since `put_in_place` began."""
    own, done = save_module.put_in_place, itertools.count()

    def hook(event: str, _: object) -> None:
        if event.startswith(("open", "os.", "shutil.")) and next(done) == lives_for:
            os.kill(os.getpid(), signal.SIGKILL)

    def place(*args: Any) -> None:
        sys.addaudithook(hook)
        own(*args)

    save_module.put_in_place = place


SITUATIONS: dict[str, dict[str, Any]] = {
    "nothing there": {"older": False, "sharded": False},
    "nothing there, shards": {"older": False, "sharded": True},
    "an older model, shards": {"older": True, "sharded": True},
    "an older model, two steps": {"older": True, "sharded": False, "prepare": in_two_steps},
}
EVERY_INSTANT = [name for name in SITUATIONS if name != "nothing there, shards"]


def at_random(saves: Saves, draw: random.Random) -> dict[str, Any]:
    """Kill saves, each after one that nothing disturbs."""
    took, steps, found, problems = [], Counter[str](), Counter[str](), []
    for number in range(TRIALS * len(KILLED_IN)):
        step, part = KILLED_IN[number % len(KILLED_IN)], (number // len(KILLED_IN) + draw.random()) / TRIALS
        times = saves.run()
        took.append(sum(times.values()))
        died = saves.killed(step, 1.2 * part * times[step])
        steps[died] += 1
        found[saves.at(saves.target)] += 1
        problems += saves.problems(died)
    took = statistics.median(took)
    return {"seconds": took, "steps": steps, "found": found, "problems": problems, "after": saves.after()}


def at_every_instant(saves: Saves) -> dict[str, Any]:
    """Kill saves while they put their files in place and clean up: between any two things that they do to files."""
    found, aside, problems, after = [], [], [], []
    ended = False
    for saves.lives_for in itertools.count():
        ended = "place" in saves.run()
        found.append(saves.at(saves.target))
        problems += saves.problems("place")
        if ended:
            break
        if found[-1] == "none" and saves.older:
            aside += [saves.at(stage / "old") for stage in saves.stages()]
            died_after, saves.older = saves.lives_for, False  # the next one finds nothing, and may not overwrite
            after.append(saves.after())
            saves.lives_for, saves.older = died_after, True
    return {"found": found, "aside": aside, "problems": problems, "after": [*after, saves.after()]}


def drive(root: str) -> None:
    """Everything that is killed, in one process; prints what was found, as JSON."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    places = iter(Path(root, str(number)) for number in range(100))
    found = {
        "random": {n: at_random(Saves(next(places), **g), random.Random(n)) for n, g in SITUATIONS.items()},
        "every": {n: at_every_instant(Saves(next(places), **SITUATIONS[n])) for n in EVERY_INSTANT},
    }
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    root = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.storage.test_kill import drive; drive({str(root)!r})"],
        cwd=ROOT,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WELL = {"at": "new", "whole": True, "left": []}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_at_random_instants(found, situation):
    killed = found["random"][situation]
    print(f"\n{situation}: a save takes {killed['seconds']:.3f} s; killed at {killed['steps']}; left {killed['found']}")
    assert killed["problems"] == []
    if situation == "an older model, shards":
        assert "none" not in killed["found"], "an exchange leaves no moment with nothing there"
    assert killed["after"] == WELL
    assert sum(killed["steps"].values()) == TRIALS * len(KILLED_IN)
    assert all(killed["steps"].get(step, 0) >= 2 for step in ("start", "write", "compare", "place"))


@pytest.mark.parametrize("situation", EVERY_INSTANT)
def test_at_every_instant_of_putting_in_place(found, situation):
    killed = found["every"][situation]
    before = "old" if SITUATIONS[situation]["older"] else "none"
    between = ["none"] if "two steps" in situation else []
    print(f"\n{situation}: {Counter(killed['found'])}")
    assert killed["problems"] == []
    assert [name for name, _ in itertools.groupby(killed["found"])] == [before, *between, "new"]
    assert Counter(killed["found"])[before] > 8, "each file is flushed first"
    assert Counter(killed["found"])["new"] > 8, "what is left is deleted last"
    assert killed["aside"] == ["old" for _ in between]
    assert killed["after"] == [WELL, *(WELL for _ in between)]
