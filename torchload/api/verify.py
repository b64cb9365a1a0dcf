"""`verify_weights`: does a model hold a file's weights, bit for bit or as cast?"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from torchload.core.checkpoint import OpaqueTensor, TensorEntry, entries_in
from torchload.core.collector import collector_paused
from torchload.core.public import CheckpointLike, public
from torchload.core.shown import Shown
from torchload.core.text import format_bytes, format_seconds, listing, plural, short_dtype
from torchload.errors import Boundary
from torchload.formats import open_checkpoint
from torchload.match import Selection
from torchload.match.globs import Globs
from torchload.match.rename import Rename
from torchload.model.shards import is_hollow
from torchload.model.target import Slot, Target, describe_model
from torchload.plan.arguments import check_arguments, check_choice, with_hints
from torchload.plan.compare import Difference, Pair, compare
from torchload.plan.doubts import unkept
from torchload.plan.explain import incompatible
from torchload.plan.numbers import Verdict, judge_numbers
from torchload.plan.steps import select_for
from torchload.plan.twins import Twins, compare_extra_states, load_twins

__all__ = ["Difference", "VerifyReport", "verify_weights"]

_SHOWN = 8


@public
@dataclass(frozen=True, slots=True, repr=False)
class VerifyReport(Shown):
    """What a comparison found. It is true if the model holds the file's weights; `str()` says so, or what differs.

    Attributes:
        path: The checkpoint as the caller named it.
        model: Class name of the model.
        key: Path of the container that was compared, ``""`` for the top level.
        prefix: Prefix of the names that were used inside it, without its last dot; ``""`` for all.
        tensors: Number of the checkpoint's tensors that were compared.
        nbytes: Bytes of tensor data read.
        differing: Tensors that differ.
        missing_keys: Model names that the checkpoint lacks.
        unexpected_keys: Checkpoint names inside the model's modules without a place in it.
        skipped: Model names left out because of ``skip``.
        casts: ``("float32", "float16")`` → number of tensors compared as cast.
        seconds: Time from the call to the return, in seconds.
    """

    path: str
    model: str
    key: str = ""
    prefix: str = ""
    tensors: int = 0
    nbytes: int = 0
    differing: tuple[Difference, ...] = ()
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    skipped: tuple[str, ...] = ()
    casts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the model holds all of the weights and nothing differs."""
        return not (self.differing or self.missing_keys or self.unexpected_keys)

    def __bool__(self) -> bool:
        return self.ok

    def _headline(self) -> str:
        size = f"{format_bytes(self.nbytes)} in {format_seconds(self.seconds)}"
        where = ".".join(part for part in (self.key, self.prefix) if part)
        took = f" ({where!r})" if where else ""
        if self.ok:
            verdict = f"all {plural(self.tensors, 'tensor')} of the file are in the model"
        else:
            verdict = f"{len(self.differing):,} of {plural(self.tensors, 'tensor')} differ"
        return f"{self.path}{took} = {self.model}? {'yes' if self.ok else 'NO'}: {verdict} ({size})"

    def _details(self) -> list[tuple[str, str]]:
        lines = [("differs", str(difference)) for difference in self.differing[:_SHOWN]]
        if len(self.differing) > _SHOWN:
            lines.append(("…", f"and {len(self.differing) - _SHOWN:,} more"))
        lines += [
            (label, listing(names))
            for label, names in (("missing", self.missing_keys), ("unused", self.unexpected_keys))
            if names
        ]
        return [*lines, *(("as cast", f"{a} → {b} in {plural(n, 'tensor')}") for (a, b), n in self.casts.items())]


