"""What a forward pass may change in a model besides its outputs: settings, parts and buffers; and putting them back.

BigBird turns its sparse attention off for good when an input is short; rotary embeddings keep the longest length seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

_PLAIN = (bool, int, float, str)


class State:
    """Settings, children and buffers of every module of a model, as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {module: path for path, module in model.named_modules()}
        self._settings = {module: _settings(module) for module in self._paths}
        self._tables = {module: (dict(module._modules), dict(module._buffers)) for module in self._paths}
        self._away = {module: away for module in self._paths if (away := _offloaded(module))}
        self._versions = {tensor: _version(tensor) for tensor in model.parameters()}

    def restore(self) -> None:
        """Put everything back; a changed word or flag or a changed part is told of, once.

        Where a pass has changed parameters, too (RWKV scales its weights when it first runs), the settings go with
        them, and all of it stays.
        """
        if any(_version(tensor) != version for tensor, version in self._versions.items()):
            return
        changed = [name for module in self._paths for name in self._restored(module)]
        if changed:
            _tell("; ".join(changed[:3]))

    def _restored(self, module: nn.Module) -> Iterator[str]:
        """Put one module back; what of it is worth telling."""
        now, then, path = _settings(module), self._settings[module], self._paths[module]
        for name in now.keys() | then.keys():
            if name in now and name in then and now[name] == then[name]:
                continue
            if name != "training" and isinstance(then.get(name), (bool, str)):
                yield f"{path}.{name} was {then[name]!r}, then {now.get(name)!r}".lstrip(".")
            if name in then:
                vars(module)[name] = then[name]
            else:
                del vars(module)[name]
        children, buffers = self._tables[module]
        for table, old in ((module._modules, children), (module._buffers, buffers)):
            if table.keys() != old.keys() or any(table[name] is not old[name] for name in old):
                if old is children:
                    yield f"the parts of {path or type(module).__name__}"
                table.clear()
                table.update(old)
        for name, tensor in self._away.get(module, {}).items():  # tied ones stay one
            if name in (others := _offloaded(module)) and others[name].shape == tensor.shape:
                module._parameters[name] = tensor


@cache
def _tell(changed: str) -> None:
    logger.warning(
        "the inputs made the model change itself (%s); this was put back. Inputs as long as those that the model is "
        "used with may not do that",
        changed,
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain data; not what is private, as Transformers' note that its collecting hooks are on, which stay."""
    return {name: v for name, v in vars(module).items() if isinstance(v, _PLAIN) and not name.startswith("_")}


def _offloaded(module: nn.Module) -> dict[str, nn.Parameter]:
    """What stands for the weights of an offloaded module, which accelerate makes anew whenever that has run."""
    return {name: tensor for name, tensor in module._parameters.items() if tensor is not None and tensor.is_meta}


def _version(tensor: Tensor) -> int:
    """How often a tensor was written in place; one made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
