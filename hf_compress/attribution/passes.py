"""One forward and backward pass under the rules of relevance propagation, and whether the rules cover the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.anatomy.parts import is_linear
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.attribution.attach import lrp_rules, normalises
from hf_compress.attribution.composites import Composite, resolve
from hf_compress.attribution.targets import Target, explained_classes, explained_words, reads_words
from hf_compress.attribution.word_logits import HeadLogits
from hf_compress.calibration.capture import forward, hooked, inference, stream_of_output
from hf_compress.calibration.data import Batch
from hf_compress.calibration.memory import working_memory
from hf_compress.calibration.objective import first_tensor
from hf_compress.calibration.runner import BlockRunner, stopped_by_errors
from hf_compress.calibration.sweep import resident_around, turns
from hf_compress.errors import CalibrationError, UnsupportedModelError, one_line
from hf_compress.modules.compact import CompactLinear
from hf_compress.modules.kernels import check_no_kernels
from hf_compress.numerics.defaults import check_not_inference

_LEAK = 1e-3  # of the outputs' size: what rounding may lose in float32
_LEAK_HALF = 0.1
_ROWS = 256  # of logits that are looked at together
_CHECKED, _POSITIONS = 2, 256  # samples at most, and about as many tokens, that tell whether the rules cover a model


@dataclass
class Sources:
    """Where relevance comes to rest, by name: what the embeddings gave, and real-valued inputs; and where it starts.

    Attributes:
        tensors: filled by a forward pass.
        head: what the output embeddings gave, of a model that has any: its logits before they are capped.
        plain_head: the output embeddings, where they are a linear map, and no rule or hook makes anything else of it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    head: Tensor | None = None
    plain_head: nn.Linear | None = None

    def begin(self, batch: Batch) -> None:
        """Let go of those of an earlier pass."""
        self.tensors.clear()
        self.tensors |= {name: value for name, value in batch.inputs.items() if value.requires_grad}


def check_open(model: Any) -> None:
    """Raise TypeError unless hooks on the model's modules see all that it does."""
    if not isinstance(model, PreTrainedModel) or model._compiled_call_impl is not None:
        raise TypeError(
            f"model must be a transformers.PreTrainedModel that is not compiled; got {type(model).__name__}: rules are "
            "hooks, which compiled code passes by"
        )
    check_no_kernels(model)
    check_not_inference(model)


@contextmanager
def explaining(
    model: PreTrainedModel, composite: str | Composite = "attnlrp", epsilon: float = 0.0
) -> Iterator[Sources]:
    """The rules on a model in evaluation mode, with gradients as far as its embeddings and none for its parameters."""
    check_open(model)
    with inference(model), torch.enable_grad(), ExitStack() as stack:
        undo = stack.enter_context(Undo())
        for parameter in model.parameters():
            set_gradient(parameter, False, undo)
        stack.enter_context(lrp_rules(model, composite, epsilon))
        sources = Sources(plain_head=_plain_head(model))
        stack.enter_context(hooked(_source_hooks(model, sources)))  # after the rules, which the head's logits go by
        yield sources


def logits_of(model: PreTrainedModel, batch: Batch, sources: Sources) -> Tensor:
    """A forward pass under `explaining`; fills the sources."""
    batch = _traced(batch)
    return _logits(model, batch, sources, lambda: forward(model, batch))


def logits_behind(runner: BlockRunner, stream: Tensor, sources: Sources) -> Tensor:
    """The same from the stream behind the last block on, which it may write into."""
    return _logits(runner.model, runner.batch, sources, lambda: runner.finish(stream))


def explained_behind(runner: BlockRunner, stream: Tensor, sources: Sources, target: Target) -> Tensor:
    """What is explained of each sample, (samples), from the stream behind the last block on, as `logits_behind`.

    Of words no more logits are made than are explained, where the head is plain.
    """
    model, batch = runner.model, runner.batch
    words = _words_behind(runner, stream, sources) if reads_words(model, batch) else None
    if words is None:
        return explained_classes(model, logits_behind(runner, stream, sources), batch, target)[0]
    values, _ = explained_words(model, words, batch, target)
    _check_finite(model, values)
    return values


def _words_behind(runner: BlockRunner, stream: Tensor, sources: Sources) -> HeadLogits | None:
    """Logits of words that are made as they are asked for; None where the head is not plain, or does not run once."""
    head, calls = sources.plain_head, list[tuple[Tensor, Tensor]]()
    if head is None:
        return None

    def stand_in(given: Tensor) -> Tensor:
        gives = given.new_zeros(()).expand(*given.shape[:-1], head.out_features)
        calls.append((given, gives))
        return gives

    sources.begin(runner.batch)
    try:
        with Undo() as undo:
            undo.set(head, "forward", stand_in)
            runner.finish(stream.clone())
    except RuntimeError:  # the model may write into its logits, which these mostly do not bear
        return None
    finally:
        sources.head = None
    if len(calls) != 1:
        return None
    read, gave = calls[0]
    weight, written = head.weight, gave._version > 0
    plain = read.ndim == 3 and not written and (read.device, read.dtype) == (weight.device, weight.dtype)
    return HeadLogits(read, head) if plain else None