@public
@with_hints
def verify_weights(
    model: nn.Module,
    path: CheckpointLike,
    *,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    skip: Iterable[str] = (),
) -> VerifyReport:
    """Compare a model with a checkpoint, bit for bit.

    Which part of the file is meant, and which name belongs to which, is found as `smart_load` finds it. Where the model
    has another dtype than the file, it has to hold what the file's values become when they are cast to it; a finite
    value that became infinite is a difference all the same. The file is read in pieces: memory does not grow with it.

    A module that loads itself (with a `_load_from_state_dict` of its own, as quantized ones have) may make something
    else of what the file holds: a copy of it is loaded, one such module at a time, and all that the two hold is
    compared. Extra state is compared as well.

    Args:
        model: The model: on any device, wrapped or not. It is not changed.
        path: The checkpoint, in any form that `smart_load` takes.
        key: Which container of the file to compare with.
        prefix: Which sub-tree of names to compare with.
        rename: As in `smart_load`.
        skip: Globs of names to leave out on either side.

    Returns:
        What differs; true in a condition if nothing does.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        CheckpointFormatError: The file is no checkpoint, or a damaged one; the message says what it is.
        AmbiguousCheckpointError: Several parts of it fit equally well; the message lists them.
        IncompatibleCheckpointError: It has not one name in common with the model, or `skip` or `rename` matches none.

    Example:
        >>> from torchload import smart_load, verify_weights
        >>> report = smart_load(model, "model.pth")
        >>> verify_weights(model, "model.pth").ok
        True
        >>> with torch.no_grad():
        ...     _ = model.fc.bias[0].add_(1)
        >>> report = verify_weights(model, "model.pth")
        >>> report.ok, report.differing[0].name, report.differing[0].count
        (False, 'fc.bias', 1)
    """
    started = time.perf_counter()
    check_arguments(model, None, skip, (), False)
    check_choice(key, prefix, rename)
    with Boundary(called="verify_weights") as boundary, open_checkpoint(path) as checkpoint, torch.no_grad():
        boundary.path = checkpoint.path
        checkpoint.confirm()
        with collector_paused():
            target = describe_model(model)
            choice = {"key": key, "prefix": prefix, "rename": rename}
            globs = Globs(skip)
            selection = select_for(target, checkpoint, globs, strict=True, **choice)
            problems, told = unkept(target, selection, globs, rename=rename)
            if problems:
                raise incompatible(target, selection, problems)
        boundary.warn(told)
        twins = load_twins(target, selection)
        pairs, differing = _pairs(target, selection, twins)
        differing += [*compare(pairs), *twins.differing, *compare_extra_states(target, selection)]
    sources = [*twins.sources, *(pair.source for pair in pairs if pair.name not in twins.entries)]
    order = {name: position for position, name in enumerate(target.names)}
    dtypes = [(pair.entry.dtype, pair.slot.tensor.dtype) for pair in pairs]
    casts = Counter((short_dtype(file), short_dtype(model)) for file, model in dtypes if file is not model)
    return VerifyReport(
        path=checkpoint.path,
        model=type(model).__name__,
        key=selection.key,
        prefix=selection.prefix,
        tensors=len(sources),
        nbytes=sum(entry.nbytes for source in sources for entry in entries_in(selection.leaves[source])),
        differing=tuple(sorted(differing, key=lambda difference: order.get(difference.name, len(order)))),
        missing_keys=selection.missing,
        unexpected_keys=selection.unexpected,
        skipped=tuple(selection.skipped),
        casts=casts,
        seconds=time.perf_counter() - started,
    )


def _pairs(target: Target, selection: Selection, twins: Twins) -> tuple[list[Pair], list[Difference]]:
    """What can be compared, and what differs before any data is looked at."""
    pairs = [
        Pair(name, selection.pairs.get(name, name), target.by_name[name], entry)
        for name, entry in twins.entries.items()
    ]
    differing: list[Difference] = []
    given = set(twins.sources)
    for name, source in selection.pairs.items():
        slot, leaf = target.by_name.get(name), selection.leaves[source]
        if slot is None or source in given:
            continue  # extra state, or what a copy was loaded with
        if _keeps_its_own(name, slot, leaf):
            continue
        reason = _incomparable(name, slot, leaf, selection)
        if reason is not None or not isinstance(leaf, TensorEntry):
            numel = math.prod(slot.shape or ())
            differing.append(Difference(name, source, numel, numel, reason=reason or ""))
        else:
            pairs.append(Pair(name, source, slot, leaf))
    return pairs, differing


def _keeps_its_own(name: str, slot: Slot, leaf: object) -> bool:
    """Whether a load would leave the model's own numbers, since the file has them as floats that can't tell them."""
    if not isinstance(leaf, TensorEntry) or slot.tensor.dtype.is_floating_point or not leaf.dtype.is_floating_point:
        return False
    return slot.shape == leaf.shape and judge_numbers(name, leaf, slot.tensor) is Verdict.KEEP


def _incomparable(name: str, slot: Slot, leaf: object, selection: Selection) -> str | None:
    if name in selection.mismatched:
        in_file, in_model = selection.mismatched[name]
        return f"file {in_file}, model {in_model}"
    if isinstance(leaf, OpaqueTensor):
        return f"the file holds {leaf.reason}"
    if not isinstance(leaf, TensorEntry):
        return f"the file holds a {type(leaf).__name__}, not a tensor"
    if slot.shape is None or slot.tensor.is_meta:
        return "the model has no values for it yet"
    if is_hollow(slot.tensor):
        return f"the model has a {type(slot.tensor).__name__} there, without memory that could be compared"
    return None
