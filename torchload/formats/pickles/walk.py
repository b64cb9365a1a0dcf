"""From what an unpickler recorded to the tree of a checkpoint.

The walk is a loop over the containers that wait to be finished, not a recursion: what a hostile file nests cannot
exhaust the stack. Containers and records are finished in place, so shared references stay shared and cycles close.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from torchload.core.checkpoint import Container, Extent, OpaqueTensor, Record, Shape, TensorEntry
from torchload.core.source import MemorySource
from torchload.errors import CheckpointFormatError, TorchLoadError, damaged
from torchload.formats.pickles.modules import flatten_module, module_fields
from torchload.formats.pickles.standins import (
    AS_RECORD,
    UNRESOLVED,
    BlobReference,
    Call,
    Deferred,
    MappingStandIn,
    Outside,
    RecordStandIn,
    SetStandIn,
    StandInType,
    Storage,
    check_keys,
    fill,
)

if TYPE_CHECKING:
    from torchload.formats.pickles.unpickle import Unpickled

__all__ = ["Layout", "Walk"]

Layout = tuple[Shape, Shape, Shape, int, int]
"""Of a strided tensor: shape, strides, origin (zeros), number of elements, position of the last one in elements."""

MAX_DEPTH = 1000  # of containers within containers; picklers themselves give up near this
MAX_NESTING = 100  # of tuples and calls directly within one another
FEW_ITEMS = 16  # a shorter tuple is looked through again rather than remembered

_PENDING: Any = type("Pending", (), {"__slots__": ()})()

# What is a finished leaf, or was finished when it was first met.
_FINISHED = frozenset(
    (
        *(str, int, float, bool, type(None), bytes, bytearray, complex, set, frozenset),
        *(torch.dtype, Container, Record, TensorEntry, OpaqueTensor),
    )
)


class Walk:
    """The tree of one pickle in the making.

    Attributes:
        name: What to call the stream in messages.
        key: The name last met on the way, for messages.
        layouts: Those that were checked, by the numbers of shape and strides.
        budget: What the tree may cost; steps are items that are copied because a call refers to a whole collection.
    """

    def __init__(self, recorded: Unpickled, extent_of: Callable[[Storage], Extent] | None) -> None:
        self.name = recorded.name
        self.key: Any = None
        self.depth = 0
        self.layouts: dict[Shape, Layout] = {}
        self.budget = recorded.budget
        self._recorded = recorded
        self._extent_of = extent_of
        self._pending: list[tuple[Any, int]] = []
        self._nesting = 0
        # By identity; each entry keeps its original alive, so that no identity is used twice.
        self._lists: dict[int, list[Any]] = {}
        self._tuples: dict[int, tuple[tuple[Any, ...], Any]] = {}
        self._modules: dict[int, tuple[Record, Container]] = {}
        self._flattened: dict[int, Record] = {}  # by the identity of the container
        self._encoded: dict[tuple[int, str], tuple[str, bytes]] = {}
        self._classes: dict[StandInType, Record] = {}
        self._storages: dict[Storage, TensorEntry] = {}  # as tensors of their own

    def run(self, root: Any) -> Any:
        """Finish everything that is reachable from `root`."""
        result = self.value(root)
        pending = self._pending
        while pending:
            container, depth = pending.pop()
            if depth > MAX_DEPTH:
                self.fail(f"is nested more than {MAX_DEPTH} levels deep")
            self.depth = depth
            if type(container) is Container:
                self._finish_mapping(container)
            elif type(container) is list:
                self._finish_list(container)
            elif type(container) is Record:
                self._finish_record(container)
            else:
                flatten_module(self, *container)
        return result

    def value(self, item: Any) -> Any:
        """What a recorded object amounts to; containers are scheduled, not finished yet."""
        kind = type(item)
        if kind in _FINISHED:
            return item
        if isinstance(item, Call):
            value = item.value
            return self._call(item) if value is UNRESOLVED or value is _PENDING else value
        if kind is MappingStandIn:
            item.__class__ = Container
            self._pending.append((item, self.depth + 1))
            return item
        if kind is tuple:
            return self._tuple(item)
        if kind is list:
            if item and id(item) not in self._lists:
                self._lists[id(item)] = item
                self._pending.append((item, self.depth + 1))
            return item
        if isinstance(item, RecordStandIn):
            return self._record(item)
        return self._rare(item)

    def extent(self, storage: Storage) -> Extent:
        """Where a storage's bytes are."""
        if storage.extent is None:
            if self._extent_of is None:
                raise CheckpointFormatError(
                    f"{self.name} is a pickle whose tensors have their data elsewhere, as data.pkl has in a zip "
                    "checkpoint that was unpacked. Pack the folder again without compression: beside it, run "
                    "'zip -0 -r model.pth' with its name.",
                    path=self.name,
                    found="pickle without its data",
                )
            storage.extent = self._extent_of(storage)
        return storage.extent

    def extent_of_bytes(self, data: Any, big_endian: bool) -> Extent | None:
        """Bytes in the pickle as an extent, without a copy where they were left in the file."""
        source = self._recorded.source
        if type(data) is BlobReference and source is not None:
            blob = self._recorded.blobs[data.index]
            return Extent(source, blob.offset, blob.size, None, big_endian)
        found = self.bytes_of(data)
        if found is None:
            return None
        return Extent(MemorySource(found, self.name, self.budget), 0, len(found), None, big_endian)

    def bytes_of(self, data: Any) -> bytes | bytearray | None:
        """Recorded bytes, also where Python 2 or an old protocol spelled them otherwise; ``None`` if it isn't any."""
        data = self.value(data)
        if type(data) is str:
            try:
                return self.encoded(data, "utf-8")
            except UnicodeEncodeError:
                return None
        return data if type(data) in (bytes, bytearray) else None

    def encoded(self, text: str, encoding: str) -> bytes:
        """Text as bytes, each text once: many references to a long one must not multiply it."""
        found = self._encoded.get((id(text), encoding))
        if found is None:
            errors = "surrogateescape" if encoding == "utf-8" else "strict"
            found = self._encoded[id(text), encoding] = (text, text.encode(encoding, errors))
        return found[1]

    def allow(self, items: Any) -> Any:
        """A collection that is about to be copied; refuses when a stream makes too many copies."""
        if not isinstance(items, (list, tuple, dict)):
            raise TypeError("a call has no list or dict where one belongs")
        if isinstance(items, Container):
            self._complete(items)
        self.charge(len(items))
        return items

    def charge(self, count: int) -> None:
        """Count items that are copied although the stream has them once."""
        self.budget.step(count, self.name)

    def fail(self, what: str, cause: BaseException | None = None) -> NoReturn:
        """Refuse the file because of the value that is being looked at."""
        key = self.key if type(self.key) in (str, int) else None
        subject = "a value" if key is None else f"{key!r}" if len(str(key)) <= 200 else f"{str(key)[:200]!r}…"
        raise damaged(self.name, f"{subject} {what}") from cause

    def _call(self, call: Call) -> Any:
        if call.value is _PENDING or self._nesting >= MAX_NESTING:
            self.fail("refers to itself or is nested too deeply")
        call.value = _PENDING
        self._nesting += 1
        try:
            value = call.convert(self)
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            if isinstance(error, TorchLoadError):
                raise
            self.fail(f"is a malformed {call.qualified} ({error})", error)
        self._nesting -= 1
        if value is AS_RECORD:
            value = Record(call.qualified, call.args, call.state)
            self._pending.append((value, self.depth + 1))
        call.value = value
        return value

    def _tuple(self, item: tuple[Any, ...]) -> Any:
        many = len(item) > FEW_ITEMS or self._nesting
        if many and id(item) in self._tuples:
            return self._tuples[id(item)][1]
        if self._nesting >= MAX_NESTING:
            self.fail("is nested too deeply")
        self._nesting += 1
        result = item if _FINISHED.issuperset(map(type, item)) else self._tuple_of(item)
        self._nesting -= 1
        if many or result is not item:
            self._tuples[id(item)] = (item, result)
        return result

    def _tuple_of(self, item: tuple[Any, ...]) -> tuple[Any, ...]:
        values = [part if type(part) in _FINISHED else self.value(part) for part in item]
        return item if all(map(is_, values, item)) else tuple(values)

    def _record(self, item: RecordStandIn) -> Any:
        fields = module_fields(item)
        if fields is None:
            item.__class__ = Record  # type: ignore[assignment]
            self._pending.append((item, self.depth + 1))
            return item
        known = self._modules.get(id(item))
        if known is None:
            known = self._modules[id(item)] = (item, Container(origin=item.name))
            self._flattened[id(known[1])] = item
            self._pending.append((known, self.depth + 1))
        return known[1]

    def unflattened(self, item: Any) -> Any:
        """The module that a container stands for, where one was already put in its place."""
        return self._flattened.get(id(item), item)

    def _rare(self, item: Any) -> Any:
        """Values that hardly any tree holds."""
        kind = type(item)
        if isinstance(item, StandInType):
            if item not in self._classes:
                self._classes[item] = Record(item.qualified)
            return self._classes[item]
        if kind is SetStandIn:
            return self._set(item)
        if kind is BlobReference:
            blob = self._recorded.blobs[item.index]
            key = (item.index, "")
            if key not in self._encoded:
                data = bytes(self._recorded.data[blob.offset : blob.offset + blob.size])
                self._encoded[key] = ("", data)
            data = self._encoded[key][1]
            return data.decode("utf-8", "surrogateescape") if blob.text else data
        if kind is Outside:
            return item.value
        if kind is Storage:
            if item not in self._storages:
                self._storages[item] = self._storage_as_tensor(item)
            return self._storages[item]
        raise TypeError(f"no such stand-in: {kind}")  # pragma: no cover

    def _storage_as_tensor(self, storage: Storage) -> TensorEntry:
        dtype = storage.dtype or torch.uint8
        first, numel = storage.view or (0, storage.numel)
        if numel == 0:
            return TensorEntry(dtype, (0,), ())
        return TensorEntry.over(self.extent(storage), dtype, (numel,), start=first * dtype.itemsize)

    def _set(self, item: SetStandIn) -> Any:
        if item.value is UNRESOLVED:
            item.value = _PENDING
            elements = [self.value(element) for element in item]
            check_keys(elements)
            item.value = frozenset(elements) if item.frozen else set(elements)
        if item.value is _PENDING:
            self.fail("contains itself")
        return item.value

    def _finish_mapping(self, mapping: Container) -> None:
        self._complete(mapping)
        if mapping.metadata is not None:
            mapping.metadata = self.value(mapping.metadata)
        changed_keys = False
        for key, value in mapping.items():
            kind = type(value)
            if kind not in _FINISHED:
                self.key = key
                finished = self.value(value)
                if finished is not value:
                    mapping[key] = finished
            if type(key) is not str and type(key) not in _FINISHED and self.value(key) is not key:
                changed_keys = True
        if changed_keys:
            entries = [(self.value(key), value) for key, value in mapping.items()]
            mapping.clear()
            fill(mapping, entries)

    def _complete(self, mapping: Container) -> None:
        """Put the entries into a mapping that it was made of, or that were deferred."""
        made_of: Any = mapping.origin
        if type(made_of) is Deferred:
            made_of.fill(mapping)
            made_of = made_of.args
            mapping.origin = None
        if type(made_of) is tuple:
            mapping.origin = None
            self._prepend(mapping, made_of)

    def _prepend(self, mapping: Container, args: tuple[Any, ...]) -> None:
        """Entries that came as constructor arguments: a mapping, or a list of pairs (as Python 2 wrote them)."""
        later = dict(mapping)
        mapping.clear()
        for argument in args[:2]:
            if isinstance(argument, Container):
                mapping.update(self.allow(argument))
            elif type(argument) is list:
                fill(mapping, self.allow(argument))
        mapping.update(later)

    def _finish_list(self, items: list[Any]) -> None:
        if _FINISHED.issuperset(map(type, items)):
            return
        lists = self._lists
        for index, item in enumerate(items):
            kind = type(item)
            if kind not in _FINISHED and not (kind is list and id(item) in lists):
                finished = self.value(item)
                if finished is not item:
                    items[index] = finished

    def _finish_record(self, record: Record) -> None:
        record.args = self.value(record.args)
        record.state = self.value(record.state)
        if record.items:
            self._finish_list(record.items)
        if record.entries:
            self.value(record.entries)
