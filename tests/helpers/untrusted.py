"""Checkpoints as anybody could upload them, and loading them under guard: soon, in little memory, or not at all."""

import json
import os
import resource
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

import hf_compress
from hf_compress.errors import PlanError
from hf_compress.rewrite.probe import quiet
from hf_compress.storage.save import save
from tests.helpers.round_trip import IN_EACH_BLOCK, changed_throughout

PACKAGE = Path(hf_compress.__file__).parent

# By block; the last is a change that leaves all shapes as they were, which comes with a seal.
CHECKPOINTS = {
    "Llama": IN_EACH_BLOCK,
    "Mixtral": IN_EACH_BLOCK,
    "GPT-2": ("low-rank FFN", "bottleneck", "packed linear", "narrow one FFN"),
    "Qwen3": ("blended activation",),
}
SECONDS = 20  # ample on a slow machine; most examples take a thirtieth of one
MEMORY = 2 * 2**30  # bytes of address space beyond what the process has

LONG = {
    "<long text>": json.dumps("a" * 10**6),
    "<long path>": json.dumps("a" + ".a" * 10**5),
    "<long list>": json.dumps([0] * 10**5),
    "<paths>": json.dumps(["model.layers.0.mlp.gate_proj"] * 10**5),
    "<long number>": "9" * 5000,
    "<nested>": "[" * 150 + "]" * 150,
    "<deeply nested>": "[" * 10**5 + "]" * 10**5,
}


def make_checkpoints(root):
    """The folders of saved models, by family."""
    return {family: save(changed_throughout(family, edits), root / family) for family, edits in CHECKPOINTS.items()}


class TooSlow(BaseException):
    """No Exception, so that nothing on the way catches it."""


@contextmanager
def bounded():
    """Stop what takes too long, and let what takes too much memory fail."""

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":  # elsewhere the limit is not kept
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def load(folder, auto=AutoModelForCausalLM, **options):
    """The model with its loading report, or the error."""
    with bounded(), quiet():
        try:
            return auto.from_pretrained(folder, output_loading_info=True, **options)
        except Exception as error:
            return error


def is_plain(error):
    if isinstance(error, RuntimeError):
        return "ignore_mismatched_sizes" in str(error) or "conversion of the weights" in str(error)
    return isinstance(error, (ValueError, OSError, SafetensorError))


def is_of_stock(error, folder):
    """Whether an error is Transformers' own, of a config whose model cannot be built without the record either."""
    if any(Path(frame.filename).is_relative_to(PACKAGE) for frame in traceback.extract_tb(error.__traceback__)):
        return False
    with TemporaryDirectory() as other, bounded(), quiet(), torch.device("meta"):
        try:
            config = config_of(folder)
            config.pop("quantization_config", None)
            Path(other, "config.json").write_text(json.dumps(config))
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other))
        except Exception:
            return True
    return False


def check(folder):
    """The one property: a whole model, or a plain error."""
    result = load(folder)
    if isinstance(result, Exception):
        assert not isinstance(result, MemoryError)
        assert "allocate memory" not in str(result)
        if not is_plain(result) and not is_of_stock(result, folder):
            raise AssertionError(f"not a plain error: {type(result).__name__}") from result
        assert not isinstance(result, PlanError) or len(str(result)) < 2000
    else:
        model, report = result
        if type(model).__name__ in (model.config.architectures or [type(model).__name__]):
            assert not report["missing_keys"]
        assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    return result


@contextmanager
def copied(source):
    """A copy of a checkpoint, whose weights may be replaced but not written to."""
    with TemporaryDirectory() as name:
        for file in source.iterdir():
            if file.suffix == ".safetensors":
                os.link(file, Path(name, file.name))
            elif file.name == "config.json":
                Path(name, file.name).write_bytes(file.read_bytes())
        yield Path(name)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, config):
    text = json.dumps(config)
    for name, value in LONG.items():
        text = text.replace(f'"{name}"', value)
    (folder / "config.json").write_text(text)


def replace_weights(folder, data):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(data)
