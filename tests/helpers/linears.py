"""Models whose maps LRP and ILLC change, the data to calibrate on, and how linear maps are stored afterwards."""

import copy

import torch

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import is_linear, linear_map
from hf_compress.anatomy.undo import Undo
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sparse import SparseLinear
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import pack_linear, split_experts
from tests.helpers.round_trip import build

IDS = torch.randint(4, 90, (32, 12), generator=torch.Generator().manual_seed(7))
PIXELS = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(7))
FLOATS = torch.randn(40, 6, generator=torch.Generator().manual_seed(7))


def dense(**fields):
    """Without biases, so that relevance is gradient times input."""
    torch.manual_seed(0)
    sizes = {"input_size": 6, "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 3, "num_labels": 3}
    return hfc.DenseForClassification(hfc.DenseConfig(**sizes | {"use_bias": False} | fields)).eval()


def made(name):
    """A model of a family; 32 wide where there is a choice."""
    return dense(hidden_size=32, intermediate_size=64) if name == "Dense" else build(name)


def data_of(model):
    return {"pixel_values": PIXELS, "input_values": FLOATS}.get(model.main_input_name, IDS)


def linears(model):
    """The plain linear maps in the blocks, by path; of experts in tensors, those that they have once they are apart."""
    blocks = f"{Anatomy(model).stack().path}."
    tables = [name for name, tensor in model.named_parameters() if tensor.ndim == 3 and name.startswith(blocks)]
    if tables:
        model = copy.deepcopy(model)
        for mixture in {name.rpartition(".")[0] for name in tables}:
            carry_out(split_experts(model, mixture), model, Undo())
    return modules_of(model)


def modules_of(model):
    """The linear modules in the blocks, by path."""
    blocks = f"{Anatomy(model).stack().path}."
    return {name: module for name, module in model.named_modules() if name.startswith(blocks) and is_linear(module)}


def pack_all(model, symmetric=True, bits=(4, 8), size=16, only=None):
    """Every linear map of the blocks in one number of bits, by turns."""
    plan = Plan()
    for turn, (path, module) in enumerate(modules_of(model).items()):
        if only is None or path in only:
            inputs, outputs = linear_map(module).shape
            own = torch.full((outputs, -(-inputs // size)), bits[turn % len(bits)])
            plan += pack_linear(model, path, own, size, symmetric)
    apply(plan, model)
    return model


def stored(model, kind):
    """The maps that are stored otherwise, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def weight_of(module):
    """(outputs, inputs), whatever the module."""
    return module.unpacked().detach() if hasattr(module, "unpacked") else linear_map(module).T.detach()


def mask_of(module):
    """The ones of a mask, bit by bit."""
    ones = [byte >> place & 1 for byte in module.mask.tolist() for place in range(8)]
    shape = (module.out_features, module.in_features)
    return torch.tensor(ones[: shape[0] * shape[1]]).view(shape).bool()


def masks(model):
    return {name: mask_of(module) for name, module in stored(model, SparseLinear).items()}


def buffer_bytes(model):
    """Bytes of all that the maps store, beside biases."""
    maps = [*stored(model, SparseLinear).values(), *stored(model, MixedPrecisionLinear).values()]
    return sum(t.numel() * t.element_size() for m in maps for n, t in m.state_dict().items() if n != "bias")


def lrp(model, data=None, **settings):
    """The model, compressed by LRP with these settings."""
    data = data_of(model) if data is None else data
    return hfc.compress(model, hfc.LRPConfig(**settings), data, options=hfc.DataOptions(batch_size=8))


def illc(model, data=None, batch_size=8, **settings):
    """The model, compressed by ILLC with these settings."""
    data = data_of(model) if data is None else data
    return hfc.compress(model, hfc.ILLCConfig(**settings), data, options=hfc.DataOptions(batch_size=batch_size))
