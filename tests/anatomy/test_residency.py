"""Offloaded modules can be held in memory, changed there, and let go, and a module in memory is left alone."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from hf_compress.anatomy.residency import resident, snapshot
from hf_compress.anatomy.store import Store, keep_changes_in
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import OffloadError
from tests.helpers.disk import counted_reads, in_memory, logits_of, offloaded
from tests.helpers.language import tiny_llama
from tests.helpers.tiny import tiny_model

IN_MEMORY = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0")
MIXED = dict.fromkeys(IN_MEMORY, "cpu") | dict.fromkeys(("model.layers.1", "model.layers.2", "lm_head"), "disk")


@pytest.fixture
def plain():
    return tiny_llama(layers=3)


@pytest.fixture
def model(plain, tmp_path):
    return offloaded(plain, tmp_path)


def parameters(module):
    return dict(module.named_parameters())


# --- reading and letting go -------------------------------------------------------------------------------------------


def test_a_module_in_memory_is_left_alone(plain):
    before = parameters(plain)
    with resident(plain.model.layers[1]):
        plain.model.layers[1].mlp.down_proj.weight.data.zero_()
    assert all(tensor is before[name] for name, tensor in plain.named_parameters())
    assert not plain.model.layers[1].mlp.down_proj.weight.any()


@pytest.mark.parametrize("options", [{}, {"device_map": MIXED}, {"shard": "4KB"}], ids=["disk", "mixed", "shards"])
def test_inside_the_weights_are_those_of_the_checkpoint(plain, tmp_path, options):
    model = offloaded(plain, tmp_path, **options)
    block, before = model.model.layers[1], parameters(model)
    assert in_memory(block) == []
    with resident(block):
        for name, parameter in plain.model.layers[1].named_parameters():
            assert torch.equal(block.get_parameter(name), parameter)
            assert block.get_parameter(name).requires_grad
        assert torch.equal(logits_of(model), logits_of(plain))
    assert all(block.get_parameter(name) is before[f"model.layers.1.{name}"] for name, _ in block.named_parameters())
    assert torch.equal(logits_of(model), logits_of(plain))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt2", "bloom", "gemma2", "mamba", "phi3"])
def test_every_block_of_a_family(kind, tmp_path):
    """Experts that are fused on loading and so lie in the folder, Conv1D, biases, tied embeddings, a convolution."""
    plain = tiny_model(kind).eval()
    model = offloaded(plain, tmp_path)
    expected = logits_of(plain)
    assert torch.equal(logits_of(model), expected)
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    for block in blocks:
        with resident(block):
            assert not any(tensor.is_meta for tensor in [*block.parameters(), *block.buffers()])
            assert torch.equal(logits_of(model), expected)
        assert in_memory(block) == []
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_buffers(offload_buffers, tmp_path):
    """DeepSeek's router corrects its choices by a buffer that is stored."""
    plain = tiny_model("deepseek_v3").eval()
    model = offloaded(plain, tmp_path, offload_buffers=offload_buffers)
    name = next(name for name, _ in plain.named_buffers() if name.endswith("correction_bias"))
    block = model.get_submodule(name.partition(".mlp")[0])
    assert model.get_buffer(name).is_meta == offload_buffers
    assert torch.equal(logits_of(model), logits_of(plain))
    wanted = torch.arange(len(plain.get_buffer(name))).flip(0)
    with resident(block):
        assert not any(buffer.is_meta for buffer in block.buffers())
        assert torch.equal(logits_of(model), logits_of(plain))
        model.get_buffer(name).copy_(wanted)
    before = logits_of(plain)
    plain.get_buffer(name).copy_(wanted)
    assert model.get_buffer(name).is_meta == offload_buffers
    assert in_memory(block) == []
    assert torch.equal(logits_of(model), logits_of(plain))
    assert not torch.equal(logits_of(plain), before)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_what_accelerate_offloads_by_itself(plain, offload, tmp_path):
    """Weights in memory, or in files of its own."""
    expected, options = logits_of(plain), {"offload_dir": tmp_path} if offload is disk_offload else {}
    model = offload(copy.deepcopy(plain), execution_device="cpu", **options)
    block = model.model.layers[1]
    assert in_memory(model) == []
    with resident(block), Undo() as undo:
        assert torch.equal(logits_of(model), expected)
        undo.write(block.mlp.up_proj.weight, torch.zeros(32, 16))
    assert torch.equal(logits_of(model), expected)
    for one in (block, plain.model.layers[1]):
        with resident(one):
            narrow(one.mlp)
    assert torch.equal(logits_of(model), logits_of(plain))


