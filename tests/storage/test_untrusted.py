"""What a downloaded repository cannot do: leave weights out, run programs, name files elsewhere, ask for the absurd."""

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_compress.errors import PlanError
from hf_compress.rewrite.probe import quiet
from tests.helpers.untrusted import check, config_of, copied, is_plain, load, write_config

# --- weights that are missing -----------------------------------------------------------------------------------------


def rewrite(folder, change):
    """Apply `change` to the dict of tensors of every file with weights, and to the index if there is one."""
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text()) if index.exists() else {"weight_map": {}}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = safetensors.torch.load(file.read_bytes())
        change(tensors)
        file.unlink()  # it may be linked to another checkpoint
        file.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        places["weight_map"] |= dict.fromkeys(tensors, file.name)
    if index.exists():
        index.write_text(json.dumps(places))


def altered(source, fields=None, record=None):
    """What comes of loading a checkpoint with other fields in its config, and in the record there."""
    with copied(source) as folder:
        config = config_of(folder) | (fields or {})
        if record:
            config["quantization_config"] |= record
        write_config(folder, config)
        return load(folder)


def without(folder, part):
    """The same files, less the tensors with `part` in their names."""

    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    rewrite(folder, change)
    return folder


def missing(folder, auto=AutoModelForCausalLM, **options):
    """The message of the refusal to load, which has to say that tensors are missing."""
    error = load(folder, auto, **options)
    assert isinstance(error, PlanError), error
    assert "(missing)" in str(error)
    return str(error)


ENCODER = "layers.1.residual_bottleneck.encoder"
RECORDED = [
    ("Llama", "layers.0.mlp.up_proj.weight"),
    ("Llama", "layers.1.residual_bottleneck.center"),
    ("Llama", "layers.2.self_attn.o_proj.weight"),
    ("Llama", "layers.2.self_attn.o_proj.bits"),
    ("Llama", "layers.3.mlp.act_fn.alpha"),
    ("Mixtral", "layers.0.block_sparse_moe.experts"),
    ("GPT-2", "h.0.mlp.c_proj.bias"),
    ("GPT-2", "h.2.attn.c_proj.steps"),
    ("Qwen3", "q_norm.inner.weight"),
    ("Qwen3", "act_fn.alpha"),
]


@pytest.mark.parametrize(("family", "name"), RECORDED)
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_a_missing_tensor_of_the_record_is_named(auto, family, name, checkpoints):
    with copied(checkpoints[family]) as folder:
        message = missing(without(folder, name), auto)
        assert name.rpartition(".experts")[0].replace("block_sparse_moe", "mlp") in message


def test_half_a_mixture_is_of_another_shape(checkpoints):
    with copied(checkpoints["Mixtral"]) as folder:
        assert is_plain(load(without(folder, "layers.0.block_sparse_moe.experts.2.")))
        assert "of another shape" in str(load(folder, ignore_mismatched_sizes=True))


def test_any_other_missing_tensor_is_named_where_nothing_may_be_missing(checkpoints):
    with copied(checkpoints["Llama"]) as folder:
        assert "model.norm.weight" in missing(without(folder, "model.norm.weight"))


def test_a_new_head_is_made_up(checkpoints):
    for source in checkpoints.values():
        _, report = load(source, AutoModelForSequenceClassification)
        assert report["missing_keys"] == {"score.weight"}
        _, report = load(source, AutoModel)
        assert not report["missing_keys"]


