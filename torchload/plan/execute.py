"""Carry out an accepted plan: the only stage that changes the model, and how it is left when something fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from torchload.core.checkpoint import TensorEntry
from torchload.core.collector import collector_paused
from torchload.core.undo import Undo
from torchload.errors import IncompatibleCheckpointError, TorchLoadError
from torchload.match import Selection
from torchload.model.shards import empty_part, held_numel, is_sharded, refresh_shards
from torchload.model.swap import Exchange
from torchload.model.target import Slot, Target
from torchload.plan.pairing import copies_of
from torchload.plan.plan import Assignment, Check, Conversion, LoadPlan, Way
from torchload.transfer import allocate, map_entries, map_entry, read_entries, run

if TYPE_CHECKING:
    from torchload.core.sharing import View

__all__ = ["Changes", "Moved", "carry_out", "compare_landed"]

Progress = Callable[[int, int], None]


class Moved(NamedTuple):
    """What a load took from the file, in bytes.

    Attributes:
        nbytes: What the model took, in the file's dtypes.
        read_bytes: What was read for it: more where parts lie so close together that reading over the gaps is quicker,
            less where parameters became views of the file.
    """

    nbytes: int
    read_bytes: int


class Changes:
    """What a load has changed of the model so far, at any moment.

    Attributes:
        in_place: Slots whose own memory was written to, or may have been.
        by_themselves: Names of what modules took by themselves.
        exchange: Where slots show new memory.
    """

    def __init__(self) -> None:
        self.in_place: list[Slot] = []
        self.by_themselves: list[str] = []
        self.exchange: Exchange | None = None

    def names(self) -> tuple[str, ...]:
        """All names of the tensors that are not what they were."""
        shown = self.exchange.shown if self.exchange is not None else []
        slots = {id(slot): slot for slot in (*self.in_place, *shown) if slot.persistent}
        return tuple(dict.fromkeys([*self.by_themselves, *(name for slot in slots.values() for name in slot.names)]))

    def tell(self, error: BaseException) -> None:
        """Let an error name them."""
        with contextlib.suppress(Exception):  # an object of somebody's own, without room for it
            error.written = self.names()  # type: ignore[attr-defined]


def carry_out(
    plan: LoadPlan,
    target: Target,
    selection: Selection,
    *,
    progress: AbstractContextManager[Progress | None] | None = None,
    guard: AbstractContextManager[object] | None = None,
    finish: Callable[[], object] = lambda: None,
    move: Callable[..., int] = run,
    changes: Changes | None = None,
) -> Moved:
    """Move the bytes. Fresh memory is shown to the model only when everything has arrived.

    What can fail because of the data itself (a cast that overflows) goes into fresh memory first; memory of the model's
    own is written last.

    Args:
        plan: What goes where.
        target: The model.
        selection: Where modules that load themselves find their tensors.
        progress: Entered while bytes move; what it gives receives (bytes done, bytes in all).
        guard: What to hold while the model shows its new memory.
        finish: What else has to succeed once it does. If it fails and the plan keeps old memory, the model shows that
            again.
        move: Carries out copies, as `torchload.transfer.run` does.
        changes: Kept up to date, whatever happens.

    Raises:
        CastOverflowError, CorruptCheckpointError, OSError: As the transfer does; the attribute ``written`` names the
            model's tensors that have changed, which are none where old memory is kept.
        IncompatibleCheckpointError: A module that loads itself refused.
    """
    undo, is_kept = Undo(), False
    changes = changes if changes is not None else Changes()
    try:
        _hand_over(plan, target, selection, undo, changes)
        fresh = _fresh_memory(plan.assignments)
        moved = _move(plan, fresh, progress if progress is not None else contextlib.nullcontext(), move, changes)
        shown = [(item.slot, fresh[id(item)]) for item in plan.assignments if id(item) in fresh]
        shown += [(item.slot, _converted(item)) for item in plan.conversions]
        refresh = partial(refresh_shards, target.model) if any(is_sharded(slot.tensor) for slot, _ in shown) else None
        changes.exchange = exchange = Exchange(shown, keeps_old=plan.keeps_old, guard=guard)
        if plan.keeps_old:
            undo.steps += [refresh] if refresh is not None else []
            undo.steps.append(exchange.take_back)
        interrupt = exchange.make()
        if refresh is not None:
            refresh()
        if interrupt is not None:
            is_kept = not plan.is_tentative  # it came too late: all of the model is new, and stays so
            raise interrupt
        finish()
        return moved
    except BaseException as error:
        failures = [] if is_kept else undo.roll_back()
        if not (is_kept or failures):
            changes.by_themselves.clear()
        changes.tell(error)
        if failures and not isinstance(failures[0], Exception) and isinstance(error, Exception):
            changes.tell(failures[0])
            raise failures[0] from error  # an interrupt, which must not be lost
        raise


def _hand_over(plan: LoadPlan, target: Target, selection: Selection, undo: Undo, changes: Changes) -> None:
    """Let modules load themselves, and take their extra state; all that refuse are named at once."""
    if not (plan.own_loaders or target.extra_state):
        return
    from torchload.plan import custom_loaders

    read = map_entry if plan.mmap else _read_entry
    own = tuple(hooked.prefix for hooked, _ in plan.own_loaders)
    refusals: list[custom_loaders.RefusedError] = []
    for name, module in target.extra_state.items():
        if name in selection.pairs and not (own and name.startswith(own)):
            changes.by_themselves.append(name)
            with custom_loaders.collecting(refusals):
                custom_loaders.set_extra_state(name, module, selection.leaves[selection.pairs[name]], read, undo)
    for hooked, slots in plan.own_loaders:
        if custom_loaders.is_given(hooked, selection):
            changes.by_themselves += [name for slot in slots for name in slot.names if slot.persistent]
            with custom_loaders.collecting(refusals):
                custom_loaders.run_own_loader(hooked, slots, selection, read, undo)
    if refusals:
        problems = [str(refusal) for refusal in refusals]
        raise IncompatibleCheckpointError("\n  ".join(problems), problems=problems) from refusals[0].__cause__


def _read_entry(entry: TensorEntry) -> torch.Tensor:
    """A tensor of memory of its own: whoever keeps it must not depend on a file that may be written to."""
    return read_entries([entry])[0]


def _converted(conversion: Conversion) -> torch.Tensor:
    """What a slot holds, elsewhere or in another dtype."""
    tensor = conversion.slot.tensor.detach()
    if tensor.is_meta:
        return torch.zeros(tensor.shape, dtype=conversion.dtype, device=conversion.device)
    return tensor.to(conversion.device, conversion.dtype)


def _move(
    plan: LoadPlan,
    fresh: Mapping[int, torch.Tensor],
    progress: AbstractContextManager[Progress | None],
    move: Callable[..., int],
    changes: Changes,
) -> Moved:
    """Into fresh memory first, then in place with a cast, which may overflow, then as it is."""
    fresh_way, in_place = Way.FRESH, Way.IN_PLACE
    new = [item for item in plan.assignments if item.way is fresh_way]
    own = [item for item in plan.assignments if item.way is in_place]
    cast = [item for item in own if item.entry.dtype is not item.dtype]
    same = [item for item in own if item.entry.dtype is item.dtype] if cast else own
    total, done = sum(map(_held_bytes, new)) + sum(map(_held_bytes, own)), 0
    with progress as tell:

        def report(now: int, _phase_bytes: int) -> None:
            if tell is not None:
                tell(min(done + now, total), total)

        for items in (new, cast, same):
            with collector_paused():
                memory = [fresh[id(item)] for item in new] if items is new else [item.slot.tensor for item in items]
                copies = [
                    copy for item, place in zip(items, memory) for copy in copies_of(item.name, item.entry, place)
                ]
            carried = partial(move, copies, check=plan.verify, progress=report if tell is not None else None)
            done += _noting(partial(carried, notes=plan.notes), [] if items is new else items, changes)
        report(total, total)
    unread = [item for item in plan.assignments if item.way is not fresh_way and item.way is not in_place]
    given = sum(entry.nbytes for entry in plan.given)
    return Moved(total + sum(map(_held_bytes, unread)) + given, read_bytes=done + (0 if plan.mmap else given))


def _held_bytes(item: Assignment) -> int:
    """What this process takes of a tensor, in the file's dtype."""
    return held_numel(item.slot.tensor, item.entry.shape) * item.entry.dtype.itemsize


