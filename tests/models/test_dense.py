"""The dense network against sums written out, in Transformers' Trainer and Auto classes, and under our own tools."""

import json
import subprocess
import sys
from math import erf, exp, sqrt

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from transformers import Trainer

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.calibration.data import Batch, DataOptions, prepare
from hf_compress.errors import CalibrationError
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.builders import narrow_ffn
from hf_compress.rewrite.probe import Probe
from hf_compress.storage.save import own_memory
from tests.helpers.ffns import hooked
from tests.helpers.runs import arguments

FEATURES = 6
ACTIVATIONS = {
    "relu": lambda z: max(z, 0.0),
    "silu": lambda z: z / (1 + exp(-z)),
    "gelu": lambda z: z * (1 + erf(z / sqrt(2))) / 2,
}
KINDS = {
    "plain": {},
    "gelu": {"hidden_act": "gelu"},
    "residual": {"residual": True},
    "gated": {"hidden_act": "silu", "gated": True},
    "gated residual without biases": {"hidden_act": "silu", "gated": True, "residual": True, "use_bias": False},
    "widths": {"intermediate_size": [7, 3, 5]},
    "square": {"intermediate_size": 5},
}


def dense(seed=0, **fields):
    """A tiny network with biases that are not zero."""
    torch.manual_seed(seed)
    base = {"input_size": FEATURES, "hidden_size": 5, "intermediate_size": 8, "num_hidden_layers": 3, "num_labels": 4}
    model = hfc.DenseForClassification(hfc.DenseConfig(**(base | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


def samples(count=16, seed=1):
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def kinds():
    return pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


# --- forward ----------------------------------------------------------------------------------------------------------


def affine(linear, h):
    bias = [0.0] * linear.out_features if linear.bias is None else linear.bias.tolist()
    rows = zip(linear.weight.tolist(), bias, strict=True)
    return [sum(w * v for w, v in zip(row, h, strict=True)) + b for row, b in rows]


def written_out(model, x):
    """The docstrings' formulas for one sample, a list of numbers."""
    config, act = model.config, ACTIVATIONS[model.config.hidden_act]
    h = affine(model.embedding, x)
    for block in model.layers:
        up = affine(block.mlp.up_proj, h)
        units = [act(z) for z in up]
        if config.gated:
            units = [act(g) * u for g, u in zip(affine(block.mlp.gate_proj, h), up, strict=True)]
        written = affine(block.mlp.down_proj, units)
        h = [a + b for a, b in zip(h, written, strict=True)] if config.residual else written
    return affine(model.classifier, h)


@kinds()
def test_forward(fields):
    model, x = dense(**fields).double(), samples(3).double()
    expected = torch.tensor([written_out(model, row) for row in x.tolist()], dtype=torch.double)
    torch.testing.assert_close(logits(model, x), expected)
    assert [block.mlp.up_proj.out_features for block in model.layers] == model.config.intermediate_size


def test_output_as_a_tuple():
    model, x = dense(), samples()
    assert torch.equal(model(x, return_dict=False)[0], model(x).logits)
    assert len(model(x, labels=torch.zeros(16, dtype=torch.long), return_dict=False)) == 2


def test_inputs_take_the_dtype_of_the_weights():
    model, x = dense(), samples()
    assert torch.equal(logits(model, x.double()), logits(model, x))
    assert logits(dense().bfloat16(), x).dtype == torch.bfloat16
    assert model.dummy_inputs["input_values"].shape == (2, FEATURES)


def test_first_weights():
    model = dense(hidden_size=400, intermediate_size=100, num_hidden_layers=1)
    assert float(model.layers[0].mlp.down_proj.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert float(model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(0.05, rel=0.05)
    model = dense(hidden_size=400, intermediate_size=100, num_hidden_layers=1, initializer_range=0.5)
    assert float(model.layers[0].mlp.down_proj.weight.detach().std()) == pytest.approx(0.5, rel=0.05)


# --- loss -------------------------------------------------------------------------------------------------------------

LABELS = torch.Generator().manual_seed(2)
INDICES = torch.randint(4, (16,), generator=LABELS)
SEVERAL = torch.randint(2, (16, 4), generator=LABELS)
TARGETS = torch.randn(16, 4, generator=LABELS)
LOSSES = {
    "classes": ({}, INDICES, lambda z: torch.nn.functional.cross_entropy(z, INDICES)),
    "classes of few bits": ({}, INDICES.to(torch.uint8), lambda z: torch.nn.functional.cross_entropy(z, INDICES)),
    "several labels": (
        *({}, SEVERAL.float()),
        lambda z: torch.nn.functional.binary_cross_entropy_with_logits(z, SEVERAL.float()),
    ),
    "several labels as whole numbers": (
        *({"problem_type": "multi_label_classification"}, SEVERAL),
        lambda z: torch.nn.functional.binary_cross_entropy_with_logits(z, SEVERAL.float()),
    ),
    "one target": ({"num_labels": 1}, TARGETS[:, 0].double(), lambda z: (z[:, 0] - TARGETS[:, 0]).square().mean()),
    "targets": ({"problem_type": "regression"}, TARGETS, lambda z: (z - TARGETS).square().mean()),
}


def losses():
    return pytest.mark.parametrize(("fields", "labels", "oracle"), LOSSES.values(), ids=LOSSES)


@losses()
def test_loss(fields, labels, oracle):
    model, x = dense(**fields), samples()
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, oracle(output.logits))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def train(model, data, folder, **settings):
    trainer = Trainer(model, arguments(folder, **settings), train_dataset=data)
    trainer.train()
    return trainer


@losses()
def test_accumulated_gradients_are_those_of_one_batch(fields, labels, oracle, tmp_path):
    """One step of plain gradient descent tells the gradient."""
    x = samples()
    data = Dataset.from_dict({"input_values": x.tolist(), "labels": labels.tolist()})
    moved = []
    for steps in (1, 4):
        model = dense(**fields)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batches = {"per_device_train_batch_size": 16 // steps, "gradient_accumulation_steps": steps}
        train(model, data, tmp_path, optim="sgd", learning_rate=0.1, max_steps=1, **batches)
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, step in moved[0].items():
        assert step.abs().max() > 1e-6
        torch.testing.assert_close(moved[1][name], step, rtol=1e-4, atol=1e-7)


def test_digits_are_learned_in_one_epoch(tmp_path):
    digits = load_digits()
    x, y = digits.data.astype(np.float32) / 16, digits.target
    order = np.random.default_rng(0).permutation(len(x))
    parts = dict(zip(("train", "test"), np.split(order, [1400]), strict=True))
    sets = {n: Dataset.from_dict({"input_values": x[i].tolist(), "label": y[i].tolist()}) for n, i in parts.items()}
    torch.manual_seed(0)
    model = hfc.DenseForClassification(hfc.DenseConfig(input_size=64, hidden_size=32, num_labels=10))
    trainer = train(model, sets["train"], tmp_path, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=32)
    predicted = trainer.predict(sets["test"]).predictions.argmax(-1)
    assert (predicted == y[parts["test"]]).mean() > 0.8


# --- Transformers' Auto classes ---------------------------------------------------------------------------------------

LOADING = """
import sys
{imports}
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
expected = load_file(sys.argv[1] + "/expected.tensors")
print(all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()))
from hf_compress.storage.save import own_memory
own_memory(model)  # and the inputs too, since kernels round differently in a mapped file
with torch.no_grad():
    print(type(model).__name__, torch.equal(model(expected["x"].clone()).logits, expected["logits"]))
"""


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_compress",
        *(
            pytest.param(imports, marks=pytest.mark.slow)
            for imports in (
                "import transformers.trainer\nimport hf_compress",
                "from transformers import AutoConfig, AutoModelForSequenceClassification\nimport hf_compress",
                "import hf_compress\nimport transformers.modeling_utils",
                "import hf_compress.models.dense",
            )
        ),
    ],
)
def test_the_package_alone_is_enough_to_load_it(imports, tmp_path):
    model, x = dense(**KINDS["widths"]), samples()
    model.save_pretrained(tmp_path)
    save_file(model.state_dict() | {"x": x, "logits": logits(model, x)}, tmp_path / "expected.tensors")
    loaded = run(LOADING.format(imports=imports), str(tmp_path))
    assert loaded == ["DenseConfig", "True", "DenseForClassification", "True"]


def test_a_config_alone_does_not_import_the_model(tmp_path):
    hfc.DenseConfig().save_pretrained(tmp_path)
    code = "import sys, hf_compress\nfrom transformers import AutoConfig\nAutoConfig.from_pretrained(sys.argv[1])\n"
    names = ("hf_compress.models.dense", "transformers.modeling_utils")
    assert run(f"{code}print(*[name in sys.modules for name in {names}])", str(tmp_path)) == ["False", "False"]


def test_the_names_are_public():
    code = "import hf_compress as hfc, sys; print('torch' in sys.modules, hfc.models.DenseConfig is hfc.DenseConfig)"
    assert run(code) == ["False", "True"]
    assert dir(hfc.models) == ["DenseConfig", "DenseForClassification", "from_scikit_learn", "from_sequential"]
    with pytest.raises(AttributeError, match="has no attribute 'Dense'"):
        hfc.models.Dense  # noqa: B018


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "kept", "written"), [(8, [8, 8], 8), ([8, 8], [8, 8], 8), ((8, 4), [8, 4], [8, 4])])
def test_widths_in_the_config_and_in_its_file(given, kept, written, tmp_path):
    config = hfc.DenseConfig(intermediate_size=given, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    assert config.intermediate_size == kept
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["intermediate_size"] == written
    assert hfc.DenseConfig.from_pretrained(tmp_path).intermediate_size == kept
    assert hfc.DenseConfig().num_labels == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": 0}, "input_size must be a whole number of at least 1; got 0"),
        ({"hidden_size": 2.0}, "hidden_size must be a whole number of at least 1; got 2.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"num_labels": 0}, "num_labels must be a whole number of at least 1; got 0"),
        ({"intermediate_size": 0}, "intermediate_size must be a whole number of at least 1; got 0"),
        ({"intermediate_size": [4, 0, 4]}, "intermediate_size must be a whole number of at least 1; got 0"),
        ({"intermediate_size": [4, 4]}, "one width for each of num_hidden_layers=3 blocks; got 2 .*: give as many"),
        ({"hidden_act": "rectified"}, "hidden_act must be .* such as relu, gelu or silu .*; got 'rectified'"),
        ({"hidden_act": None}, "hidden_act must be .*; got None"),
        ({"gated": 1}, "gated must be True or False; got 1"),
        ({"initializer_range": 0}, "initializer_range must be a number above 0"),
        ({"initializer_range": float("nan")}, "initializer_range must be a number above 0"),
        ({"problem_type": "ranking"}, "problem_type must be one of regression, .*; got 'ranking'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        dense(**fields)


def test_a_config_that_was_changed_is_checked_again():
    config = hfc.DenseConfig(num_hidden_layers=3)
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="one width for each of num_hidden_layers=2 blocks; got 3"):
        hfc.DenseForClassification(config)


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 5), torch.zeros(6), torch.zeros(2, 3, 2), torch.zeros(2, 6, dtype=torch.long)]
)
def test_bad_inputs(x):
    with pytest.raises(ValueError, match=r"input_values must be floats of the shape \(samples, 6\); got .*flatten"):
        dense()(x)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [({}, INDICES.float()), ({"problem_type": "regression"}, TARGETS[:, 0]), ({"num_labels": 1}, TARGETS)],
)
def test_bad_labels(fields, labels):
    with pytest.raises(ValueError, match="labels must be as many as logits"):
        dense(**fields)(samples(), labels=labels)


