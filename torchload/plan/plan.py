"""Pair every tensor of the model with its source, and check everything that can be checked before a byte moves.

All problems are collected and raised together; until the plan stands the model is untouched.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from torchload.core.checkpoint import Box, OpaqueTensor, Record, Shape, TensorEntry, entries_in
from torchload.core.copies import Copy
from torchload.core.text import short_dtype
from torchload.match import Selection
from torchload.model.placement import Placement, check_room
from torchload.model.shards import Region, held_numel, home_of, is_hollow, is_ordinary, local_region
from torchload.model.target import HookedModule, Slot, Target, own_loaders
from torchload.plan.explain import incompatible

__all__ = ["Assignment", "DtypeSpec", "LoadPlan", "Options", "copies_into", "copies_of", "glob_matcher", "make_plan"]

DtypeSpec = torch.dtype | Literal["auto"] | None
_ZERO_AT_FIRST = frozenset({"num_batches_tracked"})  # buffers that begin as zeros, which torch's own upgrade fills in


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller asked for, checked and ready for planning.

    Attributes:
        placement: Where tensors go.
        dtype: Floating dtype to cast to, ``"auto"`` for the checkpoint's, ``None`` for the model's own.
        keep_fp32: Globs of names that stay float32.
        strict: Whether anything missing, mismatched or unexpected is an error.
        atomic: Whether everything is staged in fresh memory first.
        path: The checkpoint, for messages.
    """

    placement: Placement
    dtype: DtypeSpec
    keep_fp32: tuple[str, ...]
    strict: bool
    atomic: bool
    path: str