def _noting(move: Callable[[], int], items: list[Assignment], changes: Changes) -> int:
    """Carry out one phase, and note which of `items` it wrote to: memory of the model's own."""
    before = len(changes.in_place)
    changes.in_place += [item.slot for item in items]  # until it is known better: an interrupt may come at any moment
    try:
        return move()
    except BaseException as error:
        if (written := getattr(error, "written", None)) is not None:
            slots = {item.name: item.slot for item in items}
            changes.in_place[before:] = [slots[name] for name in dict.fromkeys(written) if name in slots]
        raise


def _fresh_memory(assignments: list[Assignment]) -> dict[int, torch.Tensor]:
    """New memory for every assignment that needs it: mapped, or allocated together per device."""
    mapped = [item for item in assignments if item.way is Way.MAPPED]
    memory = dict(zip(map(id, mapped), map_entries([item.entry for item in mapped]))) if mapped else {}
    by_device: dict[torch.device, list[Assignment]] = {}
    for item in assignments:
        if item.way is Way.FRESH and is_sharded(item.slot.tensor):
            memory[id(item)] = empty_part(item.slot.tensor, item.dtype, item.device)
        elif item.way is Way.FRESH:
            by_device.setdefault(item.device, []).append(item)
    for device, items in by_device.items():
        tensors = allocate([(_shape(item), item.dtype) for item in items], device)
        for item, tensor in zip(items, tensors):
            memory[id(item)] = _laid_out_like(item, tensor)
    for item in assignments:
        if item.whole is not None and id(item.whole[0]) in memory:
            memory[id(item)] = _part(memory[id(item.whole[0])], item.whole[1])
    return memory


