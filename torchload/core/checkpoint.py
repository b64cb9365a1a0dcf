"""What a checkpoint holds, without its data: the vocabulary that flows between the stages.

A checkpoint is a tree of plain containers (`Container`, `list`, `tuple`) whose leaves are `TensorEntry`, plain Python
values, or inert `Record`s of objects that were never built. A tensor lies on disk as one or more `Box`es, each an
axis-aligned region of it, inside an `Extent`, a run of bytes of one `Source`.

What is made for every tensor (`TensorEntry`, `Box`, `Extent`, and later `Assignment` and `Copy`) is never changed once
made, but not frozen either: freezing doubles the cost of making it, which shows where a file has 200,000 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from torchload.core.public import public

if TYPE_CHECKING:
    from torchload.core.source import Source
    from torchload.core.word_sums import WordSums

__all__ = [
    "Box",
    "Checkpoint",
    "Container",
    "Copies",
    "Extent",
    "OpaqueTensor",
    "Quantized",
    "Record",
    "Region",
    "Shape",
    "TensorEntry",
    "box_end_bytes",
    "contiguous_strides",
    "entries_in",
    "is_tensor",
    "record_fields",
]

Shape = tuple[int, ...]


class Region(NamedTuple):
    """An axis-aligned part of a tensor: where it begins and how large it is, in elements."""

    origin: Shape
    shape: Shape


@dataclass(slots=True, eq=False, repr=False)
class Extent:
    """A run of bytes in a source: one storage as some writer laid it down.

    Attributes:
        source: Where the bytes are.
        offset: Position of the first byte in the source, in bytes.
        nbytes: Length in bytes; formats guarantee that ``0 <= offset`` and ``offset + nbytes <= source.size``.
        crc32: The checksum that the file records for exactly these bytes, or ``None`` where it records none.
        big_endian: Whether multi-byte elements are stored most significant byte first.
        word_sums: Those of its words when it was last read and matched its checksum: quicker to compute again.
    """

    source: Source
    offset: int
    nbytes: int
    crc32: int | None = None
    big_endian: bool = False
    word_sums: WordSums | None = None


@dataclass(slots=True, eq=False, repr=False)
class Box:
    """One axis-aligned region of a tensor, as it lies inside one extent.

    Attributes:
        extent: The bytes that hold the region; formats guarantee that every element lies inside it.
        start: Byte offset of the region's first element from the extent's beginning.
        shape: Size of the region along each dimension, in elements.
        strides: Distance between neighbours along each dimension, in elements; may be 0 (expanded).
        origin: Position of the region's first element in the whole tensor; all zeros for an ordinary tensor.
    """

    extent: Extent
    start: int
    shape: Shape
    strides: Shape
    origin: Shape

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other in row-major order (size-1 dimensions don't count)."""
        return self.strides == contiguous_strides(self.shape) or _dense(self.shape, self.strides)

    @property
    def location(self) -> tuple[int, int, Shape, Shape]:
        """Identity of the data: boxes of equal location hold the same bytes."""
        return id(self.extent.source), self.extent.offset + self.start, self.shape, self.strides

    def narrow(self, dimension: int, first: int, count: int, itemsize: int) -> Box:
        """What it has of positions `first` … along a dimension, `count` of them, in elements of `itemsize` bytes."""
        shape = (*self.shape[:dimension], count, *self.shape[dimension + 1 :])
        origin = (*self.origin[:dimension], self.origin[dimension] + first, *self.origin[dimension + 1 :])
        return Box(self.extent, self.start + first * self.strides[dimension] * itemsize, shape, self.strides, origin)