@dataclass(slots=True, eq=False)
class Assignment:
    """One slot of the model and the checkpoint tensor that fills it.

    Attributes:
        slot: The place.
        name: The model's name for it.
        source: The checkpoint's name.
        entry: The checkpoint's tensor.
        dtype: Element type that the slot will have.
        device: Device that the slot will be on.
        fresh: Whether it gets new memory; otherwise data goes straight into the memory it has.
    """

    slot: Slot
    name: str
    source: str
    entry: TensorEntry
    dtype: torch.dtype
    device: torch.device
    fresh: bool


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """A slot that no source fills but that must move or change its dtype with the rest; from meta it becomes zeros."""

    slot: Slot
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True, eq=False)
class LoadPlan:
    """What a load will do, accepted.

    Attributes:
        assignments: Slots and their sources.
        conversions: Slots that only move.
        conflicts: Slots for which the file has several sources; to be compared before anything is written.
        untouched: Model names that keep the values they have.
        casts: (dtype in the file, dtype in the model) → number of tensors.
        own_loaders: Modules that load themselves, with the slots that this takes care of.
        given: What those modules are given, and what is given as extra state.
        notes: Sentences for the report.
    """

    assignments: list[Assignment] = field(default_factory=list)
    conversions: list[Conversion] = field(default_factory=list)
    conflicts: list[tuple[str, list[tuple[str, TensorEntry]]]] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    casts: Counter[tuple[torch.dtype, torch.dtype]] = field(default_factory=Counter)
    own_loaders: list[tuple[HookedModule, list[Slot]]] = field(default_factory=list)
    given: list[TensorEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_plan(target: Target, selection: Selection, options: Options) -> LoadPlan:
    """Decide what goes where.

    Raises:
        IncompatibleCheckpointError: Anything that `strict` does not excuse, all of it at once.
        DeviceError: Too little memory on a device.
    """
    plan = LoadPlan()
    problems: list[str] = []
    keep_fp32 = glob_matcher(options.keep_fp32)
    pairs, mismatched, leaves = selection.pairs, selection.mismatched, selection.leaves
    plan.own_loaders = own_loaders(target)
    elsewhere = {id(slot) for _, slots in plan.own_loaders for slot in slots}
    if plan.own_loaders or target.extra_state:
        taken = {name for name, slot in target.by_name.items() if id(slot) not in elsewhere}
        given = {name: leaves[source] for name, source in pairs.items() if name not in taken}
        claimed = [leaves[source] for source in sorted(selection.claimed)]
        plan.given = [entry for value in (*given.values(), *claimed) for entry in entries_in(value)]
        for name, value in given.items():
            if isinstance(value, OpaqueTensor) and value.quantized is None:
                problems.append(f"{name} is {value.reason} in the file, which can't be loaded")
            elif isinstance(value, Record) and name in target.own_state:
                problems.append(f"{name} is {value.name} in the file, which would have to be built by running code")
    for slot in target.slots:
        if id(slot) in elsewhere:
            _plan_own(plan, problems, slot, selection, options, keep_fp32)
            continue
        sources = [(name, pairs[name]) for name in slot.names if name in pairs and name not in mismatched]
        if slot.tensor.is_meta and slot.name in selection.transient:  # nobody else could give it a value
            sources = [(slot.name, selection.transient[slot.name])]
        device = options.placement.of(slot.name, home_of(slot.tensor))
        if not sources:
            _plan_unfilled(plan, problems, slot, device, options, keep_fp32)
            continue
        name, source = sources[-1]  # as load_state_dict, where the last of several names wins
        entry = leaves[source]
        if not isinstance(entry, TensorEntry):
            what = entry.reason if isinstance(entry, OpaqueTensor) else f"a {type(entry).__name__}, not a tensor"
            problems.append(f"{name} is {what} in the file, which can't be loaded into a dense tensor")
            continue
        if is_hollow(slot.tensor):
            problems.append(
                f"{name} is a {type(slot.tensor).__name__} without memory that could be written to; load the weights "
                "before the model is converted to it"
            )
            continue
        if slot.shape is None and entry.is_expanded:
            problems.append(f"{name} takes its shape from the file, where it has more elements than there is data")
            continue
        dtype = _final_dtype(slot, entry, options, keep_fp32)
        if (reason := _impossible_cast(entry.dtype, dtype)) is not None:
            problems.append(f"{name}: {reason}")
            continue
        if len(sources) > 1:
            held = {leaf.location: (s, leaf) for _, s in sources if isinstance(leaf := leaves[s], TensorEntry)}
            if len(held) > 1:
                plan.conflicts.append((name, list(held.values())))
        plan.assignments.append(
            Assignment(slot, name, source, entry, dtype, device, _needs_memory(slot, dtype, device, options))
        )
        if entry.dtype is not dtype:
            plan.casts[entry.dtype, dtype] += 1
    if options.atomic and plan.own_loaders:
        names = ", ".join(sorted({type(hooked.module).__name__ for hooked, _ in plan.own_loaders}))
        plan.notes.append(f"modules that load themselves ({names}) were loaded in place, before the rest was exchanged")
    _check(plan, problems, target, selection, options)
    check_room(_fresh_bytes(plan), options.path)
    return plan


def _plan_own(
    plan: LoadPlan,
    problems: list[str],
    slot: Slot,
    selection: Selection,
    options: Options,
    keep_fp32: re.Pattern[str] | None,
) -> None:
    """Where a tensor goes after its module loaded itself."""
    device = options.placement.of(slot.name, home_of(slot.tensor))
    lacking = {*selection.missing, *selection.skipped}
    if not slot.persistent or not lacking.isdisjoint(slot.names):
        _plan_unfilled(plan, problems, slot, device, options, keep_fp32)
        return
    if slot.shape is None:
        return
    dtype = slot.tensor.dtype
    if isinstance(options.dtype, torch.dtype) and dtype.is_floating_point:
        dtype = torch.float32 if _any_match(keep_fp32, slot.names) else options.dtype
    if dtype is not slot.tensor.dtype or device != slot.tensor.device:
        plan.conversions.append(Conversion(slot, dtype, device))


def _plan_unfilled(
    plan: LoadPlan,
    problems: list[str],
    slot: Slot,
    device: torch.device,
    options: Options,
    keep_fp32: re.Pattern[str] | None,
) -> None:
    tensor = slot.tensor
    if slot.shape is None:
        return
    if tensor.is_meta and slot.name.rpartition(".")[2] in _ZERO_AT_FIRST:
        plan.conversions.append(Conversion(slot, tensor.dtype, device))
        return
    if tensor.is_meta:
        what = "isn't in the file" if slot.persistent else "is a non-persistent buffer, which no checkpoint holds"
        problems.append(
            f"{slot.name} is on the meta device and {what}; it would stay without a value. Build the model so "
            "that this tensor is real (for buffers: include_buffers=False), or assign it yourself first"
        )
        return
    if slot.persistent:
        plan.untouched.append(slot.name)
    dtype = tensor.dtype
    if isinstance(options.dtype, torch.dtype) and dtype.is_floating_point:
        dtype = torch.float32 if _any_match(keep_fp32, slot.names) else options.dtype
    if dtype is not tensor.dtype or device != tensor.device:
        plan.conversions.append(Conversion(slot, dtype, device))


def _final_dtype(slot: Slot, entry: TensorEntry, options: Options, keep_fp32: re.Pattern[str] | None) -> torch.dtype:
    now = slot.tensor.dtype
    if not now.is_floating_point:
        return now
    if keep_fp32 is not None and _any_match(keep_fp32, slot.names):
        return torch.float32
    if options.dtype == "auto":
        return entry.dtype if entry.dtype.is_floating_point else now
    return options.dtype if isinstance(options.dtype, torch.dtype) else now


def _impossible_cast(source: torch.dtype, target: torch.dtype) -> str | None:
    """Why a cast would lose what the numbers mean; ``None`` where it is sound."""
    if source is target or target.is_complex or (target.is_floating_point and not source.is_complex):
        return None
    if source.is_complex:
        return f"{short_dtype(source)} in the file would lose its imaginary part in {short_dtype(target)}"
    if source.is_floating_point:
        return f"{short_dtype(source)} in the file would lose its fractions in {short_dtype(target)}"
    if torch.bool in (source, target):
        # Masks were uint8 before torch 1.2 had bool.
        return (
            None if source.itemsize == target.itemsize else f"{short_dtype(source)} can't become {short_dtype(target)}"
        )
    if torch.iinfo(source).min < torch.iinfo(target).min or torch.iinfo(source).max > torch.iinfo(target).max:
        return f"{short_dtype(source)} in the file does not fit into {short_dtype(target)}"
    return None


def _needs_memory(slot: Slot, dtype: torch.dtype, device: torch.device, options: Options) -> bool:
    tensor = slot.tensor
    if options.atomic or slot.shape is None:
        return True
    if tensor.is_meta or tensor.dtype is not dtype or tensor.device != device:
        return True
    return torch._debug_has_internal_overlap(tensor) == 1  # one element is several, as in an expanded buffer


def _check(plan: LoadPlan, problems: list[str], target: Target, selection: Selection, options: Options) -> None:
    """Raise what stands against the plan."""
    if unused := options.placement.unused_prefixes(target.names):
        problems.append(f"device= names parts that the model does not have: {', '.join(map(repr, unused))}")
    if selection.alignment.ambiguous:
        for name, claims in list(selection.alignment.ambiguous.items())[:5]:
            problems.append(f"{name} could be any of {', '.join(claims[:4])}; use rename= or prefix= to decide")
    lacking = selection.missing or selection.mismatched or selection.unexpected
    hopeless = not options.strict and _almost_nothing(plan, target)
    if hopeless:
        problems.append(
            f"only {len(plan.assignments)} of {len(target.by_name)} tensors would be loaded: this is another model"
        )
    if problems or hopeless or (options.strict and lacking):
        raise incompatible(target, selection, problems, options.path)


def _almost_nothing(plan: LoadPlan, target: Target) -> bool:
    """Whether so little fits that calling it a load would mislead: under a tenth of the tensors and of the elements."""
    loaded = sum(assignment.entry.numel for assignment in plan.assignments)
    wanted = {id(slot): slot.tensor.numel() for slot in target.by_name.values() if slot.shape is not None}
    few_tensors = len(plan.assignments) * 10 < len(wanted)
    if plan.own_loaders and plan.given:
        return False  # how much is enough, those modules know
    return not plan.assignments or (few_tensors and loaded * 10 < sum(wanted.values()))


def _fresh_bytes(plan: LoadPlan) -> dict[torch.device, int]:
    need: dict[torch.device, int] = {}
    for item in plan.assignments:
        if item.fresh:
            held = held_numel(item.slot.tensor, item.entry.shape)
            need[item.device] = need.get(item.device, 0) + held * item.dtype.itemsize
    return need


# --- from assignments to copies ---


def copies_into(assignment: Assignment, memory: torch.Tensor) -> Iterator[Copy]:
    """The copies that fill one slot's memory.

    Args:
        assignment: What to load.
        memory: Where to: the model's own tensor, or fresh memory of the same shape.
    """
    return copies_of(assignment.name, assignment.entry, memory)


def copies_of(name: str, entry: TensorEntry, memory: torch.Tensor) -> Iterator[Copy]:
    """The copies that fill a tensor: one as a rule, several where the file or the tensor is sharded.

    Args:
        name: What to call it in messages.
        entry: What to load.
        memory: Where to: of the entry's shape, as a whole.
    """
    if len(entry.boxes) == 1 and entry.boxes[0].shape == memory.shape and is_ordinary(memory):
        yield Copy(name, entry.boxes[0], entry.dtype, memory)
        return
    local, region = local_region(memory)
    if region.shape == () and entry.shape == (1,):  # a scalar that was saved as one element
        local, region = local.view(1), Region((0,), (1,))
    for box in entry.boxes:
        if (part := _intersection(box, region, entry.dtype.itemsize)) is not None:
            piece, where = part
            view = local
            for dimension, (start, size) in enumerate(zip(where, piece.shape)):
                view = view.narrow(dimension, start, size)
            yield Copy(name, piece, entry.dtype, view)


def _intersection(box: Box, region: Region, itemsize: int) -> tuple[Box, Shape] | None:
    """The part of a box that lies in a region, and where in the region it begins."""
    begin = tuple(map(max, box.origin, region.origin))
    end = tuple(min(b + bs, r + rs) for b, bs, r, rs in zip(box.origin, box.shape, region.origin, region.shape))
    shape = tuple(e - b for b, e in zip(begin, end))
    if any(size <= 0 for size in shape):
        return None
    skipped = sum((b - o) * stride for b, o, stride in zip(begin, box.origin, box.strides))
    piece = Box(box.extent, box.start + skipped * itemsize, shape, box.strides, begin)
    return piece, tuple(b - r for b, r in zip(begin, region.origin))


# --- globs ---


def glob_matcher(patterns: Iterable[str]) -> re.Pattern[str] | None:
    """One regular expression for several globs over whole names; ``None`` for none.

    Example:
        >>> bool(glob_matcher(["fc.*", "*.bias"]).match("fc.weight"))
        True
    """
    translated = [fnmatch.translate(pattern) for pattern in patterns]
    return re.compile("|".join(translated)) if translated else None


def _any_match(matcher: re.Pattern[str] | None, names: Sequence[str]) -> bool:
    return matcher is not None and any(matcher.match(name) for name in names)
