"""What a forward pass may change in a model besides its outputs: settings, parts and buffers; and putting them back.

BigBird turns its sparse attention off for good when an input is short; rotary embeddings keep the longest length seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

_PLAIN = (bool, int, float, str)


class State:
    """Settings, children and buffers of every module of a model, as they were when this was made.

    What is changed on purpose meanwhile has to be told (see `accept`), or it is put back as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths: dict[nn.Module, str] = {}
        self._settings: dict[nn.Module, dict[str, Any]] = {}
        self._tables: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._away: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._then: dict[int, dict[str, Any]] = {}  # by the id of a table of a module, what was in it
        self._watch(model, "")
        self._versions = {tensor: _version(tensor) for tensor in model.parameters()}

    def _watch(self, module: nn.Module, path: str) -> None:
        for name, part in module.named_modules(prefix=path):
            self._paths[part] = name
            self._settings[part] = _settings(part)
            self._tables[part] = dict(part._modules), dict(part._buffers)
            self._away[part] = _offloaded(part)
            children, buffers = self._tables[part]
            self._then |= {
                id(vars(part)): self._settings[part],
                id(part._modules): children,
                id(part._buffers): buffers,
            }

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put everything back in the end."""
        _KEPT.append(self)
        try:
            yield
        finally:
            _KEPT.remove(self)
            self.restore()

    def _accept(self, table: MutableMapping[str, Any], name: str) -> None:
        then = self._then.get(id(table))
        if then is None:  # of a module that is new itself, or of parameters, which no pass replaces
            return
        new, old = table.get(name), then.get(name)
        if isinstance(new, nn.Module) and new not in self._paths:
            self._watch(new, name)
            if isinstance(old, nn.Module):  # in the mode that the old one is to come back to
                for part in new.modules():
                    self._settings[part]["training"] = self._settings[old]["training"]
        if name not in table:
            then.pop(name, None)
        elif isinstance(new, (nn.Module, Tensor)) or new is None or (_is_setting(name, new) and name != "training"):
            then[name] = new

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


_KEPT: list[State] = []  # those that are to come back


def accept(changed: Iterable[tuple[MutableMapping[str, Any], str]]) -> None:
    """Let changes that were made on purpose, the entries of modules' tables, be what states come back to."""
    for table, name in changed:
        for state in _KEPT:
            state._accept(table, name)


@cache
def _tell(changed: str) -> None:
    logger.warning(
        "the inputs made the model change itself (%s); this was put back. Inputs as long as those that the model is "
        "used with may not do that",
        changed,
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain data; not what is private, as Transformers' note that its collecting hooks are on, which stay."""
    return {name: value for name, value in vars(module).items() if _is_setting(name, value)}


def _is_setting(name: str, value: Any) -> bool:
    return isinstance(value, _PLAIN) and not name.startswith("_")


def _offloaded(module: nn.Module) -> dict[str, nn.Parameter]:
    """What stands for the weights of an offloaded module, which accelerate makes anew whenever that has run."""
    return {name: tensor for name, tensor in module._parameters.items() if tensor is not None and tensor.is_meta}


def _version(tensor: Tensor) -> int:
    """How often a tensor was written in place; one made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