@dataclass(slots=True, eq=False)
class TensorEntry:
    """A tensor in a checkpoint: what it is and where its data lies.

    Attributes:
        dtype: Element type on disk.
        shape: Size along each dimension, in elements.
        boxes: Where the data is. Together the boxes cover the tensor exactly once. A zero-element tensor may have none.
        is_parameter: Whether the file says that it was an `nn.Parameter`.
    """

    dtype: torch.dtype
    shape: Shape
    boxes: tuple[Box, ...]
    is_parameter: bool = False

    @classmethod
    def over(
        cls, extent: Extent, dtype: torch.dtype, shape: Shape, strides: Shape | None = None, start: int = 0
    ) -> TensorEntry:
        """A tensor in one extent that was found to hold it all, from byte `start` on; row-major without `strides`."""
        if 0 in shape:
            return cls(dtype, shape, ())
        strides = contiguous_strides(shape) if strides is None else strides
        return cls(dtype, shape, (Box(extent, start, shape, strides, (0,) * len(shape)),))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data once it is dense, in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def is_expanded(self) -> bool:
        """Whether it has more elements than the file has room for, since some of them are the same."""
        return self.nbytes > sum({id(box.extent): box.extent.nbytes for box in self.boxes}.values())

    @property
    def location(self) -> tuple[tuple[int, int, Shape, Shape], ...]:
        """Identity of the data: two entries with equal dtype and location are the same bytes (tied tensors)."""
        return tuple(box.location for box in self.boxes)


class Copies:
    """Tensors that are each given memory of their own, although they may be views of one storage.

    What they take beyond the storages that they show is accounted for: a small file can describe many large views.

    Example:
        >>> from torchload.core.source import MemorySource
        >>> extent = Extent(MemorySource(bytes(4)), 0, 4)
        >>> entry = TensorEntry(torch.float32, (1 << 30,), (Box(extent, 0, (1 << 30,), (0,), (0,)),))
        >>> Copies().add(entry)
        Traceback (most recent call last):
        torchload.errors.CorruptCheckpointError: <memory> would take more memory than ...
    """

    __slots__ = ("_spare_bytes", "_storages")

    def __init__(self) -> None:
        self._storages: set[tuple[int, int]] = set()
        self._spare_bytes = 0

    def add(self, entry: TensorEntry) -> None:
        """Account for one more.

        Raises:
            CorruptCheckpointError: They are more than the size of the file accounts for.
        """
        if len(entry.boxes) != 1 or type(entry.boxes[0]) is not Box:
            return  # parts that tile a tensor are as large as it is
        extent = entry.boxes[0].extent
        if (storage := (id(extent.source), extent.offset)) not in self._storages:
            self._storages.add(storage)
            self._spare_bytes += extent.nbytes
        self._spare_bytes -= entry.nbytes
        if self._spare_bytes < 0:
            extent.source.budget.spend(-self._spare_bytes, extent.source.name)
            self._spare_bytes = 0


@dataclass(slots=True, eq=False, repr=False)
class Quantized:
    """A quantized tensor: integers, and what number each of them stands for.

    Attributes:
        dtype: The quantized element type, such as `torch.qint8`.
        data: The integers, in the plain dtype of their size; of an element type of less than a byte, the bytes that
            they are packed into, as one row.
        scale: What an integer is multiplied with, after `zero_point` was taken from it; one number for the whole
            tensor, or one for each position along `axis`.
        zero_point: The integer that stands for zero, likewise.
        axis: The dimension with a scale and a zero point for each position, or ``None``.
    """

    dtype: torch.dtype
    data: TensorEntry
    scale: float | TensorEntry
    zero_point: int | TensorEntry
    axis: int | None = None


@dataclass(slots=True, eq=False)
class OpaqueTensor:
    """A tensor that the file holds in a form torchload can't read into a dense tensor.

    Attributes:
        reason: Why, as a noun phrase for messages: ``"a sparse COO tensor"``, ``"a quantized tensor"``.
        shape: Its shape where known.
        parts: Of a tensor that is spread over the files of several processes, what this file holds of it: (position of
            the part's first element, part).
        quantized: What a quantized tensor is made of; modules that load themselves take one.
    """

    reason: str
    shape: Shape | None = None
    parts: tuple[tuple[Shape, TensorEntry], ...] = ()
    quantized: Quantized | None = None

    @property
    def is_uninitialized(self) -> bool:
        """Whether it is a lazy module's tensor before its first forward pass, which has neither shape nor values."""
        return self.reason in _UNINITIALIZED


_UNINITIALIZED = frozenset({"an uninitialized parameter", "an uninitialized buffer"})