# --- our own tools ----------------------------------------------------------------------------------------------------


@kinds()
def test_anatomy(fields):
    model = dense(**fields)
    stacks = hfc.Anatomy(model).stacks
    assert [(stack.path, len(stack)) for stack in stacks] == [("layers", 3)]
    for index, width in enumerate(model.config.intermediate_size):
        ffn = hfc.Anatomy(model).parts(stacks[0], index).ffn
        gates = ("mlp.gate_proj",) if model.config.gated else ()
        assert ffn.kind == ("gated" if gates else "plain")
        assert ffn.inputs == (*gates, "mlp.up_proj")
        assert (ffn.output, ffn.activation, ffn.width) == ("mlp.down_proj", "mlp.act_fn", width)


@pytest.mark.parametrize("fields", [{}, {"residual": True}, {"hidden_act": "silu", "gated": True, "residual": True}])
def test_layer_collapse(fields, tmp_path):
    model, x = dense(**fields, hidden_size=4), samples(64)
    seen = []
    handles = [
        block.mlp.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        for block in model.layers
    ]
    with hooked(*handles):
        before = logits(model, x)
    config = hfc.LayerCollapseConfig(num_layers=1, penalty=1e-9)
    hfc.compress(model, config, calibration={"input_values": x}, options=DataOptions(batch_size=8))
    after = logits(model, x)
    index = next(i for i, block in enumerate(model.layers) if not hasattr(block.mlp, "act_fn"))
    inputs, output = (tensor[:, 0].double() for tensor in seen[index])
    ones = torch.ones(len(x), 1, dtype=torch.double)
    best = torch.cat([inputs, ones], 1) @ torch.linalg.lstsq(torch.cat([inputs, ones], 1), output).solution
    got = model.layers[index].mlp(seen[index][0])[:, 0].double()
    torch.testing.assert_close(got, best, rtol=1e-3, atol=1e-4)
    assert not torch.equal(after, before)
    hfc.save(model, tmp_path / "out", probe=Batch({"input_values": x}, None))
    loaded = hfc.DenseForClassification.from_pretrained(tmp_path / "out").eval()
    own_memory(loaded)
    assert torch.equal(logits(loaded, x), after)