def test_in_inference_mode(model):
    with torch.inference_mode(), resident(model.model.layers[1]):
        halve_up(model.model.layers[1].mlp)
    with resident(model.model.layers[1]):
        model.model.layers[1].mlp(torch.ones(1, 16)).sum().backward()
        assert model.model.layers[1].mlp.up_proj.weight.grad is not None


def test_a_block_is_read_once_for_all_batches(model):
    block = model.model.layers[1]
    with counted_reads() as reads, resident(block):
        for _ in range(3):
            logits_of(model)
    of_block = {name: count for name, count in reads.items() if name.startswith("model.layers.1.")}
    assert of_block == {f"model.layers.1.{name}": 1 for name, _ in block.named_parameters()}
    assert reads["model.layers.0.mlp.up_proj.weight"] == 3


def test_what_was_read_is_let_go(model):
    with resident(model.model.layers[1]):
        loaded = [weakref.ref(parameter) for parameter in model.model.layers[1].parameters()]
        logits_of(model)
    gc.collect()
    assert len(loaded) == 9
    assert not any(one() is not None for one in loaded)


def test_what_is_read_is_not_mapped(model):
    """Mapped memory is seldom aligned, and some kernels round differently there."""
    with resident(model.model.layers[1]):
        for parameter in model.model.layers[1].parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
            assert parameter.data_ptr() % 64 == 0


def test_entered_twice(model):
    block, expected = model.model.layers[1], logits_of(model)
    with counted_reads() as reads, resident(block):
        with resident(block.mlp):
            assert in_memory(block.mlp)
        assert len(in_memory(block)) == 9
    assert set(reads.values()) == {1}
    assert in_memory(block) == []
    assert torch.equal(logits_of(model), expected)


def test_what_is_new_stays_in_memory_until_the_last_one_leaves(model):
    block = model.model.layers[1]
    with resident(block):
        with resident(block):
            block.mlp.up_proj = nn.Linear(16, 32, bias=False)
        assert len(in_memory(block)) == 9
    assert in_memory(block) == []


def test_left_in_another_order_than_entered(model):
    block, expected = model.model.layers[1], logits_of(model)
    first, second = resident(block), resident(block)
    first.__enter__()
    second.__enter__()
    block.mlp.up_proj.weight.data = block.mlp.up_proj.weight * 2
    first.__exit__(None, None, None)
    assert len(in_memory(block)) == 9
    second.__exit__(None, None, None)
    assert in_memory(block) == []
    assert not torch.equal(logits_of(model), expected)


def test_gradients_flow_through_it(model, plain):
    grads = []
    for module in (model.model.layers[1], plain.model.layers[1]):
        with resident(module):
            stream = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            module.mlp(stream).square().sum().backward()
            grads += [stream.grad, module.mlp.up_proj.weight.grad]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


def test_a_file_that_is_gone_is_named(model, tmp_path):
    (tmp_path / "saved" / "model.safetensors").rename(tmp_path / "elsewhere")
    match = r"model\.layers\.1\.\S+\.weight cannot be read from \S+/saved/model\.safetensors"
    with pytest.raises(OffloadError, match=match), resident(model.model.layers[1]):
        raise AssertionError
    assert in_memory(model) == []
    (tmp_path / "elsewhere").rename(tmp_path / "saved" / "model.safetensors")
    logits_of(model)


def test_a_broken_weight_is_named_once_it_is_read(plain, tmp_path):
    plain.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("-inf")
    model = offloaded(plain, tmp_path)
    with resident(model.model.layers[0]):
        pass
    match = r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"
    with pytest.raises(ValueError, match=match), resident(model.model.layers[1]):
        raise AssertionError
    assert in_memory(model) == []


# --- changes ----------------------------------------------------------------------------------------------------------


def halve_up(mlp):
    with torch.no_grad():
        mlp.up_proj.weight.mul_(0.5)


