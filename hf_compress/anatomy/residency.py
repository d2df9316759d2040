"""Offloaded modules held in memory for a while, changed there, and let go again.

    with resident(block):       # its weights are read once, however often it runs in here
        block.mlp = another     # stored when the block is let go

A module in memory is left as it is, so the same code serves both. What has changed goes into a file of a `Store`, from
which accelerate reads it from then on; what has not is read from the checkpoint as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn

from hf_compress.anatomy.dispatch import (
    Place,
    aligning_hook,
    loading_hook,
    own_tensors,
    place_of,
    read_value,
    source,
)
from hf_compress.anatomy.store import inherit_store, store_of
from hf_compress.anatomy.undo import Undo, writes
from hf_compress.errors import OffloadError
from hf_compress.numerics.aside import in_own_pages
from hf_compress.numerics.finite import all_finite


@contextmanager
def resident(module: nn.Module, undo: Undo | None = None, place: Place | None = None) -> Iterator[None]:
    """Inside, every parameter and buffer of an offloaded module is in memory, on the device that computes.

    It may be changed there, in place or by other modules, parameters and buffers; that stays. It may be entered again
    inside, and by several in any order: the last one out lets go. Weights that are tied to others outside of `module`
    must not be changed.

    Args:
        module: a block, usually.
        undo: takes back later what is changed here. Steps that are recorded in it here hold on to tensors, so an undo
            for many blocks is given here, and the changes are made past it.
        place: where `module` is, if it may have no hook of its own to tell; see `place_at`.

    Raises:
        OffloadError: weights cannot be read, or changed ones stored; the module is as it was before.
        ValueError: weights hold NaN or infinity.
    """
    place = place or place_of(module)
    held = [part for part in module.modules() if loading_hook(part) is not None]
    if not held and (place is None or not place.offloaded):
        yield
        return
    before = snapshot(module)
    if undo is not None:
        undo.later(before.restore)
    stay = _Stay(module, held, place)
    try:
        yield
    finally:
        try:
            stay.end()
        except BaseException:
            before.restore()
            raise


class _Held:
    """One module whose weights are in memory for a while, instead of being read when it runs."""

    def __init__(self, module: nn.Module, hook: AlignDevicesHook) -> None:
        self.module, self.hook, self.holders = module, hook, 0
        self.away: dict[str, Tensor] = {}
        self._here: dict[str, tuple[Tensor, tuple[int, ...]]] = {}

    def load(self, shared: dict[int, Tensor]) -> None:
        """Read what is away. `shared`: tensors by the ids of what stood for them, so that tied ones stay one."""
        self.away, self._here = {}, {}
        with torch.inference_mode(False), torch.no_grad():
            for table, name, away in own_tensors(self.module, self.hook.offload_buffers):
                if away.is_meta:
                    here = shared[id(away)] if id(away) in shared else _read(self.hook, name, away)
                    table[name] = shared[id(away)] = here
                    self.away[name], self._here[name] = away, (here, _state(here))
        self.hook.offload = False

    def load_from(self, hook: AlignDevicesHook) -> None:
        """Read again, now that the module has another hook, or what stands for its weights is back in their place."""
        _HELD.pop(self.hook, None)
        self.hook.offload = True
        self.hook = hook
        _HELD[hook] = self
        self.load({})

    @property
    def tensors(self) -> list[Tensor]:
        """Those that were read."""
        return [tensor for tensor, _ in self._here.values()]

    def holds(self, name: str, tensor: Tensor | None) -> bool:
        """Whether a tensor of this name is the one that was read."""
        return name in self._here and self._here[name][0] is tensor

    def as_read(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is the one that was read, and has its values still."""
        if not self.holds(name, tensor):
            return False
        return _state(tensor) == self._here[name][1] or _same(tensor, _read(self.hook, name, self.away[name]))

    def let_go(self) -> None:
        """Put back what stood for the weights, where they still are."""
        for table, name, tensor in own_tensors(self.module):
            if self.holds(name, tensor):
                table[name] = _trained_like(self.away[name], tensor)
        self.away, self._here = {}, {}
        self.hook.offload = True