@pytest.mark.parametrize("widths", [[4, 4, 4], [6, 2, 3], [6, 8, 3]])
@pytest.mark.parametrize("fields", [{}, {"hidden_act": "silu", "gated": True, "residual": True}])
def test_narrower_ffns_are_said_by_the_config_alone(widths, fields, tmp_path):
    model, x = dense(**fields), samples()
    stack = Anatomy(model).stack()
    drafts = [narrow_ffn(Block(model, stack, index), list(range(width))) for index, width in enumerate(widths)]
    apply(sum(drafts, start=Plan()), model, Probe.of(model, Batch({"input_values": x}, None)))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["intermediate_size"] == (4 if widths == [4, 4, 4] else widths)
    assert "quantization_config" not in saved
    loaded = hfc.DenseForClassification.from_pretrained(tmp_path).eval()
    own_memory(loaded)
    assert torch.equal(logits(loaded, x), logits(model, x))


def test_a_block_less():
    model, x = dense(residual=True, intermediate_size=[7, 3, 5]), samples()
    data = {"input_values": x}
    hfc.compress(model, hfc.DropBlocksConfig(num_blocks=1, criterion="last"), calibration=data)
    assert model.config.intermediate_size == [7, 3]
    assert model.config.num_hidden_layers == 2


# --- calibration data -------------------------------------------------------------------------------------------------

