"""What an unpickler builds here instead of what a file asks for.

Every global that a pickle names becomes a *class* of this module's metaclass, because NEWOBJ accepts nothing else.
Calling it records the arguments; no instance has any other behaviour. What stands on the unpickler's stack is a
hostile stream's to use, so each of these types decides for itself what BUILD, APPENDS, SETITEMS and ADDITEMS do to it,
and the classes can't be changed at all.

Objects that stay in the tree (`RecordStandIn`, `MappingStandIn`) have the memory layout of the public class that they
become by a change of ``__class__``, so that cycles and shared references survive without copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from torchload.core.checkpoint import Container, Extent, Record

if TYPE_CHECKING:
    from torchload.formats.pickles.walk import Walk

__all__ = [
    "AS_RECORD",
    "UNRESOLVED",
    "BlobReference",
    "Call",
    "Deferred",
    "Inert",
    "MappingStandIn",
    "Outside",
    "RecordStandIn",
    "SetStandIn",
    "StandInType",
    "Storage",
    "check_keys",
    "fill",
    "new_stand_in",
]

MAX_KEY_PARTS = 32  # of a tuple that is a dictionary key
MAX_KEY_BITS = 4096  # of an integer that is one
MAX_KEY_CHARACTERS = 4096  # of text inside one that isn't text itself
MAX_COLLIDING = 128
_LARGE = 1 << 60  # an integer up to this size is its own hash
UNRESOLVED: Any = type("Unresolved", (), {"__slots__": ()})()
AS_RECORD: Any = type("AsRecord", (), {"__slots__": ()})()  # what a converter returns for a call it can't interpret

# Shared by all records that never get an item, as most don't; nothing ever appends to these two.
_NO_ITEMS: list[Any] = []
_NO_ENTRIES: dict[Any, Any] = {}


class StandInType(type):
    """Class of the stand-ins: it can't be changed, whatever a stream does to it."""

    qualified: str

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"it sets the attribute {name!r} of a class")

    def __delattr__(cls, name: str) -> None:
        raise TypeError(f"it deletes the attribute {name!r} of a class")


class Inert(metaclass=StandInType):
    """What refuses to be built upon. Without this, BUILD would set attributes."""

    __slots__ = ()
    qualified = ""

    def __setstate__(self, state: object) -> None:
        raise TypeError(f"it sets attributes of a {type(self).__name__}, which has none")


class RecordStandIn(Record, metaclass=StandInType):
    """An instance of some class, as it grows; becomes a `Record`."""

    __slots__ = ()
    qualified: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = object.__new__(cls)
        self.name = cls.qualified
        self.args = args
        self.state = None
        self.items = _NO_ITEMS
        self.entries = _NO_ENTRIES
        for key, value in kwargs.items():
            self[key] = value
        return self

    __init__ = object.__init__

    def __call__(self, *args: Any) -> Any:
        called = RecordStandIn(self, *args)
        called.name = self.name
        return called

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        if self.items is _NO_ITEMS:
            self.items = []
        self.items.append(item)

    add = append

    def extend(self, items: list[Any]) -> None:
        if self.items is _NO_ITEMS:
            self.items = []
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.entries is _NO_ENTRIES:
            self.entries = MappingStandIn()
        self.entries[key] = value


class MappingStandIn(Container, metaclass=StandInType):
    """A dict, OrderedDict, defaultdict or Counter, as it grows; becomes a `Container`.

    Until it does, `origin` holds the constructor's arguments, if there were any, or what is `Deferred`.
    """

    __slots__ = ()
    qualified: ClassVar[str] = "builtins.dict"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = dict.__new__(cls)
        self.metadata = None
        self.origin = args or None  # type: ignore[assignment]
        return self

    __init__ = object.__init__

    def __setitem__(self, key: Any, value: Any) -> None:
        kind = type(key)
        if kind is str:
            dict.__setitem__(self, key, value)
        elif kind is tuple or (kind is int and not -_LARGE <= key <= _LARGE):
            made_of: Any = self.origin
            if type(made_of) is not Deferred:
                self.origin = made_of = Deferred(made_of)  # type: ignore[assignment]
            made_of.entries.append((key, value))
        else:
            if kind is bytes:
                check_key(key)
            dict.__setitem__(self, key, value)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:
            state = state[0]
        if isinstance(state, MappingStandIn):
            metadata = state.get("_metadata")
            if isinstance(metadata, MappingStandIn):
                self.metadata = metadata


class SetStandIn(list[Any], metaclass=StandInType):
    """The elements of a set, in no need to be hashed yet.

    Attributes:
        value: The set, once it was made.
        frozen: Whether it is a frozenset.
    """

    __slots__ = ("frozen", "value")
    qualified: ClassVar[str] = "builtins.set"

    def __init__(self, elements: Any = ()) -> None:
        super().__init__(elements)
        self.value = UNRESOLVED
        self.frozen = False

    __hash__ = object.__hash__  # type: ignore[assignment]
    add = list.append

    def __setstate__(self, state: object) -> None:
        raise TypeError("it sets attributes of a set, which has none")