_HELD: WeakKeyDictionary[AlignDevicesHook, _Held] = WeakKeyDictionary()
_CHECKED: WeakSet[AlignDevicesHook] = WeakSet()  # that what they read is finite


def _held(module: nn.Module) -> _Held | None:
    """The record of a module that is held in memory."""
    hook = loading_hook(module)
    return None if hook is None else _HELD.get(hook)


class _Stay:
    """What one `with resident(module)` has to let go of when it ends."""

    def __init__(self, module: nn.Module, parts: list[nn.Module], place: Place | None) -> None:
        self._module, self._place = module, place
        self._holds: list[_Held] = []
        held = [_held(part) for part in parts]
        own = [tensor for part in module.modules() for _, _, tensor in own_tensors(part) if not tensor.is_meta]
        read = {id(tensor) for one in held if one is not None for tensor in one.tensors}
        self._kept = {id(tensor): tensor for tensor in own if id(tensor) not in read}  # in memory by themselves
        try:
            self._take(parts)
        except BaseException:
            for one in self._released():
                one.let_go()
            raise

    def _take(self, parts: list[nn.Module]) -> None:
        shared: dict[int, Tensor] = {}
        for part in parts:
            hook = loading_hook(part)
            assert hook is not None
            one = _HELD.setdefault(hook, _Held(part, hook))
            one.holders += 1
            self._holds.append(one)
            if one.holders == 1:
                one.load(shared)
                _check_values(one)

    def _released(self) -> list[_Held]:
        """What nobody else holds."""
        for one in self._holds:
            one.holders -= 1
        free = [one for one in self._holds if not one.holders]
        for one in free:
            _HELD.pop(one.hook, None)
        return free

    def end(self) -> None:
        """Store what has changed, and let go of what nobody else holds."""
        free = {one.module: one for one in self._released()}
        try:
            looked_at = dict.fromkeys(free)
            if len(free) == len(self._holds):  # otherwise the last to leave sees to what is new
                looked_at |= dict.fromkeys(self._module.modules())
            if changed := [part for part in looked_at if self._has_changed(part, free.get(part))]:
                self._store(changed, free)
        finally:
            for one in free.values():
                one.let_go()

    def _has_changed(self, part: nn.Module, held: _Held | None) -> bool:
        """Whether a module has a tensor in memory that it did not have, or not with these values."""
        if held is None and loading_hook(part) is not None:  # somebody else's
            return False
        return any(
            not (tensor.is_meta or id(tensor) in self._kept or (held is not None and held.as_read(name, tensor)))
            for _, name, tensor in own_tensors(part)
        )

    def _store(self, changed: list[nn.Module], held: dict[nn.Module, _Held]) -> None:
        """Write the tensors of these modules to one file, and have accelerate read them from there."""
        paths = {part: path for path, part in self._module.named_modules()}
        prefixes = {part: f"{number}.{paths.get(part, 'replaced')}." for number, part in enumerate(changed)}
        kept = {part: self._buffers_too(part) for part in changed}
        tensors = {
            prefixes[part] + name: tensor
            for part in changed
            for _, name, tensor in own_tensors(part, kept[part])
            if not tensor.is_meta
        }
        example = self._place.hook if self._place is not None else None
        example = example or self._holds[0].hook
        stored = store_of(example).write(tensors)
        shared: dict[int, Tensor] = {}
        for part in changed:
            _offload(part, held.get(part), shared, kept[part])
            hook = _hook_like(aligning_hook(part) or example, PrefixedDataset(stored, prefixes[part]), kept[part])
            inherit_store(hook, example)
            _put_on(part, hook)

    def _buffers_too(self, part: nn.Module) -> bool:
        """Whether a module's persistent buffers are stored: they were before, or one is new."""
        hook = loading_hook(part)
        if hook is not None and hook.offload_buffers:
            return True
        return any(
            table is part._buffers and id(tensor) not in self._kept and not tensor.is_meta
            for table, _, tensor in own_tensors(part)
        )