def write_down(mlp):
    Undo().write(mlp.down_proj.weight, mlp.down_proj.weight.flip(0))


def swap_data(mlp):
    mlp.up_proj.weight.data = mlp.up_proj.weight.data.flip(0)


def narrow(mlp):
    for name in ("gate_proj", "up_proj"):
        layer = nn.Linear(16, 8, bias=False)
        layer.weight = nn.Parameter(getattr(mlp, name).weight.detach()[:8].clone())
        setattr(mlp, name, layer)
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, :8].clone())
    mlp.down_proj.in_features = 8


class Buffered(nn.Module):
    """A linear map as a buffer, as packed ones are."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x):
        return x @ self.weight.T


def buffered(mlp):
    mlp.up_proj = Buffered(mlp.up_proj.weight * 3)


def shared(mlp):
    mlp.gate_proj.weight = mlp.up_proj.weight


@pytest.mark.parametrize("change", [halve_up, write_down, swap_data, narrow, buffered, shared])
def test_what_changes_stays(plain, model, change):
    before = logits_of(plain)
    for one in (plain, model):
        with resident(one.model.layers[1]):
            change(one.model.layers[1].mlp)
    expected = logits_of(plain)
    assert not torch.equal(expected, before)
    assert in_memory(model) == []
    assert all(buffer.is_meta for name, buffer in model.model.layers.named_buffers() if name.endswith("weight"))
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(copy.deepcopy(model)), expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with resident(model.model):
        assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("change", [halve_up, write_down, swap_data])
@pytest.mark.parametrize("map_", [None, MIXED], ids=["disk", "mixed"])
def test_what_changes_is_saved(plain, change, map_, tmp_path):
    model = offloaded(plain, tmp_path, map_)
    for one in (plain, model):
        for block in one.model.layers[:2]:
            with resident(block):
                change(block.mlp)
    model.save_pretrained(tmp_path / "changed")
    loaded = type(model).from_pretrained(tmp_path / "changed")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_only_what_has_changed_is_stored(model, tmp_path):
    store = keep_changes_in(model, tmp_path / "changes")
    with resident(model.model.layers[0]):
        pass
    assert not [*store.folder.iterdir()]
    with resident(model.model.layers[1]):
        halve_up(model.model.layers[1].mlp)
    (file,) = store.folder.iterdir()
    assert file.stat().st_size < 16 * 32 * 4 + 300


def test_changes_that_were_undone_are_not_stored(model, tmp_path):
    store, before = keep_changes_in(model, tmp_path / "changes"), parameters(model)
    with resident(model.model.layers[1]), Undo() as undo:
        weight = model.model.layers[1].mlp.up_proj.weight
        undo.write(weight, weight.flip(0))
    assert not [*store.folder.iterdir()]
    assert all(tensor is before[name] for name, tensor in model.named_parameters())


def test_the_same_values_again_are_not_stored(model, tmp_path):
    store, before = keep_changes_in(model, tmp_path / "changes"), parameters(model)
    with resident(model.model.layers[1]):
        weight = model.model.layers[1].input_layernorm.weight
        weight.data = weight.data.clone()
    assert not [*store.folder.iterdir()]
    assert all(tensor is before[name] for name, tensor in model.named_parameters())


def test_what_is_frozen_inside_stays_frozen(model):
    with resident(model.model.layers[1]):
        model.model.layers[1].requires_grad_(False)
        halve_up(model.model.layers[1].mlp)
    assert not any(parameter.requires_grad for parameter in model.model.layers[1].parameters())
    with resident(model.model.layers[1]):
        assert not any(parameter.requires_grad for parameter in model.model.layers[1].parameters())


def test_another_dtype(model, plain):
    for one in (model, plain):
        with resident(one.model.layers[1]):
            one.model.layers[1].to(torch.bfloat16).to(torch.float32)
    assert in_memory(model) == []
    assert torch.equal(logits_of(model), logits_of(plain))


def test_an_error_inside_leaves_what_was_done(model, plain):
    def fail(block):
        with resident(block):
            halve_up(block.mlp)
            raise KeyboardInterrupt

    for one in (model, plain):
        with pytest.raises(KeyboardInterrupt):
            fail(one.model.layers[1])
    assert in_memory(model) == []
    assert torch.equal(logits_of(model), logits_of(plain))


def test_a_full_disk_leaves_the_model_as_it_was(model, monkeypatch):
    expected, before = logits_of(model), parameters(model)

    def change():
        with resident(model.model):
            narrow(model.model.layers[1].mlp)
            halve_up(model.model.layers[0].mlp)

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("hf_compress.numerics.tensor_file.save_file", full)
    with pytest.raises(OffloadError, match=r"written to \S+\.safetensors: OSError: no space"):
        change()
    assert in_memory(model) == []
    assert torch.equal(logits_of(model), expected)
    assert parameters(model).keys() == before.keys()


def test_files_go_with_what_reads_them(plain, tmp_path):
    model = offloaded(plain, tmp_path)
    store = keep_changes_in(model, tmp_path / "changes")
    block = model.model.layers[1]
    for _ in range(2):
        with resident(block):
            halve_up(block.mlp)
        gc.collect()
        assert len([*store.folder.iterdir()]) == 1
    del model, block
    gc.collect()
    assert [*store.folder.iterdir()] == []


def test_a_temporary_store_goes_with_its_model(plain, tmp_path):
    model = offloaded(plain, tmp_path)
    block = model.model.layers[1]
    with resident(block):
        halve_up(block.mlp)
    folder = block.mlp.up_proj._hf_hook.weights_map.dataset.path.parent
    assert len([*folder.iterdir()]) == 1
    del model, block
    gc.collect()
    assert not folder.exists()


def test_a_store_writes_once_what_has_two_names(tmp_path):
    base = torch.arange(12.0).view(4, 3)
    stored = Store(tmp_path).write({"a": base, "b": base, "row": base[1]})
    assert torch.equal(stored["b"], base)
    assert torch.equal(stored["row"], base[1])
    assert stored.path.stat().st_size < 15 * 4 + 300


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [halve_up, write_down, narrow, buffered, shared])
@pytest.mark.parametrize("inside", [False, True])
def test_a_snapshot_brings_everything_back(model, change, inside):
    block, expected, before = model.model.layers[1], logits_of(model), parameters(model)
    then = snapshot(block)
    with resident(block):
        change(block.mlp)
        changed = [weakref.ref(parameter) for parameter in block.parameters()]
        if inside:
            then.restore()
            assert len(in_memory(block)) == 9
            assert torch.equal(logits_of(model), expected)
    if not inside:
        assert not torch.equal(logits_of(model), expected)
        then.restore()
    gc.collect()
    assert not any(one() is not None for one in changed)
    assert all(tensor is before[name] for name, tensor in block.named_parameters(prefix="model.layers.1"))
    assert torch.equal(logits_of(model), expected)


def test_a_snapshot_of_before_an_earlier_change_is_restored_inside(model):
    block, expected = model.model.layers[1], logits_of(model)
    then = snapshot(block)
    with resident(block):
        narrow(block.mlp)
        block.input_layernorm.weight.data = block.input_layernorm.weight * 2
    with resident(block):
        then.restore()
        assert not block.input_layernorm.weight.is_meta
        assert not block.mlp.down_proj.weight.is_meta
        assert torch.equal(logits_of(model), expected)
    assert in_memory(block) == []
    assert torch.equal(logits_of(model), expected)


def test_a_snapshot_taken_inside_holds_nothing(model):
    block, expected = model.model.layers[1], logits_of(model)
    with resident(block):
        then = snapshot(block)
        loaded = [weakref.ref(parameter) for parameter in block.parameters()]
        halve_up(block.mlp)
    gc.collect()
    assert not any(one() is not None for one in loaded)
    then.restore()
    assert torch.equal(logits_of(model), expected)


def test_an_undo_takes_back_what_was_let_go(model):
    expected = logits_of(model)
    with Undo() as undo:
        for block in model.model.layers:
            with resident(block, undo):
                halve_up(block.mlp)
                undo.write(block.mlp.down_proj.weight, torch.ones(16, 32))
                undo.put(block.mlp._modules, "act_fn", nn.ReLU())
        assert not torch.equal(logits_of(model), expected)
    assert in_memory(model) == []
    assert torch.equal(logits_of(model), expected)
