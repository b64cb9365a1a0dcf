"""Pair every tensor of the model with its source, decide how it gets its bytes, and check all that can be checked.

All problems are collected and raised together; until the plan stands the model is untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from torchload.core.checkpoint import Box, Checkpoint, OpaqueTensor, Record, TensorEntry, entries_in
from torchload.core.copies import Copy
from torchload.core.in_memory import TensorSource
from torchload.core.text import listing
from torchload.errors import advised
from torchload.match import Selection
from torchload.match.globs import Globs
from torchload.model.placement import check_room
from torchload.model.shards import held_numel, home_of, is_hollow, is_ordinary, is_sharded
from torchload.model.target import Slot, Target, own_loaders
from torchload.plan.doubts import doubts_about, unkept
from torchload.plan.dtypes import final_dtype, impossible_cast
from torchload.plan.numbers import Verdict, judge_numbers
from torchload.plan.options import Options
from torchload.plan.plan import Assignment, Check, Conversion, LoadPlan, Way, extents_of
from torchload.transfer import can_map

__all__ = ["make_plan"]

_ZERO_AT_FIRST = frozenset({"num_batches_tracked"})  # buffers that begin as zeros, which torch's own upgrade fills in


def make_plan(target: Target, checkpoint: Checkpoint, selection: Selection, options: Options) -> LoadPlan:
    """Decide what goes where, and how.

    Raises:
        IncompatibleCheckpointError: Anything that `strict` does not excuse, all of it at once.
        DeviceError: Too little memory on a device.
        CorruptCheckpointError: Names that the model ties had to be compared, and their data is damaged.
    """
    planner = _Planner(target, checkpoint, selection, options)
    planner.plan_modules()
    for slot in target.slots:
        planner.plan_slot(slot)
    planner.plan_views()
    planner.check()
    check_room(_fresh_bytes(planner.plan))
    return planner.plan


class _Planner:
    """A plan in the making, and what stands against it."""

    def __init__(self, target: Target, checkpoint: Checkpoint, selection: Selection, options: Options) -> None:
        self.target, self.checkpoint, self.selection, self.options = target, checkpoint, selection, options
        self.problems: list[str] = []
        self._valueless: list[Slot] = []
        lacks_names = bool(selection.missing or selection.unexpected)
        tentative = options.strict and lacks_names and bool(target.post_hooks)
        self.plan = LoadPlan(
            own_loaders(target),
            keeps_old=options.atomic or tentative,
            is_tentative=tentative,
            mmap=options.mmap,
            verify=options.verify,
        )
        self._keep_fp32: frozenset[str] = frozenset()
        if options.keep_fp32:
            self._keep_fp32 = Globs(options.keep_fp32).of(target.bare(_all_names(target)))
        self._stays = options.placement.leaves_all
        self._by_themselves = {id(slot) for _, slots in self.plan.own_loaders for slot in slots}
        self._lacking = {*selection.missing, *selection.skipped}

    # --- what modules are given ---

    def plan_modules(self) -> None:
        """What modules take by themselves: those with a loader of their own, and extra state."""
        target, selection, plan = self.target, self.selection, self.plan
        if not (plan.own_loaders or target.extra_state):
            return
        taken = {name for name, slot in target.by_name.items() if id(slot) not in self._by_themselves}
        given = {name: selection.leaves[source] for name, source in selection.pairs.items() if name not in taken}
        claimed = [selection.leaves[source] for source in sorted(selection.claimed)]
        plan.given = [entry for value in (*given.values(), *claimed) for entry in entries_in(value)]
        for name, value in given.items():
            if isinstance(value, OpaqueTensor) and value.quantized is None:
                self.problems.append(f"{name} is {value.reason} in the file, which can't be loaded")
            elif isinstance(value, Record) and name in target.own_state:
                self.problems.append(
                    f"{name} is {value.name} in the file, which would have to be built by running code"
                )
        if self.options.atomic and plan.own_loaders:
            names = ", ".join(sorted({type(hooked.module).__name__ for hooked, _ in plan.own_loaders}))
            plan.notes.append(
                f"modules that load themselves ({names}) were loaded in place, before the rest was exchanged"
            )

    # --- one tensor of the model ---

    def plan_slot(self, slot: Slot) -> None:
        """Where a slot gets its values from, or that it keeps those it has."""
        tensor, is_meta = slot.tensor, slot.tensor.is_meta
        here = home_of(tensor) if is_meta else tensor.device
        device = here if self._stays and not is_meta else self.options.placement.of(slot.name, here)
        if id(slot) in self._by_themselves:
            is_filled = slot.persistent and self._lacking.isdisjoint(slot.names)
            self._plan_unread(slot, device, is_filled=is_filled)
            return
        sources = self._sources(slot)
        if not sources:
            self._plan_unread(slot, device)
            return
        name, source = sources[0]
        entry = self.selection.leaves[source]
        if slot.shape is None and isinstance(entry, OpaqueTensor) and entry.is_uninitialized:
            self.plan.kept.append(name)  # as in torch, a lazy tensor stays lazy
            return
        if not isinstance(entry, TensorEntry):
            what = entry.reason if isinstance(entry, OpaqueTensor) else f"a {type(entry).__name__}, not a tensor"
            self.problems.append(f"{name} is {what} in the file, which can't be loaded into a dense tensor")
            return
        dtype = self._dtype(slot, entry)
        if entry.dtype is not dtype or slot.shape is None or is_hollow(tensor):
            unfit = self._unfit(name, slot, entry, dtype)
            if unfit is Verdict.KEEP:
                self.plan.kept.append(name)
                self._plan_unread(slot, device, is_filled=True)
                return
            if isinstance(unfit, str):
                self.problems.append(f"{name}{unfit}")
                return
            self.plan.casts[entry.dtype, dtype] += entry.dtype is not dtype
        if len(sources) > 1:  # of which any one will do
            self._compare_ties(name, sources)
        item = Assignment(slot, name, source, entry, dtype, device)
        item.way = self._way(item, is_meta or dtype is not tensor.dtype or (device is not here and device != here))
        if self.options.verify:
            item.check = _check(item)
        self.plan.assignments.append(item)

    def _sources(self, slot: Slot) -> list[tuple[str, str]]:
        """(model name, checkpoint name) of what the file has for a slot, once for each of its names."""
        pairs, mismatched, transient = self.selection.pairs, self.selection.mismatched, self.selection.transient
        if transient and slot.tensor.is_meta and slot.name in transient:  # nobody else could give it a value
            return [(slot.name, transient[slot.name])]
        return [(name, pairs[name]) for name in slot.names if name in pairs and name not in mismatched]

    def _plan_unread(self, slot: Slot, device: torch.device, *, is_filled: bool = False) -> None:
        """A slot that nothing is read for here: it may have to move with the rest.

        Args:
            slot: The slot.
            device: Where it goes.
            is_filled: Whether its module fills it.
        """
        tensor = slot.tensor
        if slot.shape is None:
            return
        if slot.name in self.selection.aliases and tensor.is_meta:
            return  # said with what it is an alias of
        if tensor.is_meta and not is_filled and slot.name.rpartition(".")[2] not in _ZERO_AT_FIRST:
            self._valueless.append(slot)
            return
        dtype = final_dtype(tensor.dtype, self.options.dtype, keeps_fp32=self._keeps_fp32(slot))
        if dtype is not tensor.dtype or device != tensor.device:
            self._check_sharing(slot, "another dtype or device")
            self.plan.conversions.append(Conversion(slot, dtype, device))

    def _unfit(self, name: str, slot: Slot, entry: TensorEntry, dtype: torch.dtype) -> Verdict | str:
        """Why a slot can't take a tensor, as the rest of a sentence that begins with its name; or a verdict."""
        if is_hollow(slot.tensor):
            return (
                f" is a {type(slot.tensor).__name__} without memory that could be written to; load the weights before "
                "the model is converted to it"
            )
        if slot.shape is None and entry.is_expanded:
            return " takes its shape from the file, where it has more elements than there is data"
        if (reason := impossible_cast(entry.dtype, dtype)) is None:
            return Verdict.LOAD
        is_number = not (dtype.is_floating_point or entry.dtype.is_complex or dtype.is_complex)
        return judge_numbers(name, entry, slot.tensor) if is_number else f": {reason}"

    def _dtype(self, slot: Slot, entry: TensorEntry) -> torch.dtype:
        now, wish, keeps = slot.tensor.dtype, self.options.dtype, self._keeps_fp32(slot)
        return final_dtype(now, wish, stored=entry.dtype, keeps_fp32=keeps) if wish is not None or keeps else now

    def _keeps_fp32(self, slot: Slot) -> bool:
        return bool(self._keep_fp32) and not self._keep_fp32.isdisjoint(slot.names)

    def _compare_ties(self, name: str, sources: list[tuple[str, str]]) -> None:
        """Refuse different values for names that the model ties together."""
        leaves = self.selection.leaves
        held = {leaf.location: (s, leaf) for _, s in sources if isinstance(leaf := leaves[s], TensorEntry)}
        self._compare(name, *held.values())

    def _compare(self, name: str, first: tuple[str, TensorEntry], *others: tuple[str, TensorEntry]) -> None:
        if not others:
            return
        from torchload.transfer.checks import same_data, verify_extents

        if self.options.verify:
            verify_extents(extents_of([entry for _, entry in (first, *others)]))
        if not all(same_data(first[1], other) for _, other in others):
            names = " and ".join(source for source, _ in (first, *others))
            self.problems.append(
                f"{names} differ in the file, but the model ties them ({name}). Untie the parameters first, or drop "
                f"one copy: {advised('rename=function that gives None')}"
            )

    def plan_views(self) -> None:
        """What lies in the memory of another tensor of the model: one value for both, and new memory for both."""
        has_views = self.target.views or self.target.transient_views
        items = {item.name: item for item in self.plan.assignments} if has_views else {}
        wholes: set[str] = set()
        for part in items.values():
            for view in self.target.views.get(part.name, ()):
                whole = items.get(view.name)
                if whole is None or (whole.dtype, whole.device) != (part.dtype, part.device):
                    continue
                seen = view.seen_in(whole.entry)
                if seen is None:
                    continue
                if seen.location != part.entry.location:
                    self._compare(part.name, (whole.source, seen), (part.source, part.entry))
                if whole.way is not Way.SEEN and part.name not in wholes:
                    wholes.add(whole.name)
                    part.way, part.check, part.whole = Way.SEEN, Check.NONE, (whole, view)
                    break

        self._plan_transient_views(items)

    def _plan_transient_views(self, items: dict[str, Assignment]) -> None:
        """Non-persistent buffers that lie in memory which is exchanged: they go on to show what they are views of."""
        transient = self.target.transient_views
        for slot in [
            slot for slot in self.target.slots if transient and not slot.persistent and slot.name in transient
        ]:
            found = [(items[view.name], view) for view in transient[slot.name] if view.name in items]
            if not found or found[0][0].way is Way.IN_PLACE or id(slot) in self._by_themselves:
                continue
            whole, view = found[0]
            moves = [item for item in self.plan.conversions if item.slot is slot]
            dtype, device = (moves[0].dtype, moves[0].device) if moves else (slot.tensor.dtype, slot.tensor.device)
            seen = view.seen_in(whole.entry)
            item = Assignment(slot, slot.name, whole.source, seen or whole.entry, dtype, device, Way.FRESH)
            if (whole.dtype, whole.device) == (dtype, device):
                item.way, item.whole = Way.SEEN, (whole, view)
            elif seen is None:
                continue
            self.plan.conversions = [other for other in self.plan.conversions if other.slot is not slot]
            self.plan.assignments.append(item)

    # --- how it gets its bytes ---

    def _way(self, item: Assignment, is_moved: bool) -> Way:
        slot, tensor = item.slot, item.slot.tensor
        maps = self.options.mmap and _can_map(item) and item.name not in self._in_views
        if is_moved or maps:
            self._check_sharing(slot, "another dtype or device" if is_moved else "mmap=True")
        if maps:
            return Way.MAPPED
        if self.plan.keeps_old or slot.shape is None or is_moved or self._is_read_from_the_model(item):
            return Way.FRESH
        if not tensor.is_contiguous() and torch._debug_has_internal_overlap(tensor) == 1:
            return Way.FRESH  # one element is several, as in an expanded buffer
        return Way.IN_PLACE

    def _check_sharing(self, slot: Slot, what: str) -> None:
        if slot.is_shared:
            self.problems.append(
                f"{slot.name} is in memory that processes share, which {what} would replace; load without it"
            )

    def _is_read_from_the_model(self, item: Assignment) -> bool:
        """Whether a tensor's source is memory of the model, which may be written to before it is read."""
        for box in item.entry.boxes:
            if type(box) is not Box:
                return False  # a chunk in a file, which only the rank that needs it looks up
            source = box.extent.source
            if type(source) is TensorSource and source.address in self._own_memory:
                return True
        return False

    @cached_property
    def _in_views(self) -> frozenset[str]:
        """Names of tensors that lie in one piece of memory with others; a view of the file would part them."""
        views, transient = self.target.views, self.target.transient_views
        wholes = [view.name for found in (*views.values(), *transient.values()) for view in found]
        return frozenset([*views, *wholes])

    @cached_property
    def _own_memory(self) -> frozenset[int]:
        """Where the storages of the model begin."""
        tensors = [slot.tensor for slot in self.target.slots if is_ordinary(slot.tensor) and not slot.tensor.is_meta]
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    # --- what stands against it ---

    def check(self) -> None:
        """Raise what stands against the plan."""
        target, selection, problems, options = self.target, self.selection, self.problems, self.options
        if unused := options.placement.unused_prefixes(target.names):
            problems.append(_misplaced(unused))
        for name, claims in list(selection.alignment.ambiguous.items())[:5]:
            problems.append(f"{name} could be any of {', '.join(claims[:4])}; use rename= or prefix= to decide")
        slips, idle = unkept(target, selection, options.skip, options.keep_fp32, options.rename)
        doubts, warnings = doubts_about(target, self.checkpoint, selection, options)
        self.plan.warnings = [*idle, *warnings]
        problems += doubts
        lacking = selection.missing or selection.mismatched or selection.unexpected
        if (not options.strict or self.plan.is_tentative) and self._almost_nothing():
            problems.append(
                f"only {len(self.plan.assignments)} of {len(target.by_name)} tensors would be loaded: this is another "
                "model"
            )
        forgivable = self.plan.is_tentative and not selection.mismatched
        is_refused = bool(options.strict and lacking and not forgivable)
        said = {*selection.missing, *selection.mismatched} if is_refused else set()
        problems += self._without_values(said)
        if problems or slips or is_refused:
            from torchload.plan.explain import incompatible

            raise incompatible(target, selection, problems, slips, self.checkpoint.whole())

    def _without_values(self, said: set[str]) -> Iterator[str]:
        """What nothing fills of what is on the meta device, by the reason, but for the names that an error lists."""
        reasons: dict[str, list[str]] = {}
        for slot in self._valueless:
            if not slot.persistent:
                why = "not in the file (non-persistent buffers never are)"
            elif slot.name in self.selection.skipped:
                why = "skipped"
            else:
                why = "of another shape in the file" if slot.name in self.selection.mismatched else "not in the file"
            if said.isdisjoint(slot.names):
                reasons.setdefault(why, []).append(slot.name)
        for why, names in reasons.items():
            be, it, this = "is", "it a value", "this tensor is"
            if len(names) > 1:
                be, it, this = "are", "them values", "these tensors are"
            yield (
                f"{listing(names)} {be} on the meta device and {why}: nothing would give {it}. Build the model so that "
                f"{this} real (for buffers: include_buffers=False), or assign {it} first"
            )

    def _almost_nothing(self) -> bool:
        """Whether so little fits that calling it a load would mislead: a tenth of the tensors and of the elements."""
        items, target = self.plan.assignments, self.target
        if self.plan.own_loaders and self.plan.given:
            return False  # how much is enough, those modules know
        if items and self.selection.used_up and not (self.selection.prefix or self.selection.added):
            return False  # a small file that is used up under its own names: an adapter, a prompt
        wanted = {id(slot): slot.tensor.numel() for slot in target.by_name.values() if slot.shape is not None}
        few_tensors = len(items) * 10 < len(wanted)
        few_elements = sum(item.entry.numel for item in items) * 10 < sum(wanted.values())
        return bool(target.names) and ((not items and not self.plan.kept) or (few_tensors and few_elements))


