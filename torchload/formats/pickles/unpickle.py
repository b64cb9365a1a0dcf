"""The inert unpickler: a pickle becomes containers, tensor entries and records, and nothing that it asks for is done.

Three steps, so that a format may learn where its storages lie between the second and the third:

1. `check_stream` bounds the opcodes (see `torchload.formats.pickles.opcodes`);
2. `unpickle` runs the C unpickler, in which every global is a stand-in that only records (see
   `torchload.formats.pickles.standins`);
3. `Unpickled.finish` turns what was recorded into the tree: rebuild calls become `TensorEntry`s, checked against
   their storages; whole modules become the containers that their state dict would be; all else becomes `Record`s.

Nothing here imports, looks up or calls by a name from the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchload.core.budget import Budget
from torchload.errors import CorruptCheckpointError, TorchLoadError
from torchload.formats.pickles.opcodes import PickleStream, check_stream
from torchload.formats.pickles.standins import (
    BlobReference,
    Call,
    MappingStandIn,
    Outside,
    RecordStandIn,
    SetStandIn,
    StandInType,
    Storage,
    new_stand_in,
)
from torchload.formats.pickles.tensors import KNOWN_CALLS, KNOWN_MAPPINGS, KNOWN_VALUES, STORAGE_DTYPES
from torchload.formats.pickles.walk import Walk

if TYPE_CHECKING:
    from mmap import mmap

    import torch

    from torchload.core.checkpoint import Extent
    from torchload.core.source import Source

__all__ = ["Storage", "Unpickled", "read_pickle", "unpickle"]

MAX_GLOBALS = 4096  # different ones in a stream; each costs a class
MAX_GLOBAL_LENGTH = 1000  # characters of module and name
MAX_VARIANTS = 16  # ways to declare the same storage

# What the C unpickler raises at a stream that does not hold together. Errors of ours pass.
_MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
)


def read_pickle(
    data: bytes | bytearray | mmap,
    extent_of: Callable[[Storage], Extent] | None = None,
    *,
    name: str,
    source: Source | None = None,
    budget: Budget | None = None,
) -> Any:
    """Read one pickle whose storages' places are known from the beginning.

    Arguments and errors are those of `unpickle` and of its result's `finish`.

    Example:
        >>> import argparse, pickle
        >>> from torchload.formats.pickles.unpickle import read_pickle
        >>> tree = read_pickle(pickle.dumps({"args": argparse.Namespace(lr=0.1), "epoch": 3}), name="example")
        >>> tree["epoch"], tree["args"], tree["args"].state["lr"]
        (3, <argparse.Namespace>, 0.1)
    """
    return unpickle(data, name=name, source=source, budget=budget).finish(extent_of)


def unpickle(
    data: bytes | bytearray | mmap,
    start: int = 0,
    *,
    name: str,
    source: Source | None = None,
    budget: Budget | None = None,
    outside: Callable[[str], Any] | None = None,
) -> Unpickled:
    """Check and read one pickle, without asking where its storages are yet.

    Args:
        data: Bytes that hold the pickle, whatever follows it.
        start: Position of its first opcode.
        name: What to call the stream in messages.
        source: The same bytes as `data`, if they are in a file: long payloads then stay there.
        budget: What the objects may cost, where `source` doesn't say.
        outside: What a persistent id that is text refers to, in a format that has such; a finished leaf of the tree.

    Returns:
        What was recorded; call its `finish` once.

    Raises:
        CorruptCheckpointError: The stream is damaged or hostile.
    """
    if budget is None and source is not None:
        budget = source.budget
    elif budget is None:
        budget = Budget()
        budget.add_file(len(data))
    recorded = Unpickled(data, name, source, budget)
    recorded.record(start, outside)
    return recorded


class Unpickled:
    """A pickle as it was recorded.

    Attributes:
        storages: Every storage that the stream refers to: key → its (first) declaration.
        end: Position just past the stream in the data.
        root: The recorded object, in stand-ins; `finish` turns it into the tree.
    """

    def __init__(self, data: bytes | bytearray | mmap, name: str, source: Source | None, budget: Budget) -> None:
        self.data = data
        self.name = name
        self.source = source
        self.budget = budget

    def record(self, start: int, outside: Callable[[str], Any] | None) -> None:
        """Check the opcodes from `start` on, and run them; arguments and errors as `unpickle`."""
        stream = check_stream(self.data, start, name=self.name, budget=self.budget)
        reader = _Reader(stream, self.name, outside)
        self.blobs, self.end, self.storages = stream.blobs, stream.end, reader.storages
        try:
            self.root = reader.load()
        except _MALFORMED as error:
            problem = f"the pickle is damaged or made to do harm: {str(error) or type(error).__name__}"
            raise CorruptCheckpointError(f"{self.name}: {problem}", path=self.name) from error

    def finish(self, extent_of: Callable[[Storage], Extent] | None = None) -> Any:
        """The tree; the recording is used up. `extent_of` says where a storage is; without it there may be none.

        Raises:
            CorruptCheckpointError: A tensor does not lie inside its storage, or the objects are nested too deeply.
        """
        root, self.root = self.root, None
        walk = Walk(self, extent_of)
        try:
            return walk.run(root)
        except _MALFORMED as error:
            if isinstance(error, TorchLoadError):
                raise
            walk.fail(f"is not what a checkpoint holds ({error})", error)


class _File:
    """A whole stream to an unpickler; `peek` hands it over at once and without a copy."""

    __slots__ = ("position", "view")

    def __init__(self, code: bytes | memoryview) -> None:
        self.view = memoryview(code)
        self.position = 0

    def peek(self, size: int) -> memoryview:
        return self.view[self.position :]

    def read(self, size: int = -1) -> bytes:
        end = len(self.view) if size < 0 else self.position + size
        piece = bytes(self.view[self.position : end])
        self.position += len(piece)
        return piece

    def readline(self) -> bytes:
        for end in range(self.position, len(self.view)):
            if self.view[end] == 0x0A:
                return self.read(end + 1 - self.position)
        return self.read()


class _Reader(pickle.Unpickler):
    """The C unpickler, with its three ways out of the stream closed."""

    def __init__(self, stream: PickleStream, name: str, outside: Callable[[str], Any] | None) -> None:
        # Text of Python 2 is bytes or ASCII; this way it can be turned back into the bytes that it was.
        super().__init__(_File(stream.code), encoding="utf-8", errors="surrogateescape")
        self.name = name
        self.blobs = stream.blobs
        self.classes: dict[str, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.variants: dict[str, list[Storage]] = {}  # of those that are declared in several ways
        self.outside = outside

    def find_class(self, module: str, name: str) -> Any:
        if len(module) + len(name) > MAX_GLOBAL_LENGTH:
            raise TypeError(f"it names a class or function with {len(module) + len(name):,} characters")
        qualified = f"{module}.{name}"
        found = self.classes.get(qualified)
        if found is None:
            found = self.classes[qualified] = _known_global(qualified) or self.new_class(qualified)
        return found

    def new_class(self, qualified: str) -> StandInType:
        if len(self.classes) >= MAX_GLOBALS:
            raise TypeError(f"it names more than {MAX_GLOBALS:,} classes and functions")
        if qualified in _SPECIAL:
            return _SPECIAL[qualified](self)
        return new_stand_in(RecordStandIn, qualified)

    def attribute(self, owner: Any, name: Any) -> Any:
        """What `getattr` gives: a class of its own where the owner is one, so that NEWOBJ accepts it."""
        if isinstance(owner, StandInType) and type(name) is str:
            return self.find_class(owner.qualified, name)
        return RecordStandIn(owner, name)

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is tuple:
            if len(pid) >= 5:
                return self.storage(*pid[:6])
            if len(pid) == 2:
                return _collection(*pid)
            if len(pid) == 4 and pid[0] == "module":  # legacy files keep the source text beside a class
                return pid[1]
            if len(pid) == 3 and self.outside is not None:  # as do tar archives, older still
                return pid[0]
        elif pid is None:
            return MappingStandIn()
        elif pid is False:
            return SetStandIn()
        elif type(pid) is int and 0 <= pid < len(self.blobs):
            return BlobReference(pid)
        elif type(pid) is str and self.outside is not None:
            return Outside(self.outside(pid))
        raise TypeError("it refers to data outside it that is not a tensor's")

    def storage(self, marker: Any, kind: Any, key: Any, location: Any, numel: Any, view: Any = None) -> Storage:
        """What such a tuple declares; the same object each time."""
        if type(key) is int and abs(key) < 1 << 64:
            key = str(key)
        is_sound = marker == "storage" and type(key) is str and type(numel) is int and 0 <= numel < 1 << 63
        if not is_sound or type(kind) is not StandInType or kind not in _STORAGE_KINDS:
            raise TypeError("a storage is not described as torch describes one")
        if view is not None:
            view = _view(view, key, numel)
        first = self.storages.get(key)
        if first is None:
            first = self.storages[key] = Storage(kind, _STORAGE_KINDS[kind], key, numel, view)
        if first.kind is kind and first.numel == numel and first.view == view:
            return first
        declared = Storage(kind, _STORAGE_KINDS[kind], key, numel, view)
        if (first.dtype, first.numel) != (declared.dtype, numel):
            raise TypeError(f"storage {key[:80]!r} is declared with two types or lengths")
        variants = self.variants.setdefault(key, [first])
        for variant in variants:
            if variant.view == view:
                return variant
        if len(variants) > MAX_VARIANTS:
            raise TypeError(f"storage {key[:80]!r} is declared in more than {MAX_VARIANTS} ways")
        variants.append(declared)
        return declared


def _view(view: Any, key: str, numel: int) -> tuple[int, int]:
    """What part of a storage a legacy file means by ``(key, offset, length)``."""
    if type(view) is not tuple or len(view) != 3 or not all(type(number) is int for number in view[1:]):
        raise TypeError(f"a view of storage {key[:80]!r} is not described as torch describes one")
    if min(view[1:]) < 0 or view[1] + view[2] > numel:
        raise TypeError(f"a view of storage {key[:80]!r} lies outside it")
    return view[1], view[2]


def _collection(items: Any, is_mapping: Any) -> Any:
    """What the rewritten DICT and FROZENSET ask for."""
    if type(items) is not tuple:
        raise TypeError("it refers to data outside it that is not a tensor's")
    if is_mapping is True:
        mapping = MappingStandIn()
        if len(items) % 2:
            raise TypeError("a dict has a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            mapping[key] = value
        return mapping
    elements = SetStandIn(items)
    elements.frozen = True
    return elements


_KNOWN: dict[str, Any] = {}  # one stand-in per known global, made when first met: a closed set
_STORAGE_KINDS: dict[StandInType, torch.dtype | None] = {}  # those of storages → element type


def _known_global(qualified: str) -> Any:
    """What the name stands for in any file, or ``None``."""
    found = _KNOWN.get(qualified)
    if found is None:
        if qualified in KNOWN_VALUES:
            found = KNOWN_VALUES[qualified]
        elif qualified in KNOWN_MAPPINGS:
            found = MappingStandIn
        elif qualified in KNOWN_CALLS:
            found = new_stand_in(Call, qualified, convert=KNOWN_CALLS[qualified])
        elif qualified in STORAGE_DTYPES:
            found = new_stand_in(RecordStandIn, qualified)
            _STORAGE_KINDS[found] = STORAGE_DTYPES[qualified]
        else:
            return None
        _KNOWN[qualified] = found
    return found


def _getattr(reader: _Reader) -> StandInType:
    def attribute(cls: type, owner: Any = None, name: Any = "", *args: Any) -> Any:
        return reader.attribute(owner, name)

    return new_stand_in(RecordStandIn, "builtins.getattr", __new__=attribute)


def _maker(name: str) -> Callable[[_Reader], StandInType]:
    """How protocols 0 and 1 make an object: ``_reconstructor(class, base, state)``, ``__newobj__(class, *args)``."""

    def instance(cls: type, owner: Any = None, *args: Any) -> Any:
        if name == "_reconstructor":
            args = args[1:] if args[1:] != (None,) else ()
        return owner(*args) if isinstance(owner, StandInType) else RecordStandIn(owner, *args)

    return lambda reader: new_stand_in(RecordStandIn, f"copyreg.{name}", __new__=instance)


_SPECIAL: dict[str, Callable[[_Reader], StandInType]] = {
    **dict.fromkeys(("builtins.getattr", "__builtin__.getattr"), _getattr),
    **dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), _maker("_reconstructor")),
    **dict.fromkeys(("copyreg.__newobj__", "copy_reg.__newobj__"), _maker("__newobj__")),
}