def _plain_head(model: PreTrainedModel) -> nn.Linear | None:
    head = model.get_output_embeddings()
    hooked = head is not None and (head._forward_hooks or head._forward_pre_hooks)
    return head if type(head) is nn.Linear and not hooked else None


def _traced(batch: Batch) -> Batch:
    """A batch whose real-valued inputs require a gradient."""
    inputs = {n: v.clone().requires_grad_() if v.is_floating_point() else v for n, v in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def _logits(model: PreTrainedModel, batch: Batch, sources: Sources, run: Callable[[], Any]) -> Tensor:
    sources.begin(batch)
    try:
        output = run()
    except RuntimeError as error:
        if "modified inplace" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} writes over what the rules of relevance have to see: {one_line(error)}"
        ) from error
    logits = sources.head if sources.head is not None else first_tensor(output)
    sources.head = None
    _check_finite(model, logits)
    return logits


def _check_finite(model: PreTrainedModel, logits: Tensor) -> None:
    if logits.numel() and not all(bool(torch.isfinite(end)) for end in logits.detach().aminmax()):
        raise CalibrationError(f"{type(model).__name__} gives NaN or infinite outputs on this data")


class Explanation(NamedTuple):
    """What a backward pass has found.

    Attributes:
        values: what is explained of each sample, (samples).
        sources: the relevance at every source, of the source's shape.
        classes: the class or word explained of each sample, (samples); None where it is all labels.
    """

    values: Tensor
    sources: dict[str, Tensor]
    classes: Tensor | None


def explain(model: PreTrainedModel, batch: Batch, sources: Sources, target: Target) -> Explanation:
    """A forward and backward pass under `explaining`."""
    values, classes = explained_classes(model, logits_of(model, batch, sources), batch, target)
    slopes = gradients(values.sum(), list(sources.tensors.values()))
    relevances = {
        name: (tensor * slope).detach() for (name, tensor), slope in zip(sources.tensors.items(), slopes, strict=True)
    }
    return Explanation(values.detach(), relevances, classes)


def check_conserved(
    model: PreTrainedModel, batch: Batch, composite: str | Composite = "attnlrp", stack: Stack | None = None
) -> None:
    """Raise where the rules do not cover all that the model does; of a composite that does not conserve, never.

    With queries and keys held fast, every rule hands on all that it gets, and biases keep what is theirs. So the
    relevance of all sources and biases has to come to the outputs, of which a random mixture is explained.

    Args:
        stack: taken block by block; when None, the pass is one of the whole model.

    Raises:
        UnsupportedModelError: it does not.
    """
    rules, batch = resolve(composite), batch.few(_POSITIONS, 1, _CHECKED)
    if not rules.conserves:
        return
    with explaining(model, rules.without_scores()) as sources:
        if stack is not None:
            found, total, size = _conserved_by_blocks(model, stack, batch, sources)
        else:
            found, total, size = _conserved(model, batch, sources)
    leak = abs(found - total) / size if size else 0.0
    if leak > (_LEAK if next(model.parameters()).dtype in (torch.float32, torch.float64) else _LEAK_HALF):
        raise UnsupportedModelError(
            f"relevance is lost or made up on its way through {type(model).__name__} ({leak:.1%} of the outputs' "
            "size): it has a part that there is no rule for, such as an attention of its own, a bottleneck, or an "
            "activation that is a function and no module"
        )


def _conserved(model: PreTrainedModel, batch: Batch, sources: Sources) -> tuple[float, float, float]:
    """What comes to sources and biases of a random mixture of logits; what that comes to; and the logits' norm."""
    with _tracing(added := _added(model)):
        logits = logits_of(model, batch, sources)
        mixture, total, size = _mixed(logits.detach())
        ends = [*sources.tensors.values(), *added]
        return _relevance(ends, gradients(logits, ends, mixture)), total, size


def _conserved_by_blocks(
    model: PreTrainedModel, stack: Stack, batch: Batch, sources: Sources
) -> tuple[float, float, float]:
    """The same with one block in memory at a time, and with its graph.

    What blocks are handed besides the stream (the encoder's, for instance) is taken back in the end, all at once.
    """
    runner, memory = BlockRunner(model, stack, _traced(batch)), replace(working_memory(), streams=0)
    beside: dict[int, tuple[Tensor, Tensor]] = {}  # by the tensor's id: itself, and its gradient
    with (
        stopped_by_errors([runner]),
        resident_around(model, stack),
        _tracing(outside := _added(model, stack.blocks)),
    ):
        sources.begin(runner.batch)
        streams = [runner.start()]
        first = list(sources.tensors.values())
        for index in turns(stack, range(len(stack)), "checking relevance"):
            runner.come_to(index)  # with gradients of what blocks are handed, and none of the blocks'
            with torch.no_grad():
                streams.append(memory.keep(0, runner.run(index, streams[-1])))
        given = streams.pop().detach().requires_grad_()
        logits = logits_behind(runner, given.clone(), sources)
        mixture, total, size = _mixed(logits.detach())
        ends = [*sources.tensors.values(), *outside]
        behind, *slopes = gradients(logits, [given, *ends], mixture)
        found = _relevance(ends, slopes)
        del logits, mixture, slopes
        for index in turns(stack, reversed(range(len(stack))), "checking relevance"):
            block = stack.blocks[index]
            with _tracing(added := _added(block)):
                given = streams[index].detach().requires_grad_()
                after = stream_of_output(runner.output(index, given.clone()))
                handed = runner.handed(index)
                behind, *slopes = gradients(after, [given, *added, *handed], behind)
            found += _relevance(added, slopes[: len(added)])
            for tensor, slope in zip(handed, slopes[len(added) :], strict=True):
                beside[id(tensor)] = tensor, slope + (beside[id(tensor)][1] if id(tensor) in beside else 0)
        ends = [*first, *outside]
        values, starts = zip((streams[0], behind), *beside.values(), strict=True)
        found += _relevance(ends, gradients(values, ends, starts))
    return found, total, size


