"""A plan as data: for every tensor of the model its source, how it gets its bytes, and when its data is checked.

`planner` makes it, `execute` carries it out and decides nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, Flag
from typing import TYPE_CHECKING, NamedTuple

import torch

from torchload.core.checkpoint import Extent, TensorEntry
from torchload.model.target import HookedModule, Slot

if TYPE_CHECKING:
    from torchload.core.sharing import View

__all__ = ["Assignment", "Check", "Conversion", "LoadPlan", "Way", "extents_of"]


class Way(Enum):
    """How a tensor gets its bytes."""

    IN_PLACE = "straight into the memory that it has"
    FRESH = "into new memory, which it shows once everything has arrived"
    MAPPED = "it shows a private view of the file"
    SEEN = "it lies in the memory of another tensor, and goes on to do so"


class Check(Flag):
    """When a tensor's data is checked."""

    NONE = 0
    BEFORE = 1
    """Before anything is changed: what is done with it can't be taken back, or nothing sums it on its way."""
    ARRIVAL = 2
    """As it arrives in memory that nobody sees yet."""
    AFTER = 4
    """Where it ended up, against the file: no checksum told of the whole way."""


@dataclass(slots=True, eq=False, repr=False)
class Assignment:
    """One slot of the model and the checkpoint tensor that fills it.

    Attributes:
        slot: The place.
        name: The model's name for it.
        source: The checkpoint's name.
        entry: The checkpoint's tensor.
        dtype: Element type that the slot will have.
        device: Device that the slot will be on.
        way: How it gets its bytes.
        check: When its data is checked.
        whole: What it lies in the memory of, and how.
    """

    slot: Slot
    name: str
    source: str
    entry: TensorEntry
    dtype: torch.dtype
    device: torch.device
    way: Way = Way.IN_PLACE
    check: Check = Check.NONE
    whole: tuple[Assignment, View] | None = None


class Conversion(NamedTuple):
    """A slot that no source fills but that must move or change its dtype with the rest; from meta it becomes zeros."""

    slot: Slot
    dtype: torch.dtype
    device: torch.device


class LoadPlan:
    """What a load will do, accepted.

    Attributes:
        assignments: Slots and their sources.
        conversions: Slots that only move.
        casts: (dtype in the file, dtype in the model) → number of tensors.
        own_loaders: Modules that load themselves, with the slots that this takes care of.
        given: What those modules are given, and what is given as extra state.
        kept: Names whose numbers the model keeps, since the file's are the same or nothing depends on them.
        notes: Sentences for the report.
        warnings: What a careful person would want to know before anything is written.
        keeps_old: Whether old memory is kept until all has succeeded, so that it can be shown again.
        is_tentative: Whether the model's post-hooks have yet to forgive what is missing or unexpected.
        mmap: Whether modules that load themselves may keep views of the file.
        verify: Whether data is checked as it arrives.
    """

    def __init__(
        self,
        own_loaders: list[tuple[HookedModule, list[Slot]]],
        *,
        keeps_old: bool,
        is_tentative: bool,
        mmap: bool,
        verify: bool,
    ) -> None:
        self.own_loaders = own_loaders
        self.keeps_old, self.is_tentative, self.mmap, self.verify = keeps_old, is_tentative, mmap, verify
        self.assignments: list[Assignment] = []
        self.conversions: list[Conversion] = []
        self.casts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
        self.given: list[TensorEntry] = []
        self.kept: list[str] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []

    @property
    def extents(self) -> list[Extent]:
        """The runs of bytes that it takes data from, each once."""
        return extents_of([*(item.entry for item in self.assignments), *self.given])

    @property
    def extents_to_check_first(self) -> list[Extent]:
        """Those whose data must be sound before anything is changed."""
        return extents_of([*(item.entry for item in self.assignments if Check.BEFORE in item.check), *self.given])


def extents_of(entries: Iterable[TensorEntry]) -> list[Extent]:
    """The runs of bytes that tensors lie in, each once."""
    return list({id(box.extent): box.extent for entry in entries for box in entry.boxes}.values())