@public
@dataclass(slots=True, eq=False, repr=False)
class Record:
    """An object that a pickle describes, as inert data. Nothing was imported, called or built.

    Attributes:
        name: Qualified name of the global that the file names, such as ``"argparse.Namespace"``.
        args: What its constructor would have been called with.
        state: What ``__setstate__`` or ``__dict__.update`` would have received (``None`` if nothing).
        items: List items the object would have been extended with.
        entries: Key → value pairs it would have been updated with.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Container(dict[Any, Any]):
    """A mapping read from a checkpoint.

    Attributes:
        metadata: The ``_metadata`` of a state dict, where it carries one: module name → such things as its ``version``,
            which drive torch's own upgrade hooks.
        origin: Qualified class name where the mapping is the state dict of a whole pickled module, else ``None``.
    """

    __slots__ = ("metadata", "origin")

    def __init__(
        self,
        entries: Mapping[Any, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        origin: str | None = None,
    ) -> None:
        super().__init__(entries or {})
        self.metadata = metadata
        self.origin = origin


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Checkpoint:
    """An opened checkpoint: everything but the tensor data.

    Attributes:
        path: The checkpoint as the caller named it.
        format: What it is, for people: ``"zip checkpoint"``, ``"safetensors"``, ``"4 safetensors shards"``.
        root: The tree.
        sources: Every file that holds data; `close` closes them.
        checksums: Whether the format records checksums of tensor data (an extent may still lack one).
        notes: Sentences about the file that its reader should see in the report.
        metadata: Text that the writer attached to the file (safetensors' ``__metadata__``), name → value.
        end: Position just past it in its file, where something else may follow; ``None`` where it takes all.
        confirm: Compares what open took for equal without reading it; raises `CheckpointFormatError` where it differs.
            To be called by whoever goes on to the tensors' data.
        whole: Says what to give instead of a file that is one part of several; ``None`` where nothing tells of others.
    """

    path: str
    format: str
    root: Any
    sources: tuple[Source, ...]
    checksums: bool = False
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    end: int | None = None
    confirm: Callable[[], object] = tuple
    whole: Callable[[], str | None] = lambda: None

    @property
    def size_bytes(self) -> int:
        """Length of all its files together, in bytes."""
        return sum(source.size for source in self.sources)

    def close(self) -> None:
        """Release every file. Tensors that were mapped from them stay valid."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def is_tensor(value: object) -> bool:
    """Whether a leaf of a checkpoint's tree is a tensor, of whatever kind."""
    return isinstance(value, (TensorEntry, OpaqueTensor))


def entries_in(value: Any) -> Iterator[TensorEntry]:
    """Every tensor that a value of the tree is made of: several, if it is quantized or a packed pair."""
    if isinstance(value, TensorEntry):
        yield value
    elif isinstance(value, OpaqueTensor) and value.quantized is not None:
        made_of = value.quantized
        yield from (part for part in (made_of.data, made_of.scale, made_of.zero_point) if isinstance(part, TensorEntry))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from entries_in(inner)


def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides of a shape, in elements, as torch computes them.

    Example:
        >>> contiguous_strides((2, 3, 4))
        (12, 4, 1)
    """
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def box_end_bytes(start: int, shape: Shape, strides: Shape, itemsize: int) -> int:
    """Byte just past the last element of a strided region (no stride is negative) that starts at byte `start`.

    Example:
        >>> box_end_bytes(0, (2, 3), (3, 1), 4)
        24
    """
    if 0 in shape:
        return start
    return start + (sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1) * itemsize


def record_fields(record: Record) -> dict[str, Any]:
    """The attributes that a recorded object would have, as far as its pickle tells; none where its state is another.

    Example:
        >>> record_fields(Record("argparse.Namespace", state={"lr": 0.1}))
        {'lr': 0.1}
    """
    state = record.state
    if state is None and record.args and record.name in _REBUILT_FROM_ATTRIBUTES:
        state = record.args[0]
    if isinstance(state, dict):
        return state
    if isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, (dict, type(None))) for part in state):
        return {**(state[0] or {}), **(state[1] or {})}
    return {}


_REBUILT_FROM_ATTRIBUTES = frozenset(
    (
        "torch.fx.graph_module.reduce_graph_module",
        "torch.fx.graph_module.reduce_deploy_graph_module",
        "torch.fx.graph_module.reduce_package_graph_module",
    )
)


def _dense(shape: Shape, strides: Shape) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True
