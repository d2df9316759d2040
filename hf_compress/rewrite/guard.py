"""The guard: once blocks are gone, the model must be the original with those blocks handing their stream through.

`check_parity` holds a model against one rebuilt from its config. What both read from a stale field (a list of block
indices that was not renumbered, a scale computed from a block's place) is the same in both; only the original tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.anatomy.layout import fields_with_indices
from hf_compress.anatomy.stacks import Stack, reachable_configs
from hf_compress.calibration.capture import stream_of, streams_beside, with_stream
from hf_compress.calibration.runner import BlockForward, replaced_forwards
from hf_compress.errors import UnsupportedModelError, one_line
from hf_compress.rewrite.probe import Outputs, Probe, named_outputs, same_tensor


def outputs_without(model: PreTrainedModel, removed: Mapping[Stack, Sequence[int]], probe: Probe) -> Outputs:
    """What `model`, with all of its blocks, gives on the probe when the blocks `removed` hand their stream through.

    Raises:
        UnsupportedModelError: it does not run so, or the probe does not come to a block that is to go.
    """
    reached: set[nn.Module] = set()
    try:
        with ExitStack() as replaced:
            for stack, blocks in removed.items():
                hands = {index: _handing_through(stack.blocks[index], reached) for index in blocks}
                replaced.enter_context(replaced_forwards(stack, hands))
            outputs = named_outputs(model, probe.batch)
    except Exception as error:
        without = f" with {_in_words(removed)} left out" if removed else ""
        raise UnsupportedModelError(f"the model does not run after the change{without}: {one_line(error)}") from error
    for stack, blocks in removed.items():
        if missed := [index for index in blocks if stack.blocks[index] not in reached]:
            raise UnsupportedModelError(
                f"the inputs of the check do not reach the block {stack.path}.{missed[0]}, so nothing tells whether "
                "the model does without it: pass calibration data that does, such as pictures with their texts"
            )
    return outputs


def _handing_through(block: nn.Module, reached: set[nn.Module]) -> BlockForward:
    """A forward that runs the block for what it returns besides its streams, and returns those that came in."""

    def forward(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reached.add(block)
        stream = stream_of(args, kwargs).clone()  # a block may add to it in place
        output = own(*args, **kwargs)
        beside = streams_beside(output, kwargs, stream)
        output = with_stream(output, stream)
        return output._replace(**beside) if beside else output

    return forward


def check_left_out(
    model: PreTrainedModel, removed: Mapping[Stack, Sequence[int]], whole: Outputs, now: Outputs
) -> None:
    """Raise unless a changed model's outputs `now` are those that `outputs_without` gave before its blocks went.

    Outputs with an entry a block (hidden states, attentions) have fewer entries now, and losses over all blocks (those
    of routers) fewer terms; they are left out.

    Raises:
        UnsupportedModelError: they are not; the message names the config's fields that may speak of blocks.
    """
    shared = [name for name in whole if name in now and "." not in name and not name.endswith("loss")]
    if shared and all(same_tensor(whole[name], now[name]) for name in shared):
        return
    fields = fields_with_indices([*reachable_configs(model.config)])
    hint = f"; fields that may speak of single blocks: {', '.join(fields)}" if fields else ""
    raise UnsupportedModelError(
        f"the model is not what the original is with {_in_words(removed) or 'the same parts'} left out: something in "
        f"it goes by a block's place{hint}"
    )


def _in_words(removed: Mapping[Stack, Sequence[int]]) -> str:
    return ", ".join(f"{stack.path}.{index}" for stack, blocks in removed.items() for index in blocks)
