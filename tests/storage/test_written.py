"""What is compared before a save is put in its place, of models in memory and of models on the disk."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_compress.storage.save as save_module
import hf_compress.storage.written as written_module
from hf_compress import LRPConfig, compress
from hf_compress.errors import ParityError
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.storage.save import save
from hf_compress.storage.weights import tensors_in, write_weights
from hf_compress.storage.written import same_bits, written
from tests.helpers.offloaded import dispatched, every_second_block, rewrite
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model

WEIGHT = "model.layers.1.mlp.up_proj.weight"
KINDS = ["llama", "gpt2", "qwen3_moe", "mixtral", "gemma3_text"]


def in_memory(model, folder):
    return model


def half_on_the_disk(model, folder):
    return dispatched(model, folder, every_second_block(model))


PLACES = [in_memory, half_on_the_disk, dispatched]


@pytest.fixture(params=PLACES)
def saved(request, tmp_path):
    """A model, and where it is to be saved."""
    (tmp_path / "out").mkdir()
    return request.param(tiny_model("llama"), tmp_path), tmp_path / "out" / "model"


def as_used(folder: Path, model):
    """What `from_pretrained` gives of a folder in the place of `model`."""
    return type(model).from_pretrained(folder).state_dict()


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("place", [in_memory, dispatched])
def test_a_model_is_saved_wherever_it_is(tmp_path, model_type, place):
    model = tiny_model(model_type)
    there = place(model, tmp_path)
    with torch.no_grad():
        there(**tiny_inputs(model))  # after which accelerate has forgotten what is tied
    loaded = as_used(save(there, tmp_path / "out"), model)
    assert all(same_bits(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "stock")
    assert tensors_in(tmp_path / "out").keys() == tensors_in(tmp_path / "stock").keys()


def test_a_model_is_as_it_was_after_it_is_saved(saved):
    model, folder = saved
    meta = [parameter.is_meta for parameter in model.parameters()]
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    placed = dict(getattr(model, "hf_device_map", {}))
    save(model, folder)
    assert [parameter.is_meta for parameter in model.parameters()] == meta
    assert [vars(module).get("_hf_hook") for module in model.modules()] == hooks
    assert getattr(model, "hf_device_map", {}) == placed


def one_bit(tensors):
    if WEIGHT in tensors:
        tensors[WEIGHT].view(torch.int32)[3, 2] ^= 1 << 7


def sign_of_zero(tensors):
    if WEIGHT in tensors:
        tensors[WEIGHT][0, 0] = -0.0


def another_dtype(tensors):
    if WEIGHT in tensors:
        tensors[WEIGHT] = tensors[WEIGHT].double()


def left_out(tensors):
    tensors.pop(WEIGHT, None)


def another_shape(tensors):
    if WEIGHT in tensors:
        tensors[WEIGHT] = tensors[WEIGHT][:-1].clone()


WRONG = [
    (one_bit, rf"{WEIGHT} has other values"),
    (sign_of_zero, rf"{WEIGHT} has other values"),
    (left_out, rf"{WEIGHT} has other values"),
    (another_dtype, rf"{WEIGHT} was written as torch.float64 instead of torch.float32"),
    (another_shape, r"the saved model does not load"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[change.__name__ for change, _ in WRONG])
@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_written_as_it_is_is_not_put_there(tmp_path, monkeypatch, place, shards, change, message):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(WEIGHT)[0, 0] = 0.0
    model = place(model, tmp_path)

    def write(model, folder):
        own = type(model).save_pretrained
        with monkeypatch.context() as patch:
            sharded = {} if shards is None else {"max_shard_size": shards}
            patch.setattr(type(model), "save_pretrained", lambda *args, **kwargs: own(*args, **kwargs, **sharded))
            write_weights(model, folder)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards is not None)
        rewrite(folder, change)

    monkeypatch.setattr(save_module, "write_weights", write)
    (tmp_path / "out").mkdir()
    with pytest.raises(ParityError, match=message):
        save(model, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("place", PLACES)
def test_other_outputs_are_no_save(tmp_path, place):
    model = place(tiny_model("llama"), tmp_path)
    model.model.layers[0].input_layernorm.variance_epsilon = 0.1  # which no config can say of one block
    with pytest.raises(ParityError, match="the same tensors as the one in memory, but gives other outputs"):
        save(model, tmp_path / "out")


def test_a_model_in_memory_is_compared_in_memory_where_it_cannot_be_otherwise(saved, monkeypatch):
    def fail(*_):
        raise RuntimeError("a module reads the weights of another, which are on another device")

    monkeypatch.setattr(save_module, "outputs_of", fail)
    model, folder = saved
    if not any(parameter.is_meta for parameter in model.parameters()):
        save(model, folder)
        return
    with pytest.raises(ParityError, match="gives other outputs"):
        save(model, folder)


@pytest.mark.parametrize("place", PLACES)
def test_unpacked_weights_are_kept_beside_a_model_in_memory_alone(tmp_path, place, monkeypatch):
    model = place(tiny_model("llama"), tmp_path)
    compress(model, LRPConfig(bits=6, group_size=8), torch.randint(4, 60, (8, 16)))
    made: list[weakref.ref[torch.Tensor]] = []
    there = []
    unpack = MixedPrecisionLinear._dense

    def unpacked(linear, dtype):
        there.append(sum(weight() is not None for weight in made))
        weight = unpack(linear, dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(MixedPrecisionLinear, "_dense", unpacked)
    save(model, tmp_path / "out")
    assert len(there) > 1
    assert (max(there) > 0) == (place is in_memory)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_what_was_written_is_mapped_and_not_read(tmp_path, model_type):
    model = tiny_model(model_type)
    (tmp_path / "out").mkdir()
    write_weights(model, tmp_path / "out")
    files = {str(path) for path in tmp_path.rglob("*.safetensors")}
    with written(model, tmp_path / "out") as loaded:
        ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        mapped = [
            tuple(int(end, 16) for end in entry[0].split("-"))
            for entry in ranges
            if len(entry) > 5 and (entry[5] in files or entry[5].startswith(str(tmp_path)))
        ]
        pointers = {name: parameter.data_ptr() for name, parameter in loaded.named_parameters()}
        assert [n for n, at in pointers.items() if not any(low <= at < high for low, high in mapped)] == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "granitemoe"])
def test_mixtures_are_written_as_transformers_writes_them(tmp_path, model_type):
    model = tiny_model(model_type)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    write_weights(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for theirs in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / theirs.name).read_bytes() == theirs.read_bytes()


def test_renamed_weights_are_written_as_transformers_writes_them(tmp_path):
    model = tiny_base_model("vit")
    (tmp_path / "ours").mkdir()
    write_weights(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert tensors_in(tmp_path / "ours").keys() == tensors_in(tmp_path / "theirs").keys()
    save(model, tmp_path / "out")


def test_bits_are_told_apart_that_compare_as_equal():
    zero, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert same_bits(zero, zero.clone())
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.to(torch.int32))
    assert not same_bits(zero, zero[:2])
    assert same_bits(torch.ones(2, 3).T, torch.ones(3, 2))
    assert same_bits(torch.tensor(True), torch.tensor(True))
    assert not same_bits(torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(2.0, dtype=torch.bfloat16))


def test_a_model_that_does_not_load_is_no_save(tmp_path, monkeypatch):
    monkeypatch.setattr(written_module, "load", lambda *_, **__: nn.Linear(1))
    with pytest.raises(ParityError, match="the saved model does not load: TypeError"):
        save(tiny_model("llama"), tmp_path / "out")
