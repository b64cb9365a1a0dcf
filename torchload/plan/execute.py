"""Carry out an accepted plan: the only stage that changes the model, and how it is left when something fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch

from torchload.core.checkpoint import Extent, TensorEntry
from torchload.core.copies import Copy
from torchload.errors import IncompatibleCheckpointError, TorchLoadError
from torchload.match import Selection
from torchload.model.shards import empty_part, held_numel, is_ordinary, is_sharded, refresh_shards
from torchload.model.swap import remember, show_again, swap
from torchload.model.target import Target
from torchload.plan import hooks
from torchload.plan.plan import Assignment, Conversion, LoadPlan, copies_into
from torchload.transfer import allocate, has_checksum, is_summed_in_place, map_entries, map_entry, run, same_data

__all__ = ["Moved", "carry_out", "compare_landed", "compare_ties", "extents_of", "extents_to_check_first"]

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


def carry_out(
    plan: LoadPlan,
    target: Target,
    selection: Selection,
    progress: Progress | None,
    *,
    mmap: bool,
    verify: bool = False,
    atomic: bool = False,
    guard: AbstractContextManager[object] | None = None,
    finish: Callable[[], object] = lambda: None,
    move: Callable[..., int] = run,
) -> Moved:
    """Move the bytes. Fresh memory is shown to the model only when everything has arrived.

    What can fail because of the data itself (a cast that overflows) goes into fresh memory first; memory of the model's
    own is written last.

    Args:
        plan: What goes where.
        target: The model.
        selection: Where modules that load themselves find their tensors.
        progress: Receives (bytes done, bytes in all).
        mmap: Whether fresh CPU memory may be a private view of the file.
        verify: Whether to compare data with the file's checksums as it arrives.
        atomic: Whether the model may be in use while new memory is shown to it.
        guard: What to hold while that happens.
        finish: What else has to succeed once the model shows its new memory. Where `atomic`, old memory is kept until
            then; if it fails, the model shows that again.
        move: Carries out copies, as `torchload.transfer.run` does.

    Returns:
        How much that was.

    Raises:
        CastOverflowError, CorruptCheckpointError, OSError: As the transfer does; the attribute ``written`` names the
            model's tensors that may have changed, which are none where fresh memory was used.
        IncompatibleCheckpointError: A module that loads itself refused.
    """
    undo = hooks.Undo()
    fresh: dict[int, torch.Tensor] = {}
    arrived: list[str] = []
    is_shown = False
    try:
        hooks.set_extra_states(target, selection, map_entry, undo)
        for loader in plan.own_loaders:
            hooks.run_own_loader(*loader, selection, map_entry, undo)
        mapped = [item for item in plan.assignments if mmap and _can_map(item)]
        fresh.update(zip(map(id, mapped), map_entries([item.entry for item in mapped])))
        moved = [item for item in plan.assignments if id(item) not in fresh] if mapped else plan.assignments
        fresh.update(_fresh_memory(moved))
        read_bytes = _move(move, moved, fresh, verify, progress, plan.notes)
        arrived.extend(item.name for item in moved)
        changes = [(item.slot, fresh[id(item)]) for item in plan.assignments if id(item) in fresh]
        changes += [(item.slot, _converted(item)) for item in plan.conversions]
        before = remember(changes) if atomic else []
        interrupt = swap(changes, before=before, guard=guard)
        refresh = partial(refresh_shards, target.model) if any(is_sharded(slot.tensor) for slot, _ in changes) else None
        if before:
            undo.steps += [refresh] if refresh is not None else []
            undo.steps.append(partial(show_again, before, guard))
        else:
            is_shown = True
        if refresh is not None:
            refresh()
        if interrupt is None:
            finish()
    except BaseException as error:
        undo.roll_back()
        _name_written(error, plan, arrived, is_shown)
        raise
    if interrupt is not None:
        interrupt.written = tuple(name for item in plan.assignments for name in item.slot.names)  # type: ignore[attr-defined]
        raise interrupt
    held = sum(held_numel(item.slot.tensor, item.entry.shape) * item.entry.dtype.itemsize for item in plan.assignments)
    return Moved(held + sum(entry.nbytes for entry in plan.given), read_bytes)


def _converted(conversion: Conversion) -> torch.Tensor:
    """What a slot holds, elsewhere or in another dtype."""
    tensor = conversion.slot.tensor.detach()
    if tensor.is_meta:
        return torch.zeros(tensor.shape, dtype=conversion.dtype, device=conversion.device)
    return tensor.to(conversion.device, conversion.dtype)


def _move(
    move: Callable[..., int],
    assignments: list[Assignment],
    fresh: Mapping[int, torch.Tensor],
    verify: bool,
    progress: Progress | None,
    notes: list[str],
) -> int:
    """Into fresh memory first, then in place with a cast, which may overflow, then as it is; returns bytes read."""
    phases: tuple[list[Copy], list[Copy], list[Copy]] = ([], [], [])
    for item in assignments:
        memory = fresh.get(id(item))
        if memory is not None:
            phases[0].extend(copies_into(item, memory))
        else:
            phases[1 if item.entry.dtype is not item.dtype else 2].extend(copies_into(item, item.slot.tensor))
    total = sum(item.entry.nbytes for item in assignments) if progress is not None else 0
    done = 0

    def report(now: int, _phase_bytes: int) -> None:
        if progress is not None:
            progress(min(done + now, total), total)

    written: list[str] = []
    copies: list[Copy] = []
    try:
        for copies in phases:
            done += move(copies, check=verify, progress=report if progress is not None else None, notes=notes)
            written.extend(copy.name for copy in copies)
        report(total, total)
    except BaseException as error:
        # An interrupt just before or after the work has no account of it: then all of this phase may be written.
        now = getattr(error, "written", None)
        error.written = (*written, *([copy.name for copy in copies] if now is None else now))  # type: ignore[attr-defined]
        raise
    return done


def _name_written(error: BaseException, plan: LoadPlan, arrived: list[str], is_shown: bool) -> None:
    """Let an error name the model's tensors that it left changed, under all their names.

    Args:
        error: The error.
        plan: What went where.
        arrived: What was moved before it, wherever to.
        is_shown: Whether the model shows fresh memory.
    """
    touched = {*getattr(error, "written", ()), *arrived}
    if touched or is_shown:
        changed = [item.slot for item in plan.assignments if is_shown or (not item.fresh and item.name in touched)]
        names = [name for slot in changed for name in slot.names]
        error.written = tuple(names)  # type: ignore[attr-defined]


def _fresh_memory(assignments: list[Assignment]) -> dict[int, torch.Tensor]:
    """New memory for every assignment that needs it, allocated together per device."""
    by_device: dict[torch.device, list[Assignment]] = {}
    memory: dict[int, torch.Tensor] = {}
    for item in assignments:
        if item.fresh and is_sharded(item.slot.tensor):
            memory[id(item)] = empty_part(item.slot.tensor, item.dtype, item.device)
        elif item.fresh:
            by_device.setdefault(item.device, []).append(item)
    for device, items in by_device.items():
        tensors = allocate([(_shape(item), item.dtype) for item in items], device)
        for item, tensor in zip(items, tensors):
            memory[id(item)] = _laid_out_like(item, tensor)
    return memory


def _shape(item: Assignment) -> tuple[int, ...]:
    return item.slot.shape if item.slot.shape is not None else item.entry.shape


def _laid_out_like(item: Assignment, memory: torch.Tensor) -> torch.Tensor:
    """Keep the memory format (channels_last and the like) of the tensor that is replaced."""
    model = item.slot.tensor
    if item.slot.shape is None or model.is_contiguous():
        return memory
    return memory.as_strided(model.shape, torch.empty_like(model, device="meta").stride())


def _can_map(item: Assignment) -> bool:
    fits = item.entry.dtype is item.dtype and item.entry.shape == _shape(item)
    return fits and item.device.type == "cpu" and not is_sharded(item.slot.tensor)


def extents_of(plan: LoadPlan) -> list[Extent]:
    """The runs of bytes that a plan takes data from, each once."""
    return _extents([*(item.entry for item in plan.assignments), *plan.given])


def extents_to_check_first(plan: LoadPlan, *, mmap: bool = False) -> list[Extent]:
    """Those of `extents_of` that must be checked before the load: nothing can be taken back of what is done with them.

    Fresh memory is thrown away if it turns out, as it arrives, that its data is damaged.
    """
    late = [
        item.fresh
        and not (mmap and _can_map(item))
        and item.device.type == "cpu"
        and is_ordinary(item.slot.tensor)
        and len(item.entry.boxes) == 1
        and has_checksum(item.entry.boxes[0], item.entry.dtype)
        for item in plan.assignments
    ]
    return _extents([*(item.entry for item, is_late in zip(plan.assignments, late) if not is_late), *plan.given])


def _extents(entries: Iterable[TensorEntry]) -> list[Extent]:
    return list({id(box.extent): box.extent for entry in entries for box in entry.boxes}.values())


def compare_ties(plan: LoadPlan, path: str) -> None:
    """Refuse a file that has different values for names that the model ties together."""
    problems = []
    for name, sources in plan.conflicts:
        first = sources[0][1]
        if not all(same_data(first, entry) for _, entry in sources[1:]):
            names = " and ".join(source for source, _ in sources)
            problems.append(f"{names} differ in the file, but the model ties them ({name})")
    if problems:
        raise IncompatibleCheckpointError(
            f"{path} does not fit this model. Nothing was loaded; the model is unchanged.\n  "
            + "\n  ".join(problems)
            + "\n  Untie the parameters first, or drop one copy: smart_load(..., rename=function that gives None)",
            path=path,
            problems=problems,
        )


def compare_landed(plan: LoadPlan, path: str, *, mmap: bool = False) -> None:
    """Read back what was loaded and compare it with the file, tensor by tensor, unless its checksum told already."""
    from torchload.plan.compare import Pair, compare  # for `verify=True` only

    pairs = [
        Pair(item.name, item.source, item.slot, item.entry) for item in plan.assignments if not _was_summed(item, mmap)
    ]
    if differing := compare(pairs):
        more = f" (and {len(differing) - 1:,} more)" if len(differing) > 1 else ""
        raise TorchLoadError(
            f"{path} did not arrive as it was read: {differing[0]}{more}. The memory or a bus is at fault.", path=path
        )


def _was_summed(item: Assignment, mmap: bool) -> bool:
    """Whether `carry_out` compared what lies in the model's memory with the file's checksum."""
    if not is_ordinary(item.slot.tensor) or (mmap and _can_map(item)):
        return False
    copies = list(copies_into(item, item.slot.tensor))
    return len(copies) == 1 and is_summed_in_place(copies[0])