DATA = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "mapping of tensors": lambda x: {"input_values": x, "labels": torch.zeros(len(x))},
    "mapping of arrays": lambda x: {"input_values": x.numpy()},
    "dataset": lambda x: Dataset.from_dict({"input_values": x.tolist(), "label": [0] * len(x)}),
    "dataset in numpy's format": lambda x: Dataset.from_dict({"input_values": x.numpy()}).with_format("numpy"),
}


@pytest.mark.parametrize("form", DATA.values(), ids=DATA)
def test_every_kind_of_calibration_data(form):
    x = samples(10)
    data = prepare(form(x), dense(), None, DataOptions(batch_size=4))
    assert [batch.samples for batch in data] == [4, 4, 2]
    assert [list(batch.inputs) for batch in data] == [["input_values"]] * 3
    assert all(batch.real is None for batch in data)
    torch.testing.assert_close(torch.cat([batch.inputs["input_values"] for batch in data]), x)


def test_samples_of_different_lengths():
    data = Dataset.from_dict({"input_values": [[1.0, 2.0], [1.0]]})
    with pytest.raises(CalibrationError, match=r"input_values have different shapes.* pad them"):
        prepare(data, dense(), None)


def test_no_samples():
    with pytest.raises(CalibrationError, match="empty"):
        prepare({"input_values": np.zeros((0, FEATURES))}, dense(), None)