def _offload(part: nn.Module, held: _Held | None, shared: dict[int, Tensor], buffers: bool) -> None:
    """Put on the meta device what was stored; where only values have changed, what stood for them before."""
    for table, name, tensor in own_tensors(part, buffers):
        if tensor.is_meta:
            continue
        old = None if held is None else held.away.get(name)
        if id(tensor) not in shared:
            fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
            shared[id(tensor)] = _trained_like(old, tensor) if fits and old is not None else _on_meta(tensor)
        table[name] = shared[id(tensor)]


def _trained_like(away: Tensor, tensor: Tensor) -> Tensor:
    """What stands for a tensor, trained if that is."""
    return away.requires_grad_(tensor.requires_grad) if isinstance(away, nn.Parameter) else away


def _on_meta(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _hook_like(old: AlignDevicesHook, weights: Any, buffers: bool) -> AlignDevicesHook:
    """A hook like another that reads from elsewhere."""
    return AlignDevicesHook(
        old.execution_device,
        offload=True,
        io_same_device=old.io_same_device,
        weights_map=weights,
        offload_buffers=buffers,
        skip_keys=old.skip_keys,
    )


def _put_on(part: nn.Module, hook: AlignDevicesHook) -> None:
    """Give a module a hook in the place of the one that it has; its forward, which runs that, stays."""
    if "_old_forward" in vars(part):
        hook.init_hook(part)
        vars(part)["_hf_hook"] = hook
    else:
        add_hook_to_module(part, hook)


def _read(hook: AlignDevicesHook, name: str, away: Tensor) -> Tensor:
    """The tensor that `away` stands for, in memory of its own: a file's is mapped, and seldom aligned."""
    device, value = torch.device(hook.execution_device), read_value(hook, name)
    if value.shape != away.shape:
        full, file = source(hook, name)
        raise OffloadError(f"{full} is {tuple(value.shape)} in {file}, where {tuple(away.shape)} was expected")
    here = in_own_pages(value.to(device, away.dtype)) if device.type == "cpu" else value.to(device, away.dtype)
    return nn.Parameter(here, away.requires_grad) if isinstance(away, nn.Parameter) else here


def _same(first: Tensor, second: Tensor) -> bool:
    alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return alike and torch.equal(first, second)


def _state(tensor: Tensor) -> tuple[int, ...]:
    """Something that is another after every change of a tensor's values."""
    return tensor.data_ptr(), tensor._version, writes(tensor)


def _check_values(held: _Held) -> None:
    """Look at every weight once, when it is first read."""
    if held.hook in _CHECKED:
        return
    for _, name, tensor in own_tensors(held.module, held.hook.offload_buffers):
        if held.holds(name, tensor):
            check_finite(source(held.hook, name)[0], tensor)
    _CHECKED.add(held.hook)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError where a weight is not a number, or infinite."""
    if not all_finite(tensor):
        raise ValueError(f"the parameter {name} holds NaN or infinity: this model is broken already")


def snapshot(module: nn.Module) -> Snapshot:
    """What an offloaded module is made of at the moment; see `Snapshot`."""
    return Snapshot(module)


class Snapshot:
    """The parts of a module, their parameters and buffers, and where accelerate reads them.

    It has no values of offloaded weights. Those that are in memory by themselves are kept as the tensors that they are.
    What is written into those, and other attributes of modules, is not taken back here; that is an `Undo`'s.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [_kept(part) for part in module.modules()]

    def restore(self) -> None:
        """Put everything back. Parts that are held in memory are read again; one that returns runs as offloaded."""
        for restore in self._parts:
            restore()


def _kept(part: nn.Module) -> Callable[[], None]:
    """A function that puts one module back as it is now."""
    hook, held = vars(part).get("_hf_hook"), _held(part)
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table)) for table in (part._modules, part._parameters, part._buffers)
    ]
    if held is not None:
        for _, then in tables[1:]:
            then.update({name: held.away[name] for name, tensor in then.items() if held.holds(name, tensor)})

    def restore() -> None:
        now = _held(part)
        for table, then in tables:
            table.clear()
            table.update(then)
        if hook is None and "_hf_hook" in vars(part):
            remove_hook_from_module(part)
        elif hook is not None:
            vars(part)["_hf_hook"] = hook
        if now is not None and (own := loading_hook(part)) is not None:
            now.load_from(own)

    return restore