def test_one_of_two_tied_weights_is_enough(checkpoints):
    def to_the_head(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    with copied(checkpoints["Llama"]) as folder:
        rewrite(folder, to_the_head)
        model, _ = load(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "embed_tokens" in missing(without(folder, "lm_head"))


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_shards(family, checkpoints, tmp_path):
    model, _ = load(checkpoints[family])
    with quiet():
        model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not isinstance(check(tmp_path), Exception)
    assert ENCODER in missing(without(tmp_path, ENCODER))


def test_names_without_the_name_of_the_body(checkpoints, tmp_path):
    body, _ = load(checkpoints["Llama"], AutoModel)
    with quiet():
        body.save_pretrained(tmp_path)
    write_config(tmp_path, config_of(tmp_path) | {"architectures": ["LlamaForCausalLM"]})
    assert not isinstance(check(tmp_path), Exception)
    assert f"model.{ENCODER}" in missing(without(tmp_path, ENCODER))


def test_weights_that_stay_on_the_disk(checkpoints, tmp_path):
    layers = [f"model.layers.{i}" for i in range(4)]
    parts = ["model.embed_tokens", *layers, "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(parts, "cpu") | {layers[1]: "disk"}
    on_disk = {"device_map": places, "offload_folder": tmp_path}
    with copied(checkpoints["Llama"]) as folder:
        model, _ = load(folder, **on_disk)
        assert model.model.layers[1].residual_bottleneck.encoder.device.type == "meta"
        assert f"model.{ENCODER}" in missing(without(folder, ENCODER), **on_disk)


def test_tied_weights_cannot_be_changed(checkpoints):
    edits = [
        {"edit": "PackLinear", "module": "lm_head", "group_size": 8, "planes": [99 * 4] * 2},
        {"edit": "Seal", "module": "model.embed_tokens"},
    ]
    for edit in edits:
        assert isinstance(error := altered(checkpoints["Llama"], record={"plan": [edit]}), PlanError)
        assert "tied" in str(error)


# --- programs in the repository ---------------------------------------------------------------------------------------


class Program:
    """What a pickle can hold: loading it touches a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}])
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_pickles_are_not_even_opened(kind, options, dtype, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with copied(checkpoints["Llama"]) as folder:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Program(tmp_path / "trace")}))
        if kind != "pytorch_model.bin":
            index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin", "x": "x.safetensors"}}
            (folder / kind).write_text(json.dumps(index))
            (folder / "x.safetensors").write_bytes(safetensors.torch.save({"x": torch.ones(1)}))
        write_config(folder, config_of(folder) | {"dtype": dtype})
        error = load(folder, **options)
        assert isinstance(error, PlanError)
        assert "safetensors files alone" in str(error) or "does not have" in str(error)
    assert not (tmp_path / "trace").exists()


def test_code_in_the_repository_is_not_run(checkpoints, tmp_path):
    program = f"from pathlib import Path\nPath({str(tmp_path / 'trace')!r}).touch()\n"
    with copied(checkpoints["Llama"]) as folder:
        (folder / "custom_generate").mkdir()
        for name in ("modeling_x.py", "custom_generate/generate.py", "__init__.py", "hf_compress.py"):
            (folder / name).write_text(program)
        auto_map = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.XConfig"}
        write_config(folder, config_of(folder) | {"auto_map": auto_map})
        assert not isinstance(check(folder), Exception)
    assert not (tmp_path / "trace").exists()


def test_an_index_names_no_files_elsewhere(checkpoints, tmp_path):
    model, _ = load(checkpoints["Llama"])
    with quiet():
        model.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    index = tmp_path / "out" / "model.safetensors.index.json"
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.rename(tmp_path / file.name)
        index.write_text(index.read_text().replace(f'"{file.name}"', f'"../{file.name}"'))
    assert "outside of the checkpoint" in str(load(tmp_path / "out"))


# --- what takes long, or much memory ----------------------------------------------------------------------------------

LARGE = {"edit": "ReplaceActivation", "activation": "model.layers.0.mlp.act_fn", "blend": "constant"}
SAME = {"edit": "Seal", "module": "model.norm"}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("Llama", {"num_hidden_layers": 10**9}),
        ("Llama", {"num_hidden_layers": 1000}),
        ("Llama", {"vocab_size": 2**31 - 1}),
        ("Llama", {"vocab_size": 2**60}),
        ("Llama", {"hidden_size": 2**24}),
        ("Mixtral", {"num_local_experts": 10**9}),
        ("Mixtral", {"num_local_experts": 10**4, "num_hidden_layers": 10**3}),
        ("Mixtral", {"num_local_experts": 10**4, "intermediate_size": 2**24}),
        ("GPT-2", {"n_layer": 10**6}),
        ("GPT-2", {"n_positions": 2**31 - 1}),
        ("GPT-2", {"n_inner": 2**30}),
    ],
)
def test_absurd_sizes(family, change, checkpoints):
    assert isinstance(error := altered(checkpoints[family], change), PlanError), error


@pytest.mark.parametrize(
    "plan",
    [
        [LARGE | {"width": 2**31 - 1}],
        [LARGE | {"width": 2**31}],
        [SAME] * 100_001,
        [SAME] * 100_000,
        [SAME | {"module": f"model.norm{'.inner' * index}"} for index in range(100)],
        [SAME | {"module": f"model.layers.{index}"} for index in range(10**5)],
        [{"edit": "NarrowFFN", "inputs": "<paths>", "output": "model.layers.0.mlp.down_proj", "width": 8}],
        [{"edit": "<long text>"}],
        [{"edit": "Seal", "<long text>": 1}],
        [{"edit": "Seal", "module": "<long path>"}],
        [{"edit": "PackLinear", "module": "lm_head", "group_size": 8, "planes": "<long list>"}],
        [{"edit": "ReplaceActivation", "activation": "model", "blend": "<long text>"}],
        [{"edit": "InsertBottleneck", "block": "model", "hidden": 8, "width": 8, "skip": "<long text>"}],
    ],
    ids=range(13),
)
def test_absurd_plans(plan, checkpoints):
    assert isinstance(error := altered(checkpoints["Llama"], record={"plan": plan}), PlanError), error
    assert len(str(error)) < 2000


# --- records that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [{"version": 2}, {"version": "<long text>"}, {"version": True}, {"version": None}])
@pytest.mark.parametrize("plan", [[], None, {}, "", 0, [None], [[]], [{}]])
def test_malformed_records(record, plan, checkpoints):
    assert isinstance(altered(checkpoints["Llama"], record=record), PlanError)
    assert is_plain(altered(checkpoints["Llama"], record={"version": 1, "plan": plan}))


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"unknown": 1}, PlanError),
        ({"modules_to_not_convert": ["x"], "<long text>": 1}, PlanError),
        ({"quant_method": "hf_compress2"}, RuntimeError),  # warned of and passed over, then sizes do not fit
        # Transformers' own errors, before this library is asked.
        ({"quant_method": None}, ValueError),
        ({"quant_method": ["hf_compress"]}, TypeError),
        ({"quant_method": "gptq"}, (ImportError, TypeError, ValueError)),
    ],
)
def test_records_of_others(record, error, checkpoints):
    assert isinstance(found := altered(checkpoints["Llama"], record=record), error), found


def test_no_record(checkpoints):
    assert "ignore_mismatched_sizes" in str(altered(checkpoints["Llama"], {"quantization_config": None}))
    assert isinstance(altered(checkpoints["Llama"], {"quantization_config": {}}), ValueError)


@pytest.mark.parametrize("record", [[], "", 0, False, "hf_compress", 1, [1], True])
def test_records_of_a_wrong_type_fail_in_transformers(record, checkpoints):
    assert isinstance(altered(checkpoints["Llama"], {"quantization_config": record}), AttributeError)


@pytest.mark.parametrize("named", [".", [], {"AutoModel": 5}, {"AutoModel": "modeling_hf_compress.Gone"}])
def test_an_auto_map_of_any_kind_is_none_of_our_business(named, checkpoints):
    with copied(checkpoints["Llama"]) as folder:
        write_config(folder, config_of(folder) | {"auto_map": named})
        assert not isinstance(check(folder), Exception)
