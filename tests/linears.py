"""The linear maps that LRP changes."""

import copy

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import is_linear
from hf_compress.anatomy.undo import Undo
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import split_experts


def linears(model):
    """The plain linear maps in the blocks, by path; of experts in tensors, those that they have once they are apart."""
    blocks = f"{Anatomy(model).stack().path}."
    tables = [name for name, tensor in model.named_parameters() if tensor.ndim == 3 and name.startswith(blocks)]
    if tables:
        model = copy.deepcopy(model)
        for mixture in {name.rpartition(".")[0] for name in tables}:
            carry_out(split_experts(model, mixture), model, Undo())
    return {name: module for name, module in model.named_modules() if name.startswith(blocks) and is_linear(module)}