def _all_names(target: Target) -> list[str]:
    return [name for slot in target.slots for name in slot.names]


def _misplaced(unused: Sequence[str]) -> str:
    """What is wrong with a mapping of devices that names what the model doesn't have."""
    text = f"device= names parts that the model does not have: {', '.join(map(repr, unused))}"
    if any(name.partition(":")[0] in _DEVICE_TYPES for name in unused):
        text += "; it maps from the names of modules to devices, such as {'encoder': 'cuda:0', '': 'cpu'}"
    return text


_DEVICE_TYPES = frozenset({"cpu", "cuda", "mps", "xpu", "meta"})


def _can_map(item: Assignment) -> bool:
    shape = item.slot.shape if item.slot.shape is not None else item.entry.shape
    fits = item.entry.dtype is item.dtype and item.entry.shape == shape and item.device.type == "cpu"
    return fits and not is_sharded(item.slot.tensor) and can_map(item.entry)


def _check(item: Assignment) -> Check:
    """When the data of a tensor is checked."""
    from torchload.transfer.checksums import has_checksum, is_summed_in_place

    boxes = item.entry.boxes
    is_plain = len(boxes) == 1 and is_ordinary(item.slot.tensor) and item.device.type == "cpu"
    is_summed = is_plain and item.way is not Way.MAPPED and has_checksum(boxes[0], item.entry.dtype)
    check = Check.ARRIVAL if is_summed and item.way is Way.FRESH else Check.BEFORE
    if is_summed and item.slot.shape == item.entry.shape and not item.slot.is_shared:
        copy = Copy(item.name, boxes[0], item.entry.dtype, item.slot.tensor)
        if item.dtype is item.slot.tensor.dtype and is_summed_in_place(copy, item.device):
            return check
    return check | Check.AFTER


def _fresh_bytes(plan: LoadPlan) -> dict[torch.device, int]:
    need: dict[torch.device, int] = {}
    for item in plan.assignments:
        if item.way is Way.FRESH:
            held = held_numel(item.slot.tensor, item.entry.shape)
            need[item.device] = need.get(item.device, 0) + held * item.dtype.itemsize
    return need
