"""What a compress() would take, told without doing it."""

import pytest
import torch

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.api.estimate import Disk
from hf_compress.calibration import memory
from hf_compress.calibration.compute import least_memory
from hf_compress.calibration.data import prepare
from hf_compress.methods.base import registry, settings
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import Method, register, work_for
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.base.work import gram, inverse, share_of_tokens
from hf_compress.numerics.aside import mapped
from tests.helpers.disk import offloaded
from tests.helpers.every_method import SETTINGS
from tests.helpers.tiny import tiny_model

IDS = torch.randint(4, 90, (24, 9), generator=torch.Generator().manual_seed(3))


class Passes:
    """Counts how many samples go through the blocks of a model."""

    def __init__(self, model):
        stack = Anatomy(model).stack()
        self.blocks, self.samples = len(stack), 0
        for block in stack.blocks:
            block.register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.samples += len(args[0])


@pytest.mark.parametrize("name", SETTINGS)
def test_passes_are_counted_roughly(name):
    """A third to three times as many as go through the blocks, give or take one."""
    model = tiny_model("llama")
    told = hfc.estimate(model, SETTINGS[name], IDS)
    seen = Passes(model)
    hfc.make_plan(model, SETTINGS[name], IDS)
    passes = seen.samples / seen.blocks / len(IDS)
    assert told.passes is not None
    assert told.passes / 3 - 1 <= passes <= 3 * told.passes + 1, (told.passes, passes)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_model_is_left_alone(on_disk, tmp_path):
    model = offloaded(tiny_model("llama"), tmp_path) if on_disk else tiny_model("llama")
    before = dict(model.named_parameters())
    told = hfc.estimate(model, hfc.ILLCConfig(ratio=0.25), IDS, compute=hfc.Compute(max_memory="1GiB"))
    assert dict(model.named_parameters()) == before
    assert told.seconds > told.pass_seconds > 0
    whole = sum(parameter.nbytes for parameter in tiny_model("llama").parameters())
    blocks = sum(parameter.nbytes for parameter in tiny_model("llama").model.layers.parameters())
    assert told.disk == (2 * blocks if on_disk else blocks, 0, whole)
    assert (told.memory < whole) == on_disk


@pytest.mark.parametrize("name", SETTINGS)
def test_streams_in_files_are_counted_roughly(name, monkeypatch):
    """A third to three times the bytes of all that are put into files one after another."""
    model, taken = tiny_model("llama"), []

    def noted(size, folder=None):
        taken.append(size)
        return mapped(size, folder)

    told = hfc.estimate(model, SETTINGS[name], IDS)
    monkeypatch.setattr(memory, "mapped", noted)
    hfc.make_plan(model, SETTINGS[name], IDS)
    assert told.disk.streams / 3 <= sum(taken) <= 3 * told.disk.streams, (told.disk.streams, sum(taken))


def test_streams_beyond_the_budget_lie_in_files():
    model, config = tiny_model("llama"), hfc.ILLCConfig(ratio=0.25)
    least = sum(least_memory(model)[2:])
    roomy, tight = (
        hfc.estimate(model, config, IDS, compute=hfc.Compute(max_memory=size)) for size in ("1GiB", least + 1)
    )
    two = 2 * IDS.numel() * model.config.hidden_size * model.dtype.itemsize
    assert (roomy.disk.streams, tight.disk.streams) == (0, two)
    assert roomy.memory - tight.memory == two


def test_a_method_by_its_name():
    model = tiny_model("llama")
    named, given = hfc.estimate(model, "MKA", IDS, num_merges=2), hfc.estimate(model, SETTINGS["merge"], IDS)
    assert (named.passes, named.products) == (given.passes, given.products)


def test_a_workdir_is_not_touched(tmp_path):
    compute = hfc.Compute(workdir=tmp_path / "work")
    assert hfc.estimate(tiny_model("llama"), hfc.DropBlocksConfig(num_blocks=1), IDS, compute=compute).disk.weights == 0
    assert list(tmp_path.iterdir()) == []


def test_more_blocks_tokens_and_width_take_more():
    context = CalibrationContext(tiny_model("llama"), prepare(IDS, tiny_model("llama"), None))
    assert share_of_tokens(context, 10**9).of_all == 1
    assert (gram(4, 100), inverse(4)) == (800, 32)
    few, many = (work_for(hfc.MKAConfig(num_merges=n), context).passes for n in (1, 2))
    assert few < many
    less, more = (work_for(hfc.ILLCConfig(ratio=0.5, tokens=n), context) for n in (30, 10**6))
    assert less.passes < more.passes
    assert less.products < more.products


def test_a_method_that_nobody_has_counted_is_told_of(monkeypatch):
    monkeypatch.setattr(settings, "_REGISTRY", dict(settings._REGISTRY))
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class Uncounted(CompressionConfig, method="uncounted"):
        pass

    register(Uncounted, Method(lambda config, context: hfc.Plan()))
    told = hfc.estimate(tiny_model("llama"), Uncounted(), IDS)
    assert told.seconds is told.passes is None
    assert "not known for this method" in str(told)


def test_times_and_sizes_are_readable():
    told = hfc.Estimate(7300.0, 3.0, 30.0, 2e12, 5_000_000_000, Disk(900_000_000, 2_100_000, 16_000_000_000))
    assert str(told).splitlines() == [
        "time: about 2.0 h, for 3.0 passes over the data of 30.0 s each, and 2.00 T multiplications to solve",
        "memory: about 5.0 GB",
        "disk: at most 900 MB of new weights in the workdir, about 2 MB of streams for a while, 16.0 GB saved",
    ]


def test_bad_arguments_are_those_of_compress():
    with pytest.raises(TypeError, match="config must be a method's settings"):
        hfc.estimate(tiny_model("llama"), {"ratio": 0.5}, IDS)
    with pytest.raises(ValueError, match="this method needs calibration data"):
        hfc.estimate(tiny_model("llama"), hfc.ILLCConfig(ratio=0.5))