class Call(metaclass=StandInType):
    """A call of a known function, to be looked at when the whole stream has been read.

    Attributes:
        args: The arguments.
        state: What BUILD gave to the result, or ``None``.
        value: What the call amounts to, once `convert` was asked.
    """

    __slots__ = ("args", "state", "value")
    args: tuple[Any, ...]
    state: Any
    value: Any
    qualified: ClassVar[str] = ""
    convert: ClassVar[Callable[[Any, Walk], Any]]

    def __new__(cls, *args: Any) -> Any:
        self = object.__new__(cls)
        self.args = args
        self.state = None
        self.value = UNRESOLVED
        return self

    __init__ = object.__init__

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Storage(Inert):
    """A storage that a stream refers to by a persistent id.

    Attributes:
        kind: Stand-in of the storage's class in the file.
        dtype: Element type, or ``None`` for an untyped storage, which counts bytes.
        key: Name of its data in the file.
        numel: Declared length in elements.
        nbytes: Declared length in bytes.
        view: Legacy files: (offset, length) in elements where this is a part of the storage.
        extent: Its bytes, once known.
    """

    __slots__ = ("dtype", "extent", "key", "kind", "nbytes", "numel", "view")

    def __init__(
        self, kind: type, dtype: torch.dtype | None, key: str, numel: int, view: tuple[int, int] | None = None
    ) -> None:
        self.kind = kind
        self.dtype = dtype
        self.key = key
        self.numel = numel
        self.nbytes = numel if dtype is None else numel * dtype.itemsize
        self.view = view
        self.extent: Extent | None = None


class BlobReference(Inert):
    """A payload that was left in the file: the index of a `Blob`."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Outside(Inert):
    """What a format supplies for a persistent id of its own. In the open, BUILD could change it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def new_stand_in(base: type, qualified: str, **attributes: Any) -> StandInType:
    """A class that stands for one global."""
    return StandInType("StandIn", (base,), {"__slots__": (), "qualified": qualified, **attributes})


class Deferred:
    """Entries of a mapping whose keys are looked at all together before any of them is hashed twice.

    Attributes:
        args: The constructor's arguments, or ``None``.
        entries: Keys and values.
    """

    __slots__ = ("args", "entries")

    def __init__(self, args: tuple[Any, ...] | None) -> None:
        self.args = args
        self.entries: list[tuple[Any, Any]] = []

    def fill(self, mapping: dict[Any, Any]) -> None:
        """Put them where they belong; raises as `check_keys`."""
        fill(mapping, self.entries)


def fill(mapping: dict[Any, Any], entries: list[tuple[Any, Any]]) -> None:
    """Add entries to a mapping; raises as `check_keys`."""
    check_keys(key for key, _ in entries)
    mapping.update(entries)


def check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys that would be expensive to hash, to compare, or to print, each by itself or all together.

    Raises:
        TypeError: One is a tuple or a set with too many parts, a huge integer, long text inside something else; or many
            were made to collide.
    """
    # Text has hashes that nobody can foresee; numbers can be chosen to collide with each other, and then each access
    # takes time in proportion to their number.
    foreseeable = [key for key in keys if type(key) is not str and check_key(key)]
    if len(foreseeable) > MAX_COLLIDING:
        [(_, most)] = Counter(map(hash, foreseeable)).most_common(1)
        if most > MAX_COLLIDING:
            raise TypeError(f"more than {MAX_COLLIDING} of a dictionary's keys have the same hash")


def check_key(key: Any) -> bool:
    """Refuse one key, as `check_keys`; whether a file can choose its hash."""
    if type(key) is str or type(key) is float or key is None:
        return False
    parts, characters, numbers = [key], 0, 0
    for part in parts:  # grows while it runs, to the limit
        kind = type(part)
        if kind is tuple:
            parts.extend(part[: MAX_KEY_PARTS + 1])
        elif kind is frozenset:
            parts.extend(islice(part, MAX_KEY_PARTS + 1))
        elif kind is int:
            numbers += part is not key or not -_LARGE <= part <= _LARGE
            if part.bit_length() > MAX_KEY_BITS:
                raise TypeError(f"a dictionary key is an integer of more than {MAX_KEY_BITS} bits")
        elif kind is float or kind is complex:
            numbers += 1
        elif kind is str or kind is bytes:
            characters += len(part)
        if len(parts) > MAX_KEY_PARTS:
            raise TypeError(f"a dictionary key is a collection of more than {MAX_KEY_PARTS} parts")
    if characters > MAX_KEY_CHARACTERS:
        raise TypeError(f"a dictionary key holds more than {MAX_KEY_CHARACTERS} characters")
    return numbers > 0
