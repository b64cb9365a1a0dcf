"""From what was planned and done to the account of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchload.core.checkpoint import Checkpoint, Extent, Record, TensorEntry
from torchload.core.text import format_bytes, listed, plural, short_dtype
from torchload.match import Selection
from torchload.model.target import Target
from torchload.plan.execute import Moved
from torchload.plan.plan import LoadPlan
from torchload.plan.report import LoadReport

__all__ = ["report_of"]


def report_of(
    target: Target,
    checkpoint: Checkpoint,
    selection: Selection,
    plan: LoadPlan,
    moved: Moved,
    seconds: float,
    *,
    verify: bool = False,
) -> LoadReport:
    """The account of a load that was carried out."""
    filled = [slot for slot in target.slots if slot.persistent]
    devices = dict.fromkeys(slot.tensor.device for slot in filled)
    own = [name for name in target.own_state if name in selection.pairs]
    lacking = {*selection.missing, *selection.skipped}
    loaded = sum(item.slot.persistent for item in plan.assignments)
    loaded += sum(slot.persistent and lacking.isdisjoint(slot.names) for _, slots in plan.own_loaders for slot in slots)
    return LoadReport(
        path=checkpoint.path,
        model=type(target.model).__name__,
        device=", ".join(map(str, devices)) or "no device",
        format=checkpoint.format,
        key=selection.key,
        prefix=selection.prefix,
        rivals=selection.rivals,
        averaged=selection.averaged,
        beside=_beside(checkpoint.root, selection),
        rewrites=tuple(_rewrites(selection)),
        tensors=loaded + len(own),
        total=len(filled) + len(target.own_state),
        nbytes=moved.nbytes,
        read_bytes=moved.read_bytes,
        casts={(short_dtype(a), short_dtype(b)): count for (a, b), count in plan.casts.items()},
        ties=tuple(tuple(slot.names) for slot in filled if len(slot.names) > 1),
        missing_keys=selection.missing,
        unexpected_keys=selection.unexpected,
        mismatched=selection.mismatched,
        skipped=tuple(selection.skipped),
        outside=tuple(selection.outside),
        ignored=(*selection.ignored, *plan.kept),
        seconds=seconds,
        training=target.model.training,
        notes=tuple(_notes(checkpoint, selection, plan, verify)),
    )


def _beside(root: Any, selection: Selection) -> dict[str, object]:
    """The other entries of the file's top level, as small values or the names of their types."""
    if not isinstance(root, Mapping):
        return {}
    top = selection.key.split(".")[0]
    beside: dict[str, object] = {}
    for name, value in root.items():
        if str(name) == top or (isinstance(value, TensorEntry) and not selection.key):  # the state dict's own
            continue
        small = value is None or isinstance(value, float) or (isinstance(value, str) and len(value) <= 200)
        small = small or (isinstance(value, int) and abs(value) < 1 << 64)  # Python refuses to print the hugest
        beside[str(name)] = value if small else _kind(value)
    return beside


def _kind(value: object) -> str:
    if isinstance(value, TensorEntry):
        return "Tensor"
    return value.name if isinstance(value, Record) else type(value).__name__


def _rewrites(selection: Selection) -> Iterator[str]:
    """How names were reconciled, in words."""
    total = len(selection.pairs)
    for side, label in selection.alignment.dropped:
        names = selection.pairs.values() if side == "file" else selection.pairs
        count = sum(f".{label}." in f".{name}" for name in names)
        done, to = ("removed", "from") if side == "file" else ("added", "to")
        yield f"{done} {label + '.'!r} {to} {'every name' if count >= total else plural(count, 'name')}"
    if selection.added:
        yield f"added {selection.added + '.'!r} to every name"
    for rule in dict.fromkeys(selection.alignment.renamed.values()):
        count = sum(kind == rule for kind in selection.alignment.renamed.values())
        yield f"renamed {plural(count, 'tensor')} ({rule})"


def _notes(checkpoint: Checkpoint, selection: Selection, plan: LoadPlan, verify: bool) -> Iterator[str]:
    """The sentences that are worth reading, whatever was done."""
    yield from checkpoint.notes
    if verify:
        yield from _unverified(plan.extents)
    yield from selection.notes
    rivals = listed([repr(rival) for rival in selection.rivals])
    if selection.averaged and rivals:
        yield f"took the averaged weights; {rivals} would fit too (key= chooses)"
    elif rivals:
        yield f"{rivals} would fit too (key= chooses)"
    yield from plan.notes


def _unverified(extents: list[Extent]) -> Iterator[str]:
    """What `verify` can't promise: data that changed on its way to this file shows only in a checksum."""
    lacking = [extent for extent in extents if extent.crc32 is None and extent.nbytes]
    if lacking:
        part = (
            "its data"
            if len(lacking) == len(extents)
            else f"{format_bytes(sum(e.nbytes for e in lacking))} of its data"
        )
        yield f"the file records no checksums for {part}: damage that keeps its size can't be told from other weights"