def _relevance(ends: Sequence[Tensor], slopes: Sequence[Tensor]) -> float:
    return sum(float((end.detach() * slope).double().sum()) for end, slope in zip(ends, slopes, strict=True))


@contextmanager
def _tracing(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients be taken for some parameters meanwhile."""
    with Undo() as undo:
        for parameter in parameters:
            set_gradient(parameter, True, undo)
        yield


def _mixed(logits: Tensor) -> tuple[Tensor, float, float]:
    """Weights of a random mixture of logits, of their shape and dtype; what it comes to; and the norm of the logits.

    Some rows at a time, since the logits of words are many, and numbers that are exact enough twice as large.
    """
    generator = torch.Generator().manual_seed(0)
    mixture = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    total = square = 0.0
    width = logits.shape[-1]
    for own, mix in zip(logits.reshape(-1, width).split(_ROWS), mixture.view(-1, width).split(_ROWS), strict=True):
        mix.copy_(torch.randn(own.shape, dtype=torch.float32, generator=generator))
        total += float((own.double() * mix.double()).sum())
        square += float(own.double().square().sum())
    return mixture, total, math.sqrt(square)


def gradients(
    value: Tensor | Sequence[Tensor], ends: list[Tensor], start: Tensor | Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The gradient of a scalar, or of the sum of value · start, at each end; 0 at one that it does not hang on."""
    values = [value] if isinstance(value, Tensor) else value
    if not ends or not any(one.requires_grad for one in values):
        raise UnsupportedModelError("found neither embeddings nor real-valued inputs that the outputs hang on")
    try:
        found = torch.autograd.grad(values, ends, start, allow_unused=True)
    except AssertionError as error:  # reversible layers, which take their own backward pass for one of training
        raise UnsupportedModelError(f"the model has a backward pass of its own: {one_line(error)}") from error
    return [torch.zeros_like(end) if g is None else g for end, g in zip(ends, found, strict=True)]


def word_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The embeddings of a model that reads words."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _source_hooks(model: PreTrainedModel, sources: Sources) -> Iterator[RemovableHandle]:
    """Hooks on the head, and on whatever makes real values of ids or positions: embeddings, tables of sines.

    What has a value for each head is added to scores of attention, and no source.
    """
    head, words = model.get_output_embeddings(), word_embeddings(model)
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)

    def start(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        made = isinstance(module, nn.Embedding) or not any(value.is_floating_point() for value in given)
        if not made or not isinstance(output, Tensor) or (output.shape[-1] == heads and module is not words):
            return output
        again = sum(name.partition(" ")[0] == path for name in sources.tensors)
        source = output.detach().requires_grad_()
        sources.tensors[f"{path} {again + 1}" if again else path] = source
        return source.clone()  # some families write into it

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        sources.head = output

    for path, module in model.named_modules():
        if not any(True for _ in module.children()):
            yield module.register_forward_hook(partial(start, path), with_kwargs=True)
    if head is not None:
        yield head.register_forward_hook(keep)


def _added(model: nn.Module, but: nn.Module | None = None) -> list[Tensor]:
    """Parameters that are added to something: biases, and tokens and positions that are no embedding's.

    Of those in memory, without those of one part.
    """
    found: dict[int, Tensor] = {}  # tied ones once
    left_out = set() if but is None else set(but.modules())
    for module in model.modules():
        if module in left_out:
            continue
        scales = is_linear(module) or normalises(module) or isinstance(module, (_ConvNd, nn.Embedding, CompactLinear))
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta or (scales and name != "bias"):
                continue
            if parameter.ndim == 1 or parameter.shape[0] == 1:
                found[id(parameter)] = parameter
    return list(found.values())


def set_gradient(parameter: Tensor, needed: bool, undo: Undo) -> None:
    """Let gradients be taken for a parameter, or not, until it is undone."""

    def restore() -> None:
        parameter.requires_grad_(not needed)

    if parameter.requires_grad != needed:
        parameter.requires_grad_(needed)
        undo.later(restore)
