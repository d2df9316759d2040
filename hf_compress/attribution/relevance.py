"""Which tokens, hidden units, heads and weights an output comes from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import is_linear, linear_map
from hf_compress.attribution.composites import Composite, resolve
from hf_compress.attribution.passes import check_conserved, check_open, explain, explaining, word_embeddings
from hf_compress.attribution.targets import Target, in_words
from hf_compress.attribution.watch import watch_inputs, watch_linears
from hf_compress.calibration.data import Batch, DataOptions, prepare
from hf_compress.calibration.media import Processor, tokenizer_of
from hf_compress.numerics.defaults import torch_defaults

_ALL = DataOptions(batch_size=2**31)


@dataclass(frozen=True)
class Relevance:
    """What each part of a model contributes to an output, by layer-wise relevance propagation.

    Attributes:
        explained: the logit explained of each sample, (samples).
        inputs: relevance at everything that the model starts from, by the path of the embedding or the name of the
            input, each of its shape. Together with what biases keep, it makes up the logit (but for what a softmax
            does not conserve).
        tokens: relevance of each token, (samples, positions); None where the model reads no words.
        words: the tokens, where a tokenizer was given.
        neurons: of each hidden unit, summed over positions, (samples, width), by path of an FFN's output projection.
        heads: of each attention head, summed over positions, (samples, heads), by the path of the output projection.
        weights: w ⊙ ∂w summed over samples, (outputs, inputs), by the path of a linear map; empty unless asked for.
        targets: what is explained of each sample, in words.
        composite: the name of the rules; empty where they have none.
    """

    explained: Tensor
    inputs: dict[str, Tensor]
    tokens: Tensor | None = None
    words: Sequence[Sequence[str]] = ()
    neurons: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    targets: Sequence[str] = ()
    composite: str = ""


@torch_defaults()
def relevance(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Processor | None = None,
    target: Target = "predicted",
    *,
    weights: bool = False,
    composite: str | Composite = "attnlrp",
    epsilon: float = 0.0,
) -> Relevance:
    """Explain an output of `model` for each sample of `data`; the model is left as it was.

    Args:
        data: a few samples, as `compress` takes calibration data; they go through in one pass.
        tokenizer: as for `compress`.
        target: "predicted", the class or next word that the model holds most likely; "label", the labels in the data,
            or every next word of the text itself; or a class or word, one for all samples or (samples).
        weights: whether the relevance of single weights is wanted, as large as the weights themselves.
        composite: the rules: "attnlrp", "cp" to leave queries and keys out, a name that `register_composite` was given,
            or a `Composite`.
        epsilon: of the ε-rule of linear maps, in units of their outputs.

    Raises:
        UnsupportedModelError: the model has a part that there is no rule for.
        CalibrationError: data that cannot be read, or that gives NaN.
        ValueError: settings that make no sense.
        TypeError: no Transformers model, or a compiled one.

    Source: R. Achtibat et al., "AttnLRP", 2024 (arXiv 2402.05602).
    """
    if type(epsilon) not in (int, float) or not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must not be negative; got {epsilon!r}: give a finite number, in units of outputs")
    rules = resolve(composite)
    ruled = rules.with_epsilon(epsilon)
    check_open(model)
    batch = _one_batch(prepare(data, model, tokenizer, _ALL).batches)
    check_conserved(model, batch, rules)
    collected = _Collected()
    writers, heads = _writers(model)
    with ExitStack() as stack:
        sources = stack.enter_context(explaining(model, ruled))
        stack.enter_context(watch_inputs(writers, collected.take_units))
        if weights:
            linears = {path: module for path, module in model.named_modules() if is_linear(module)}
            stack.enter_context(watch_linears(linears, collected.take_weights(linears)))
        values, found, classes = explain(model, batch, sources, target)
    reader = tokenizer_of(tokenizer)
    words = next((path for path, module in model.named_modules() if module is word_embeddings(model)), None)
    ids = batch.inputs.get("input_ids")
    units = collected.units
    return Relevance(
        explained=values,
        targets=in_words(model, classes, len(values), reader),
        composite=composite if isinstance(composite, str) else "",
        inputs=found,
        tokens=found[words].float().sum(dim=-1) if words in found else None,
        words=[] if reader is None or ids is None else [_words(reader, row) for row in ids.tolist()],
        neurons={path: units[path] for path in writers if path in units and path not in heads},
        heads={path: units[path].unflatten(1, (count, -1)).sum(-1) for path, count in heads.items() if path in units},
        weights=collected.weights,
    )


class _Collected:
    """Relevances that come by in a backward pass."""

    def __init__(self) -> None:
        self.units: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def take_units(self, name: str, given: Tensor, gradient: Tensor) -> None:
        relevances = given.float() * gradient.float()
        relevances = relevances.flatten(1, -2).sum(dim=1) if relevances.ndim > 2 else relevances
        self.units[name] = self.units.get(name, 0) + relevances

    def take_weights(self, modules: dict[str, nn.Module]) -> Any:
        def take(name: str, given: Tensor, gradient: Tensor) -> None:
            slope = gradient.flatten(0, -2).float().T @ given.flatten(0, -2).float()
            found = linear_map(modules[name]).T.detach().float() * slope
            self.weights[name] = self.weights.get(name, 0) + found

        return take


def _one_batch(batches: Sequence[Batch]) -> Batch:
    if len(batches) != 1:
        raise ValueError(f"relevance explains samples that fit one batch; got {len(batches)} batches: call it for each")
    return batches[0]


def _writers(model: PreTrainedModel) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The output projections of FFNs and attentions by path, and how many heads each of the latter reads."""
    writers: dict[str, nn.Module] = {}
    heads: dict[str, int] = {}
    for stack in Anatomy(model).stacks:
        count = getattr(stack.configs[0][0], "num_attention_heads", None)
        for index in range(len(stack)):
            parts = Anatomy(model).parts(stack, index)
            for path in parts.writers:
                name = f"{stack.path}.{index}.{path}"
                writers[name] = model.get_submodule(name)
                if path == parts.attention_output and isinstance(count, int):
                    heads[name] = count
    return writers, heads


def _words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token; of one that goes on with a word, as WordPiece's, without the marks for that."""
    return [str(tokenizer.decode([token])) for token in ids]
