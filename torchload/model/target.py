"""The model, as a set of places for data.

A `Slot` is one piece of memory of the model, under all the names that it has there. Everything that is done *to* the
model happens here (`Slot.install`), after the plan was accepted.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchload.core.checkpoint import Shape
from torchload.model.elsewhere import elsewhere, refusal
from torchload.model.shards import is_sharded, local_region, show_shards
from torchload.model.walk import paths_of

if TYPE_CHECKING:
    from torchload.core.sharing import View

__all__ = ["HookedModule", "Slot", "Target", "describe_model", "own_loaders", "settle"]

# Classes of torch whose `_load_from_state_dict` only tolerates what older versions saved; `match.tables` covers that.
_HARMLESS_OVERRIDES = (nn.modules.batchnorm._NormBase, nn.modules.instancenorm._InstanceNorm)

# Hooks of torch that only prepare what is prepared here by other means: lazy parameters are materialised, and the names
# below wrappers are matched with or without their segment.
_HARMLESS_HOOKS = frozenset({"LazyModuleMixin._lazy_load_hook", "ActivationWrapper._pre_load_state_dict_hook"})

_ORDINARY = (torch.Tensor, nn.Parameter)


@dataclass(slots=True, eq=False, repr=False)
class Slot:
    """One tensor of the model.

    Attributes:
        names: Its names in the state dict, in the model's order; or, where it has none (a non-persistent buffer), the
            one name under which it is registered.
        tensor: The tensor as the model has it now.
        shape: Its shape; ``None`` for a lazy one, whose shape is not known before the first forward.
        places: Where they are registered: (module, attribute), parallel to the names.
        is_parameter: Whether it is an `nn.Parameter` (else a buffer).
        persistent: Whether it is part of the state dict.
        twins: Other tensor objects that show the very same memory (tied by storage, not as objects).
    """

    names: list[str]
    tensor: torch.Tensor
    shape: Shape | None
    places: list[tuple[nn.Module, str]]
    is_parameter: bool
    persistent: bool = False
    twins: tuple[torch.Tensor, ...] = ()

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def shows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that begins where this one does is the same, or its twin."""
        return self.tensor is tensor or _form(self.tensor) == _form(tensor)

    def meet(self, other: Slot) -> None:
        """Take note of another place where it is registered; real names count, not that of a transient alias."""
        self.places += other.places
        if not any(other.tensor is tensor for tensor in (self.tensor, *self.twins)):
            self.twins = (*self.twins, other.tensor)
        if other.persistent and not self.persistent:
            self.names.clear()
            self.persistent = True
        if other.persistent or not self.persistent:
            self.names += other.names

    @property
    def is_shared(self) -> bool:
        """Whether other processes see the same memory (`share_memory()`)."""
        tensor = self.tensor
        return (
            tensor.is_cpu and type(tensor) in _ORDINARY and not is_lazy(tensor) and tensor.untyped_storage().is_shared()
        )

    def is_filled_by(self, data: torch.Tensor) -> bool:
        """Whether `install` copies other memory into the tensor's own, which others know by its address."""
        tensor = self.tensor
        if tensor.is_meta or (tensor.dtype, tensor.device) != (data.dtype, data.device):
            return False
        return is_sharded(tensor) or self.is_shared

    def install(self, data: torch.Tensor) -> None:
        """Let the model's tensor show other memory: same object, new data.

        Memory that other processes or FSDP know by its address is filled instead.

        Args:
            data: The new contents, of the slot's shape, in the dtype and on the device it shall have from now on; a
                lazy tensor to be without contents again.
        """
        self.tensor = self._show(self.tensor, data)
        self.twins = tuple(self._show(twin, data) for twin in self.twins)

    def _show(self, tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        if is_lazy(data):
            if not is_lazy(tensor):
                tensor.data, tensor.__class__ = data.data, type(data)
            return tensor
        if is_lazy(tensor):
            lazy: Any = tensor
            lazy.materialize(data.shape, device=data.device, dtype=data.dtype)
        elif self.is_filled_by(data):
            local_region(tensor)[0].copy_(local_region(data)[0])
            return tensor
        if tensor.is_meta or is_sharded(tensor) or not torch._has_compatible_shallow_copy_type(tensor, data):
            tensor = self._exchange(tensor, data)
        else:
            tensor.data = data
        if (gradient := tensor.grad if tensor.is_leaf else None) is not None:
            gradient.data = gradient.data.to(data.device, data.dtype)
        return tensor

    def _exchange(self, tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """Give a tensor new data of another kind (meta → real), keeping the object where torch can."""
        requires_grad = tensor.requires_grad
        fresh: torch.Tensor
        if self.is_parameter and is_sharded(tensor):
            fresh = nn.Parameter(data, requires_grad)
        elif self.is_parameter:
            fresh = torch.Tensor._make_subclass(type(tensor), data, requires_grad)
            fresh.__dict__.update(tensor.__dict__)
        else:
            fresh = data
        for module, _ in self.places:
            if isinstance(module, nn.RNNBase):
                module._flat_weight_refs = []  # weak references, which `settle` makes anew
        try:
            torch.utils.swap_tensors(tensor, fresh)
        except RuntimeError:  # something holds a weak reference to it: the object itself can't be kept
            for module, attribute in self.places:
                tables: Any = (module._parameters, module._buffers)
                for table in tables:
                    if table.get(attribute) is tensor:
                        table[attribute] = fresh
            return fresh
        return tensor


class HookedModule(NamedTuple):
    """A module that has a say in how it is loaded: (where it is, the module)."""

    prefix: str
    module: nn.Module


class Target:
    """A model, as loading sees it.

    Attributes:
        model: The model.
        slots: All its tensors, in the model's order; non-persistent buffers among them.
        by_name: State-dict name → slot.
        extra_state: State-dict name → module with `set_extra_state`.
        own_state: State-dict name of what a module with a loader of its own also saves by itself (quantized ones do,
            packed weights and a scale) → its shape, where another one would be an error.
        pre_hooks: Modules with load-state-dict pre-hooks, parents first.
        overrides: Modules with a `_load_from_state_dict` of their own.
        post_hooks: Modules with load-state-dict post-hooks.
        views: Names of tensors that lie in the memory of others, in another shape or as a part → those others.
        transient_views: The same of non-persistent buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        """A model of which nothing has been noted yet."""
        self.model = model
        self.slots: list[Slot] = []
        self.by_name: dict[str, Slot] = {}
        self.extra_state: dict[str, nn.Module] = {}
        self.own_state: dict[str, Shape | None] = {}
        self.pre_hooks: list[HookedModule] = []
        self.overrides: list[HookedModule] = []
        self.post_hooks: list[HookedModule] = []
        self.views: Mapping[str, list[View]] = {}
        self.transient_views: Mapping[str, list[View]] = {}

    @property
    def names(self) -> list[str]:
        """Every name of the state dict."""
        return [*self.by_name, *self.own_state, *self.extra_state]

    def bare(self, names: Iterable[str]) -> dict[str, str]:
        """Each name → the same without the segments of wrappers that are really there."""
        from torchload.model.unwrapping import bare_names  # only patterns of the caller's are matched with these

        return bare_names(self.model, names)


def describe_model(model: nn.Module) -> Target:
    """Read off a model what can be loaded into it. Changes nothing.

    Raises:
        IncompatibleCheckpointError: Its weights live elsewhere (offloaded, flattened or partitioned by a framework).
    """
    show_shards(model)
    target = Target(model)
    memory = _Memory()
    kinds: dict[type[nn.Module], _Kind] = {}
    lives_elsewhere: dict[str, list[str]] = {}
    for prefix, module in paths_of(model):
        kind = kinds.get(type(module)) or kinds.setdefault(type(module), _Kind.of(type(module)))
        if (what := elsewhere(module)) is not None:
            lives_elsewhere.setdefault(what, []).append(prefix.rstrip("."))
        for table, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for attribute, tensor in table.items():
                if tensor is None:
                    continue
                name, place = prefix + attribute, (module, attribute)
                persistent = is_parameter or attribute not in module._non_persistent_buffers_set
                shape = tuple(tensor.shape) if type(tensor) in _ORDINARY or not is_lazy(tensor) else None
                slot = memory.slot(Slot([name], tensor, shape, [place], is_parameter, persistent))
                if persistent:
                    target.by_name[name] = slot
        _note_hooks(target, prefix, module, kind)
    if lives_elsewhere:
        raise refusal(model, lives_elsewhere)
    target.slots = memory.slots
    target.views, target.transient_views = memory.views()
    return target


class _Memory:
    """What memory a model has, and which of its tensors lie in it."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self._by_place: dict[int, Slot] = {}  # an address, or below 0 the identity of what has no memory of its own
        self._beside: list[Slot] = []  # where another one begins

    def slot(self, new: Slot) -> Slot:
        """The slot of a tensor: a new one, or that which it, or its twin in memory, has already."""
        place = _address(new.tensor) or -id(new.tensor)
        if (first := self._by_place.setdefault(place, new)) is not new:
            for known in (first, *(slot for slot in self._beside if _address(slot.tensor) == place)):
                if known.shows(new.tensor):
                    known.meet(new)
                    return known
            self._beside.append(new)
        self.slots.append(new)
        return new

    def views(self) -> tuple[dict[str, list[View]], dict[str, list[View]]]:
        """Which tensors lie in the memory of others of the state dict: those of the state dict, and those beside it."""
        starts = sorted(start for start in self._by_place if start > 0)
        ends = [start + self._by_place[start].tensor.nbytes for start in starts]
        if not (self._beside or any(map(operator.gt, ends, starts[1:]))):
            return {}, {}  # nearly always, and quickly seen
        slots = [slot for slot in self.slots if _address(slot.tensor)]
        persistent = [slot for slot in slots if slot.persistent]
        beside = {} if len(persistent) == len(slots) else _views(slots)
        names = [slot.name for slot in slots if not slot.persistent and slot.name in beside]
        return _views(persistent), {name: beside[name] for name in names}


def _views(slots: list[Slot]) -> dict[str, list[View]]:
    """Names of slots that lie in the memory of one of the state dict, in another shape or as a part → those."""
    from torchload.core.sharing import View, layout_of, shared_runs

    layouts = [layout_of(slot.tensor) for slot in slots]
    found: dict[str, list[View]] = {}
    for run in shared_runs(layouts):
        dense = [index for index in run.members if slots[index].persistent and layouts[index].is_dense]
        for whole in [index for index in dense if math.prod(layouts[index].shape) == run.numel]:
            for part in run.members:
                views = [View(name, layouts[whole], layouts[part]) for name in slots[whole].names]
                for name in slots[part].names if part != whole else ():
                    found.setdefault(name, []).extend(views)
    return found


class _Kind(NamedTuple):
    """What a class of modules does itself when it is loaded."""

    has_extra_state: bool
    loads_itself: bool
    saves_itself: bool

    @classmethod
    def of(cls, kind: type[nn.Module]) -> _Kind:
        loader = kind._load_from_state_dict
        return cls(
            has_extra_state=kind.set_extra_state is not nn.Module.set_extra_state,
            loads_itself=all(loader is not base._load_from_state_dict for base in (nn.Module, *_HARMLESS_OVERRIDES)),
            saves_itself=kind._save_to_state_dict is not nn.Module._save_to_state_dict,
        )


def _note_hooks(target: Target, prefix: str, module: nn.Module, kind: _Kind) -> None:
    if kind.has_extra_state:
        target.extra_state[prefix + "_extra_state"] = module
    hooks = module._load_state_dict_pre_hooks
    if hooks and any(_name(hook) not in _HARMLESS_HOOKS for hook in hooks.values()):
        target.pre_hooks.append(HookedModule(prefix, module))
    if module._load_state_dict_post_hooks:
        target.post_hooks.append(HookedModule(prefix, module))
    if kind.loads_itself:
        target.overrides.append(HookedModule(prefix, module))
        if kind.saves_itself:
            target.own_state.update((prefix + name, shape) for name, shape in _own_state(module).items())


def _own_state(module: nn.Module) -> dict[str, Shape | None]:
    """What a module saves beside its parameters and buffers, by name; with the shape of what is quantized."""
    saved: OrderedDict[str, Any] = OrderedDict()
    try:
        module._save_to_state_dict(saved, "", False)
    except Exception:  # noqa: BLE001 - a module that can't be saved now (on meta) may still be loaded
        return {}
    registered = {*module._parameters, *module._buffers, "_extra_state"}
    return {name: _quantized_shape(value) for name, value in saved.items() if name not in registered}


def _quantized_shape(value: Any) -> Shape | None:
    """The shape of a quantized tensor, or of the first of a packed pair (weight, bias)."""
    first = value[0] if isinstance(value, tuple) and value else value
    return tuple(first.shape) if isinstance(first, torch.Tensor) and first.is_quantized else None


def _name(hook: Callable[..., object]) -> str:
    hook = getattr(hook, "hook", hook)  # torch wraps hooks that want the module
    return getattr(hook, "__qualname__", "")


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none of its own (meta, lazy, empty, wrapper subclasses)."""
    try:
        return tensor.data_ptr() if type(tensor) in _ORDINARY else 0
    except RuntimeError:  # of a layout that isn't strided
        return 0


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a tensor makes of the memory where it begins."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()


def settle(slots: Iterable[Slot]) -> None:
    """Let modules that keep lists of their own parameters, as recurrent ones do, take note of new memory."""
    recurrent = {module for slot in slots for module, _ in slot.places if isinstance(module, nn.RNNBase)}
    for module in recurrent:
        module._init_flat_weights()  # on a GPU this also puts them into one piece of memory


def own_loaders(target: Target) -> list[tuple[HookedModule, list[Slot]]]:
    """The outermost modules that bring their own `_load_from_state_dict`, each with the slots below it."""
    outermost: list[HookedModule] = []
    for hooked in target.overrides:
        if not any(hooked.prefix.startswith(other.prefix) for other in outermost):
            outermost.append(hooked)
    return [(hooked, [slot for slot in target.slots if slot.name.startswith(hooked.prefix)]) for hooked in outermost]
