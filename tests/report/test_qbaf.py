"""A network as a graph of arguments: the graph computes what the network computes, and is drawn."""

import networkx
import pytest
import torch

from hf_compress.errors import UnsupportedModelError
from hf_compress.report.qbaf import draw_qbaf, qbaf
from tests.helpers.ffns import noise
from tests.helpers.relevance import dense
from tests.helpers.tiny import tiny_model


def network(**fields):
    sizes = {"input_size": 3, "hidden_size": 5, "intermediate_size": [4, 2], "num_hidden_layers": 2, "num_labels": 2}
    return dense(**sizes, hidden_act="tanh", **fields)


def strengths(graph, sample):
    """What each argument comes to, from the inputs up: its bias and what supports and attacks bring, then tanh."""
    value = {}
    last = max(layer for _, layer in graph.nodes(data="layer"))
    for node, values in sorted(graph.nodes(data=True), key=lambda entry: entry[1]["layer"]):
        if values["layer"] == 0:
            value[node] = sample[node[2]].item()
            continue
        total = values["bias"]
        for source, _, edge in graph.in_edges(node, data=True):
            assert (edge["weight"] > 0) == (edge["relation"] == "support")
            total += edge["weight"] * value[source]
        value[node] = total if values["layer"] == last else torch.tanh(torch.tensor(total)).item()
    return [value[node] for node, layer in graph.nodes(data="layer") if layer == last]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_the_graph_computes_what_the_network_does(residual, use_bias):
    model = network(residual=residual, use_bias=use_bias)
    with torch.no_grad():
        for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None):
            linear.bias.normal_()
    graph = qbaf(model)
    sample = noise(3)
    with torch.no_grad():
        expected = model(sample[None]).logits[0]
    assert strengths(graph, sample) == pytest.approx(expected.tolist(), abs=1e-5)


def test_names_layers_and_json():
    graph = qbaf(network(), ["a", "b", "c"], ["yes", "no"])
    labels = [label for _, label in graph.nodes(data="label")]
    assert labels == ["a", "b", "c", "c1.0", "c1.1", "c1.2", "c1.3", "c2.0", "c2.1", "yes", "no"]
    assert networkx.node_link_data(graph, edges="edges")["edges"][0]["relation"] in ("support", "attack")
    assert graph.number_of_edges() == 3 * 4 + 4 * 2 + 2 * 2


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_is_drawn_with_its_strongest_edges(tmp_path, ending):
    graph = qbaf(network(), ["a", "b", "c"])
    path = draw_qbaf(graph, tmp_path / "new" / f"graph.{ending}", strongest=5, title="a network")
    few, all_of_them = path.stat().st_size, draw_qbaf(graph, tmp_path / f"graph.{ending}").stat().st_size
    assert 0 < few != all_of_them


def test_refuses_what_is_no_graph_of_arguments(tmp_path):
    with pytest.raises(UnsupportedModelError, match="without gates"):
        qbaf(network(gated=True))
    with pytest.raises(UnsupportedModelError, match="got LlamaForCausalLM"):
        qbaf(tiny_model("llama"))
    with pytest.raises(ValueError, match="features must be 3 names; got 1"):
        qbaf(network(), ["a"])
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        draw_qbaf(qbaf(network()), tmp_path / "graph.pdf")
    with pytest.raises(ValueError, match="no edge to draw"):
        draw_qbaf(qbaf(network()), tmp_path / "graph.png", strongest=0)
