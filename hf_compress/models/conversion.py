"""Multilayer perceptrons of scikit-learn and PyTorch as `DenseForClassification`, the same function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.models.dense import DenseForClassification
from hf_compress.models.dense_config import DenseConfig
from hf_compress.numerics.defaults import torch_defaults

_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "logistic": "sigmoid", "identity": "linear"}  # scikit-learn's names
_MODULES = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}


def from_scikit_learn(network: Any) -> DenseForClassification:
    """A fitted `MLPClassifier` or `MLPRegressor` as a dense network; probabilities or predictions are the same.

    Of a classifier of two classes, which has one output z, the logits are -z / 2 and z / 2.

    Raises:
        TypeError: no such network.
        ValueError: it is not fitted, or for several labels at once.
    """
    if not all(hasattr(network, name) for name in ("activation", "hidden_layer_sizes", "fit")):
        raise TypeError(f"expected scikit-learn's MLPClassifier or MLPRegressor; got {type(network).__name__}")
    if not hasattr(network, "coefs_"):
        raise ValueError(f"this {type(network).__name__} is not fitted yet: call fit first")
    maps = [torch.tensor(table, dtype=torch.float32) for table in network.coefs_]
    biases = [torch.tensor(table, dtype=torch.float32) for table in network.intercepts_]
    if network.out_activation_ == "logistic":
        if network.n_outputs_ > 1:
            raise ValueError("a classifier for several labels at once cannot be converted: train one for each")
        maps[-1], biases[-1] = (torch.cat([-table, table], dim=-1) / 2 for table in (maps[-1], biases[-1]))
    regression = network.out_activation_ == "identity"
    return dense_network(maps, biases, _ACTIVATIONS[network.activation], "regression" if regression else None)


def from_sequential(network: nn.Sequential) -> DenseForClassification:
    """`nn.Sequential` of linear layers with one kind of activation between them, as a dense network.

    Raises:
        ValueError: other layers, or an order other than Linear, activation, Linear, …, Linear. Dropout is left out.
    """
    layers = [layer for layer in network if not isinstance(layer, (nn.Dropout, nn.Flatten))]
    linears, between = layers[::2], layers[1::2]
    kinds = {_MODULES.get(type(layer)) for layer in between}
    if len(layers) < 3 or len(layers) % 2 == 0 or len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"expected Linear, activation, Linear, …, Linear with one of {', '.join(c.__name__ for c in _MODULES)}; "
            f"got {', '.join(type(layer).__name__ for layer in network)}"
        )
    maps, biases = [], []
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"expected a Linear layer between activations; got {type(linear).__name__}")
        maps.append(linear.weight.detach().T)
        biases.append(torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach())
    return dense_network(maps, biases, str(kinds.pop()))


@torch_defaults()
@torch.no_grad()
def dense_network(
    maps: Sequence[Tensor], biases: Sequence[Tensor], activation: str, problem: str | None = None
) -> DenseForClassification:
    """The dense network a_l = act(a_{l-1} W_l + b_l), whose last layer has no activation.

    A block has two maps between its activation and the next, where the perceptron has one. The embedding takes the
    first, a down projection each of the others and up projections are the identity; the classifier takes the last.

    Args:
        maps: W of each layer, (inputs, outputs), at least two.
        biases: (outputs) of each.
        activation: of `transformers.activations.ACT2FN`.
        problem: the config's problem_type.
    """
    widths = [table.shape[1] for table in maps[:-1]]
    stream = max(widths)
    fields: dict[str, Any] = {
        "input_size": maps[0].shape[0],
        "hidden_size": stream,
        "intermediate_size": widths,
        "num_hidden_layers": len(widths),
        "hidden_act": activation,
        "num_labels": maps[-1].shape[1],
        "problem_type": problem,
    }
    model = DenseForClassification(DenseConfig(**fields))
    for parameter in model.parameters():
        parameter.zero_()
    _fill(model.embedding, maps[0], biases[0])
    tables, added = [*maps[1:-1], torch.eye(widths[-1])], [*biases[1:-1], torch.zeros(widths[-1])]
    blocks: Any = model.layers
    for block, width, table, bias in zip(blocks, widths, tables, added, strict=True):
        _fill(block.mlp.up_proj, torch.eye(width), torch.zeros(width))
        _fill(block.mlp.down_proj, table, bias)
    _fill(model.classifier, maps[-1], biases[-1])
    return model.eval()


def _fill(linear: nn.Linear, table: Tensor, bias: Tensor) -> None:
    """Put a map (inputs, outputs) and a bias into the first rows and columns of a larger one."""
    inputs, outputs = table.shape
    linear.weight[:outputs, :inputs] = table.T
    linear.bias[:outputs] = bias
