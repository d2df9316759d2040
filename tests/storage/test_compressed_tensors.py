"""compressed-tensors' format: files held against a slow decoder written from the format, and loaded without us."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_compress.storage.compressed_tensors as written
from hf_compress.api.compress import compress
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import ParityError, UnsupportedModelError
from hf_compress.methods.lrp import LRPConfig
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.report.report import REPORT_FILE
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import pack_linear, sparsify_linear
from hf_compress.storage.compressed_tensors import save_compressed_tensors
from hf_compress.storage.manifest import MANIFEST_FILE, verify_files
from hf_compress.storage.save import save
from tests.helpers.language import tiny_llama
from tests.helpers.linears import IDS, modules_of, pack_all, stored
from tests.helpers.models import in_dtype
from tests.helpers.round_trip import build, change, logits

HERE = "model.layers.1.mlp.gate_proj"
SIZE = 16


def packed(model):
    return stored(model, MixedPrecisionLinear)


def calibrated(model, **settings):
    return compress(model, LRPConfig(**settings), IDS, options=DataOptions(batch_size=8))


def tensors_in(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# --- the format -------------------------------------------------------------------------------------------------------


def number(words, place, bits):
    """The number at a place of a row of words, bit by bit from the lowest of the first."""
    found = 0
    for k in range(bits):
        word, bit = divmod(place * bits + k, 32)
        found |= ((int(words[word]) & 0xFFFFFFFF) >> bit & 1) << k
    return found


def by_hand(tensors, path, weights):
    """The weight of a map as the format has it, one by one: the signed number less the signed zero, times the scale."""
    bits, size = weights["num_bits"], weights["group_size"]
    words, scales = tensors[f"{path}.weight_packed"], tensors[f"{path}.weight_scale"]
    outputs, inputs = tensors[f"{path}.weight_shape"].tolist()
    offset = 2 ** (bits - 1)
    rows = []
    for row in range(outputs):
        for column in range(inputs):
            group, zero = column // size, 0
            if not weights["symmetric"]:
                zero = number(tensors[f"{path}.weight_zero_point"][:, group], row, bits) - offset
            signed = number(words[row], column, bits) - offset
            assert -offset <= signed < offset
            rows.append(torch.tensor(signed - zero, dtype=scales.dtype) * scales[row, group])
    return torch.stack(rows).view(outputs, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_written_means_the_weights(symmetric, dtype, tmp_path):
    """Exactly, in the model's dtype; also of a map whose 20 outputs do not fill words of 8 zeros."""
    config = tiny_llama().config
    config.intermediate_size = 20
    model = in_dtype(type(tiny_llama())(config), dtype)
    pack_all(model, symmetric, only=[path for path in modules_of(model) if not path.endswith("down_proj")])
    folder = save_compressed_tensors(model, tmp_path / "out")
    tensors = tensors_in(folder)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    schemes = {path: group["weights"] for group in said["config_groups"].values() for path in group["targets"]}
    assert schemes.keys() == packed(model).keys()
    assert {weights["num_bits"] for weights in schemes.values()} == {4, 8}
    for path, module in packed(model).items():
        assert torch.equal(by_hand(tensors, path, schemes[path]), module.unpacked().to(dtype))
        assert tensors[f"{path}.weight_packed"].dtype == torch.int32
        assert tensors[f"{path}.weight_shape"].dtype == torch.int64
        assert tensors[f"{path}.weight_scale"].shape == (module.out_features, module.in_features // SIZE)
        assert (f"{path}.weight_zero_point" in tensors) == (not symmetric)
    left = {name for name in tensors if name.rpartition(".")[0] not in schemes}
    state = model.state_dict()
    assert all(torch.equal(tensors[name], state[name]) for name in left)
    assert left == {name for name in state if name.rpartition(".")[0] not in schemes}


def test_the_config(tmp_path):
    model = pack_all(build("Llama"), only=[HERE, "model.layers.0.self_attn.q_proj"])
    folder = save_compressed_tensors(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    others = [path for path in modules_of(model) if path not in packed(model)]
    assert sorted(said.pop("ignore")) == sorted([*others, "lm_head"])
    groups = said.pop("config_groups")
    assert said == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
    }
    assert [group["targets"] for group in groups.values()] == [["model.layers.0.self_attn.q_proj"], [HERE]]
    for group, bits in zip(groups.values(), (4, 8), strict=True):
        args = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": SIZE}
        assert group.pop("weights") == args | {"dynamic": False}
        assert group == {
            "targets": group["targets"],
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "hf_compress" not in (folder / "config.json").read_text()


def test_all_of_it_is_written(tokenizer, tmp_path):
    """With the report and the tokenizer, and a manifest; and the model is as it was."""
    model = calibrated(build("Llama"), bits=6, group_size=32, per="module")
    before, record = {n: t.clone() for n, t in model.state_dict().items()}, model.config.to_dict()
    folder = save_compressed_tensors(model, tmp_path / "deep" / "out", tokenizer)
    assert folder == tmp_path / "deep" / "out"
    assert {REPORT_FILE, MANIFEST_FILE, "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert verify_files(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    own = {"dtype", "architectures"}  # which Transformers sets where it saves
    assert {n: v for n, v in model.config.to_dict().items() if n not in own} == {
        n: v for n, v in record.items() if n not in own
    }
    assert torch.equal(logits(type(model).from_pretrained(save(model, tmp_path / "ours"))), logits(model))
    ours = sum(path.stat().st_size for path in (tmp_path / "ours").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 1.5 * ours


def test_more_than_one_file(tmp_path, monkeypatch):
    model = pack_all(build("Llama"))
    own = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **how: own(*a, **how, max_shard_size="20KB"))
    folder = save_compressed_tensors(model, tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert len(tensors_in(folder)) == len(
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    )


def test_zeros_are_warned_of(tmp_path, caplog):
    save_compressed_tensors(pack_all(build("Llama")), tmp_path / "even")
    assert not caplog.records
    save_compressed_tensors(pack_all(build("Llama"), symmetric=False), tmp_path / "zeros")
    assert "stores zeros, as do 27 others" in caplog.text
    assert "symmetric=True" in caplog.text


# --- what it cannot say -----------------------------------------------------------------------------------------------


def refused(model, folder, message, error=UnsupportedModelError):
    """It says why, and nothing is left."""
    record = model.config.to_dict().get("quantization_config")
    with pytest.raises(error, match=message):
        save_compressed_tensors(model, folder / "out")
    assert list(folder.iterdir()) == []
    assert model.config.to_dict().get("quantization_config") == record


def test_bits_that_differ_within_a_map(tmp_path):
    model = build("Llama")
    bits = torch.full((64, 2), 4)
    bits[5, 1] = 8
    apply(pack_linear(model, HERE, bits, SIZE), model)
    refused(model, tmp_path, rf"{HERE} has groups of 4, 8 bits, where the format has one number .*per='module'")
    refused(calibrated(build("Llama"), bits=4.5, group_size=32), tmp_path, "per='module'")


ALIKE = "bits, where 4 or 8 are read alike everywhere: .*per='module'"


@pytest.mark.parametrize(
    ("family", "how", "message"),
    [
        *(("Llama", {"bits": (bits,)}, f"q_proj is packed in {bits} {ALIKE}") for bits in (2, 3, 5, 6)),
        ("Llama", {"only": []}, "LlamaForCausalLM has no packed linear maps: compress with LRPConfig"),
        ("Llama", {"size": 24}, "reads 32 inputs, which are no whole groups of 24: .* group_size= that divides them"),
        ("GPT-2", {}, "c_attn is a Conv1D in Transformers, and .* packs Linear alone: save"),
        ("Mixtral", {}, r"writes model\.layers\.0\.\S*experts\.0\S* under a name that the model has not in memory"),
    ],
)
def test_maps_that_not_all_read_alike(family, how, message, tmp_path):
    refused(pack_all(build(family), **how), tmp_path, message)


def test_sparse_maps(tmp_path):
    model = build("Llama")
    mask = torch.ones(64, 32, dtype=torch.bool)
    mask[0, 0] = False
    apply(sparsify_linear(model, HERE, mask), model)
    message = rf"{HERE} was changed in a way \(SparsifyLinear\) that compressed-tensors cannot say: .*hf_compress\.save"
    refused(model, tmp_path, message)


@pytest.mark.parametrize("edit", ["bottleneck", "linear FFN", "narrow one FFN", "blended activation"])
def test_other_records(edit, tmp_path):
    model = pack_all(change(build("Llama"), edit))
    refused(model, tmp_path, r"was changed in a way \(\w+\) that compressed-tensors cannot say: save with hf_compress")


def test_narrower_ffns_that_the_config_says(tmp_path):
    """They are no record: the result loads."""
    folder = save_compressed_tensors(pack_all(change(build("Llama"), "narrow every FFN")), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 48


def test_models_that_transformers_does_not_know(tmp_path):
    class Own(type(build("Llama"))):
        pass

    model = pack_all(build("Llama"))
    model.__class__ = Own
    refused(model, tmp_path, r"Own is no model class of Transformers, .*without trust_remote_code")


def test_shared_maps(tmp_path):
    model = pack_all(build("Llama"))
    model.model.layers[2].mlp.gate_proj = model.model.layers[1].mlp.gate_proj
    refused(model, tmp_path, rf"{HERE} is shared with another module: save with hf_compress\.save")


def test_steps_that_half_precision_does_not_hold(tmp_path):
    model = in_dtype(build("Llama"), torch.float16)
    with torch.no_grad():
        model.get_submodule(HERE).weight *= 1e-4
    message = rf"{HERE} has steps from \S+e-\S+ to \S+, which torch\.float16 does not hold: load the model in bfloat16"
    refused(pack_all(model), tmp_path, message)


@pytest.fixture
def theirs(tmp_path):
    """A folder that holds something."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "theirs").write_text("keep me")
    return folder


def test_a_folder_that_holds_something(theirs):
    model, folder = pack_all(build("Llama")), theirs
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_compressed_tensors(model, folder)
    assert (folder / "theirs").read_text() == "keep me"
    assert save_compressed_tensors(model, folder, overwrite=True) == folder
    assert not (folder / "theirs").exists()


# --- what was written wrongly is not put in place ---------------------------------------------------------------------


def spoil_a_word(model, monkeypatch):
    own = written.encode

    def spoiled(module, dtype):
        tensors = own(module, dtype)
        if module is model.get_submodule(HERE):
            tensors["weight_packed"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(written, "encode", spoiled)
    return rf"what was written of {HERE} decodes to other weights than it has in memory"


def spoil_a_norm(model, monkeypatch):
    own = type(model).save_pretrained

    def spoiled(self, folder, state_dict):
        state_dict["model.norm.weight"] = state_dict["model.norm.weight"] + 1
        own(self, folder, state_dict=state_dict)

    monkeypatch.setattr(type(model), "save_pretrained", spoiled)
    return r"does not load as it is in memory: model\.norm\.weight has other values"


def spoil_the_config(model, monkeypatch):
    own = type(model).save_pretrained

    def spoiled(self, folder, state_dict):
        own(self, folder, state_dict=state_dict)
        path = Path(folder) / "config.json"
        path.write_text(path.read_text().replace('"num_bits": 8', '"num_bits": 4'))

    monkeypatch.setattr(type(model), "save_pretrained", spoiled)
    return r"config\.json does not say how the weights are packed, but"


def spoil_what_no_file_says(model, monkeypatch):
    model.model.layers[0].input_layernorm.variance_epsilon = 0.1
    return "the same tensors as the one in memory, but gives other outputs"


@pytest.mark.parametrize("spoil", [spoil_a_word, spoil_a_norm, spoil_the_config, spoil_what_no_file_says])
def test_fails_closed(spoil, tmp_path, monkeypatch):
    model = pack_all(build("Llama"))
    refused(model, tmp_path, spoil(model, monkeypatch), ParityError)


def test_an_interruption_leaves_what_was_there(theirs, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(written, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_compressed_tensors(pack_all(build("Llama")), theirs, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in theirs.iterdir()] == ["theirs"]


# --- without us -------------------------------------------------------------------------------------------------------

STOCK = """
import json, sys
sys.modules |= dict.fromkeys(filter(None, [sys.argv.pop(1)]))  # nobody finds a module that is None
import torch, transformers
outcomes = {}
for folder in sys.argv[1:]:
    ids = torch.load(f"{folder}/../ids.pt")
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    try:
        model = getattr(transformers, name).from_pretrained(folder).eval()
        with torch.no_grad():
            gap = (model(ids).logits - torch.load(f"{folder}.pt")).abs().max()
        outcomes[folder] = float(gap), str(model.dtype)
    except (RuntimeError, ImportError) as error:
        outcomes[folder] = type(error).__name__, str(error)
assert "hf_compress" not in sys.modules
print(json.dumps(outcomes))
"""


def stock(root, missing=""):
    """What stock Transformers makes of all folders: the largest difference of its logits, or an error, by name."""
    torch.save(IDS, root / "ids.pt")
    folders = [str(path) for path in root.iterdir() if path.is_dir()]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, missing, *folders], capture_output=True, text=True, timeout=300, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {Path(name).name: told for name, told in json.loads(done.stdout.strip().splitlines()[-1]).items()}


def saved(model, folder):
    save_compressed_tensors(model, folder)
    with torch.no_grad():
        torch.save(model(IDS).logits, f"{folder}.pt")


@pytest.mark.slow
def test_stock_transformers_gives_the_same_logits(tmp_path):
    """To the last bit on this processor; 1e-6 in float32 and 1e-2 in half precision are allowed elsewhere."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, dtype in dtypes.items():
        model = calibrated(in_dtype(build("Llama"), dtype), bits=6, group_size=32, per="module")
        saved(model, tmp_path / name)
        assert {len(m.packing.planes) for m in packed(model).values()} == {4, 8}
    for name in ("Qwen3", "BERT"):
        saved(pack_all(build(name)), tmp_path / name)
    saved(pack_all(build("Llama"), symmetric=False), tmp_path / "zeros")
    found = stock(tmp_path)
    zeros = found.pop("zeros")
    for name, (gap, dtype) in found.items():
        assert dtype == f"torch.{name if name in dtypes else 'float32'}"
        assert gap <= (1e-2 if name in ("bfloat16", "float16") else 1e-6)
    assert len(found) == 5
    if tuple(map(int, version("compressed-tensors").split(".")[:2])) < (0, 18):
        assert zeros[0] <= 1e-6
    else:  # it stops, and gives no other weights
        assert "ignore_mismatched_sizes" in zeros[1] or zeros[0] <= 1e-6


@pytest.mark.slow
def test_without_compressed_tensors_nothing_is_loaded(tmp_path):
    saved(pack_all(build("Llama")), tmp_path / "out")
    kind, message = stock(tmp_path, missing="compressed_tensors")["out"]
    assert kind == "ImportError"
    assert "compressed-tensors" in message
