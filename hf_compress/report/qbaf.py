"""A multilayer perceptron as a quantitative bipolar argumentation framework: who supports and who attacks whom.

Neurons are arguments; a positive weight is a support, a negative one an attack, and a bias is what an argument is worth
by itself. Of a network of thousands of neurons nobody can see anything; of one with its neurons merged, as ILLC does,
one can.

Source: SpArX (arXiv 2301.09559), section 3; N. Potyka, "Interpreting neural networks as quantitative argumentation
frameworks", AAAI 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx
import torch
from torch import Tensor, nn

from hf_compress.errors import UnsupportedModelError
from hf_compress.models.dense import DenseForClassification
from hf_compress.report.canvas import BLUE, GREY, INK, VERMILION, new_figure, picture_path, write_figure

Layer = tuple[str, int]  # "input", "hidden" or "output", and which of these


@torch.no_grad()
def qbaf(
    model: DenseForClassification, features: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> networkx.DiGraph:
    """The network as a graph of arguments.

    Args:
        model: without gates, with or without residual connections (then an argument reaches all later layers).
        features, classes: names of the inputs and outputs.

    Returns:
        A graph whose nodes have `label`, `layer` (0 for the inputs) and `bias`, and whose edges have `weight` and
        `relation`, "support" or "attack". Weights of 0 are no edges. `networkx.node_link_data` makes JSON of it.

    Raises:
        UnsupportedModelError: a model that is no dense network, or a gated one: there a product of two neurons enters.
        ValueError: as many names as there are not inputs or outputs.
    """
    if not isinstance(model, DenseForClassification) or model.config.gated:
        raise UnsupportedModelError(
            f"only a dense network without gates is a graph of weighted arguments; got {type(model).__name__}"
        )
    config = model.config
    labels = {
        "input": _names(features, config.input_size, "x", "features"),
        "output": _names(classes, model.classifier.out_features, "y", "classes"),
    }
    graph = networkx.DiGraph()
    _add(graph, ("input", 0), torch.zeros(config.input_size), labels["input"])
    # The stream as it depends on the arguments so far: a matrix (arguments, stream) for each layer, and a constant.
    stream: dict[Layer, Tensor] = {("input", 0): _map(model.embedding)}
    constant = _bias(model.embedding)
    blocks: Any = model.layers
    for index, block in enumerate(blocks):
        up, down = block.mlp.up_proj, block.mlp.down_proj
        layer = ("hidden", index + 1)
        names = [f"c{index + 1}.{unit}" for unit in range(up.out_features)]
        _add(graph, layer, constant @ _map(up) + _bias(up), names)
        _connect(graph, layer, {source: table @ _map(up) for source, table in stream.items()})
        stream = {**(stream if block.residual else {}), layer: _map(down)}
        constant = constant + _bias(down) if block.residual else _bias(down)
    last = ("output", len(model.layers) + 1)
    _add(graph, last, constant @ _map(model.classifier) + _bias(model.classifier), labels["output"])
    _connect(graph, last, {source: table @ _map(model.classifier) for source, table in stream.items()})
    return graph


def draw_qbaf(graph: networkx.DiGraph, path: str | Path, strongest: int = 300, title: str = "") -> Path:
    """Draw the graph, layer beside layer: supports are solid and blue, attacks dashed and red, the stronger the wider.

    Args:
        graph: as `qbaf` makes it.
        path: where to write it; PNG or SVG, by its ending.
        strongest: how many edges to draw, those of the largest weights.
        title: stands above it.

    Raises:
        ValueError: the ending is neither .png nor .svg; no edges to draw.
    """
    path = picture_path(path)
    edges = sorted(graph.edges(data=True), key=lambda edge: -abs(edge[2]["weight"]))[:strongest]
    if not edges:
        raise ValueError("there is no edge to draw: the graph has none, or strongest is 0")
    layers: dict[int, list[Any]] = {}
    for node, layer in graph.nodes(data="layer"):
        layers.setdefault(layer, []).append(node)
    longest = max(map(len, layers.values()))
    place = {
        node: (layer, (1 - (place + 0.5) / len(nodes)) * longest)
        for layer, nodes in layers.items()
        for place, node in enumerate(nodes)
    }
    figure = new_figure(1.6 * len(layers) + 1.6, max(3.0, 0.24 * longest + 0.8))
    axis = figure.add_subplot()
    widest = abs(edges[0][2]["weight"])
    for source, target, values in reversed(edges):
        support = values["relation"] == "support"
        (x0, y0), (x1, y1) = place[source], place[target]
        strength = abs(values["weight"]) / widest
        look = {"color": BLUE, "linestyle": "-"} if support else {"color": VERMILION, "linestyle": "--"}
        axis.plot([x0, x1], [y0, y1], linewidth=0.3 + 2.2 * strength, alpha=0.25 + 0.65 * strength, zorder=1, **look)
    axis.scatter(*zip(*place.values(), strict=True), s=60, color=GREY, edgecolor=INK, linewidth=0.6, zorder=2)
    for node, (x, y) in place.items():
        side, nudge = ("right", -0.08) if x == 0 else ("left", 0.08)
        if x in (0, max(layers)):
            axis.text(x + nudge, y, graph.nodes[node]["label"], ha=side, va="center", fontsize=7, color=INK)
    axis.set_xlim(-1.1, max(layers) + 0.8)
    axis.set_axis_off()
    axis.plot([], [], color=BLUE, label="supports")
    axis.plot([], [], color=VERMILION, linestyle="--", label="attacks")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    return write_figure(figure, path)


def _add(graph: networkx.DiGraph, layer: Layer, biases: Tensor, names: Sequence[str]) -> None:
    for unit, (bias, name) in enumerate(zip(biases.tolist(), names, strict=True)):
        graph.add_node((*layer, unit), label=name, layer=layer[1], bias=bias)


def _connect(graph: networkx.DiGraph, layer: Layer, tables: dict[Layer, Tensor]) -> None:
    """Edges from all arguments that reach a layer: tables (source units, units) by their layer."""
    for source, table in tables.items():
        for i, row in enumerate(table.tolist()):
            for j, weight in enumerate(row):
                if weight:
                    relation = "support" if weight > 0 else "attack"
                    graph.add_edge((*source, i), (*layer, j), weight=weight, relation=relation)


def _map(linear: nn.Linear) -> Tensor:
    return linear.weight.double().T


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features).double() if linear.bias is None else linear.bias.double()


def _names(given: Sequence[str] | None, count: int, letter: str, what: str) -> list[str]:
    if given is not None and len(given) != count:
        raise ValueError(f"{what} must be {count} names; got {len(given)}")
    return [f"{letter}{index}" for index in range(count)] if given is None else [str(name) for name in given]