def _part(memory: torch.Tensor, view: View) -> torch.Tensor:
    """A view of new memory that lies in it as it did in the old one."""
    first = (view.part.start_bytes - view.whole.start_bytes) // view.whole.dtype.itemsize
    return memory.as_strided(view.part.shape, view.part.strides, memory.storage_offset() + first)


def _shape(item: Assignment) -> tuple[int, ...]:
    return item.slot.shape if item.slot.shape is not None else item.entry.shape


def _laid_out_like(item: Assignment, memory: torch.Tensor) -> torch.Tensor:
    """Keep the memory format (channels_last and the like) of the tensor that is replaced."""
    model = item.slot.tensor
    if item.slot.shape is None or model.is_contiguous():
        return memory
    return memory.as_strided(model.shape, torch.empty_like(model, device="meta").stride())


def compare_landed(plan: LoadPlan) -> None:
    """Read back what was loaded and compare it with the file, where its checksum doesn't tell already."""
    from torchload.plan.compare import Pair, compare  # for `verify=True` only

    pairs = [
        Pair(item.name, item.source, item.slot, item.entry) for item in plan.assignments if Check.AFTER in item.check
    ]
    if differing := compare(pairs):
        more = f" (and {len(differing) - 1:,} more)" if len(differing) > 1 else ""
        raise TorchLoadError(
            f"The checkpoint did not arrive as it was read: {differing[0]}{more}. The memory or a bus is at fault."
        )
