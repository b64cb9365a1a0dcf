"""`inspect_checkpoint`: what is in a file, without reading tensor data and without running anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import Any

import torch

from torchload.core.budget import Allowance
from torchload.core.checkpoint import Checkpoint, OpaqueTensor, Record, Shape, TensorEntry, entries_in, is_tensor
from torchload.core.collector import with_collector_paused
from torchload.core.public import CheckpointLike, public
from torchload.core.text import format_bytes, plural, printable, short_dtype
from torchload.core.wrappers import WRAPPERS
from torchload.errors import Boundary
from torchload.formats import open_checkpoint
from torchload.match import Place, as_mapping, find_places

__all__ = ["CheckpointInfo", "ContainerInfo", "TensorInfo", "inspect_checkpoint"]

_SHOWN_CONTAINERS = 100
_SHOWN_TENSORS = 12
_SHOWN_VALUES = 12
_SHOWN_ROWS = 2_000
_LISTED_ELEMENTS = 1_000
_DEEPEST = 3


@public
@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a checkpoint.

    Attributes:
        name: Its name inside its container.
        container: Path of the container, ``""`` for the top level.
        dtype: Element type on disk; ``None`` for a tensor that is of a kind of its own.
        shape: Size along each dimension, in elements; ``None`` where the file does not tell.
        nbytes: Size of the data once it is dense, in bytes.
        kind: What it is if it is no dense tensor, such as ``"a sparse COO tensor"``; else empty.
    """

    name: str
    container: str
    dtype: torch.dtype | None
    shape: Shape | None
    nbytes: int = 0
    kind: str = ""


@public
@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """A container of tensors in a checkpoint.

    Attributes:
        path: Where it is, as `smart_load` takes it for ``key=``; ``""`` for the top level.
        tensors: Number of names of tensors in it.
        nbytes: Bytes of data; tensors that share it count once.
        wrappers: Segments such as ``"module"`` that wrappers put into its names, as far as names can tell.
        origin: Class name, where the container is a whole pickled module.
    """

    path: str
    tensors: int
    nbytes: int
    wrappers: tuple[str, ...] = ()
    origin: str | None = None


@public
@dataclass(frozen=True, slots=True, repr=False)
class CheckpointInfo:
    """What a checkpoint holds. `str()` gives the essentials; notebooks show a table. It holds no tensor data.

    Attributes:
        path: The checkpoint as the caller named it.
        format: What it is, such as ``"zip checkpoint"``.
        containers: Its containers of tensors.
        tensors: All tensors, container by container.
        values: Dotted path → value of everything else, such as ``"epoch"`` or ``"args"``. Objects are inert
            `Record`s with a ``name`` and a ``state``.
        dtypes: Dtype name → (number of distinct tensors, their bytes).
        nbytes: Bytes of data in all; tensors that share it count once.
        wrappers: Segments such as ``"module"`` that wrappers put into names, as far as names can tell.
        checksums: Whether the file records checksums of its data, which ``verify=True`` would check.
        metadata: Text that the writer attached (safetensors), name → value.
        notes: Sentences worth reading.
    """

    path: str
    format: str
    containers: tuple[ContainerInfo, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()
    values: Mapping[str, object] = field(default_factory=dict)
    dtypes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    nbytes: int = 0
    wrappers: tuple[str, ...] = ()
    checksums: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        # Not field by field: a small file may refer to one value so often that its expansion would never end.
        return f"<CheckpointInfo {printable(self.path)}: {plural(len(self.tensors), 'tensor')}>"

    def __str__(self) -> str:
        lines = [self._headline()]
        width = max((len(_title(container)) for container in self.containers[:_SHOWN_CONTAINERS]), default=0)
        tensors = {path: list(group) for path, group in groupby(self.tensors, lambda tensor: tensor.container)}
        for container in self.containers[:_SHOWN_CONTAINERS]:
            count = f"{plural(container.tensors, 'tensor')}, {format_bytes(container.nbytes)}"
            lines.append(f"  {_title(container):<{width}}  {count}{_extras(container)}")
            shown = tensors.get(container.path, [])[: _SHOWN_TENSORS if len(self.containers) == 1 else 3]
            lines += [f"    {printable(tensor.name)}  {_describe(tensor)}" for tensor in shown]
            if container.tensors > len(shown):
                lines.append(f"    … and {container.tensors - len(shown):,} more")
        if (more := len(self.containers) - _SHOWN_CONTAINERS) > 0:
            lines.append(f"  … and {more:,} more containers")
        lines += [f"  {label:<9} {text}" for label, text in self._facts()]
        return "\n".join(printable(line, None) for line in lines)

    def _repr_html_(self) -> str:
        """A table for notebooks. Everything that comes from the file is escaped."""
        containers = "".join(
            f"<tr><td>{escape(_title(container))}</td><td>{container.tensors:,}</td>"
            f"<td>{escape(format_bytes(container.nbytes))}{escape(_extras(container))}</td></tr>"
            for container in self.containers[:_SHOWN_ROWS]
        )
        tensors = "".join(
            f"<tr><td>{escape(printable(tensor.container))}</td><td>{escape(printable(tensor.name))}</td>"
            f"<td>{escape(_describe(tensor))}</td><td>{escape(format_bytes(tensor.nbytes))}</td></tr>"
            for tensor in self.tensors[:_SHOWN_ROWS]
        )
        more = len(self.tensors) - _SHOWN_ROWS
        rest = f"<p>… and {more:,} more</p>" if more > 0 else ""
        facts = "".join(f"<tr><td>{escape(label)}</td><td>{escape(text)}</td></tr>" for label, text in self._facts())
        return (
            f"<p><b>{escape(self._headline())}</b></p>"
            f"<table><tr><th>container</th><th>tensors</th><th>size</th></tr>{containers}</table>"
            f"<table>{facts}</table>"
            f"<details><summary>{plural(len(self.tensors), 'tensor')}</summary>"
            f"<table><tr><th>container</th><th>name</th><th>tensor</th><th>size</th></tr>{tensors}</table>{rest}"
            "</details>"
        )

    def _headline(self) -> str:
        dtypes = ", ".join(f"{name} {format_bytes(nbytes)}" for name, (_, nbytes) in self.dtypes.items())
        size = f"{plural(len(self.tensors), 'tensor')}, {format_bytes(self.nbytes)}"
        return f"{printable(self.path)}: {self.format}, {size}{f' ({dtypes})' if dtypes else ''}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        for label, values in (("values", self.values), ("metadata", self.metadata)):
            shown = [f"{printable(name)} = {_brief(value)}" for name, value in list(values.items())[:_SHOWN_VALUES]]
            more = f" and {len(values) - _SHOWN_VALUES:,} more" if len(values) > _SHOWN_VALUES else ""
            if shown:
                yield label, ", ".join(shown) + more
        yield "checksums", "recorded" if self.checksums else "none"
        for note in self.notes:
            yield "note", printable(note, limit=1000)


@public
@with_collector_paused
def inspect_checkpoint(path: CheckpointLike) -> CheckpointInfo:
    """Look into a checkpoint: what containers, tensors and values it holds.

    No tensor data is read, however large the file, and nothing that it names is imported or called.

    Args:
        path: A checkpoint file, a folder that holds one, the index of a sharded one, a list of shards, a binary file
            object, or a mapping that is in memory already: a state dict, or a checkpoint's dictionary around one.

    Returns:
        What is in it; print it.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        CheckpointFormatError: The file is no checkpoint; the message says what it is.
        CorruptCheckpointError: It is truncated, damaged, or made to do harm.

    Example:
        >>> from torchload import inspect_checkpoint
        >>> info = inspect_checkpoint("model.pth")
        >>> [(container.path, container.tensors) for container in info.containers]
        [('state_dict', 9), ('optimizer.state', 18)]
        >>> info.values["epoch"], info.values["args"].state, info.wrappers
        (37, {'lr': 0.001}, ('module',))
    """
    with Boundary() as boundary, open_checkpoint(path) as checkpoint:
        boundary.path = checkpoint.path
        return _describe_checkpoint(checkpoint)


def _describe_checkpoint(checkpoint: Checkpoint) -> CheckpointInfo:
    is_container = isinstance(checkpoint.root, (Mapping, list, tuple, Record))
    root = checkpoint.root if is_container else {"": checkpoint.root}
    places = {place.path: place for place in find_places(root, None, Allowance(checkpoint.size_bytes))}
    listed, values = _outline(root, places)
    containers: list[ContainerInfo] = []
    tensors: list[TensorInfo] = []
    everything: dict[object, tuple[torch.dtype, int]] = {}
    for place, names in listed:
        distinct: dict[object, tuple[torch.dtype, int]] = {}
        for name in names:
            leaf = place.leaves[name]
            tensors.append(_tensor(name, place.path, leaf))
            for entry in entries_in(leaf):
                dtype = _dtype_of(entry, leaf)
                distinct[dtype, entry.location] = dtype, entry.nbytes
        everything.update(distinct)
        wrappers = {segment for name in names for segment in name.split(".") if segment in WRAPPERS}
        containers.append(
            ContainerInfo(
                path=place.path,
                tensors=len(names),
                nbytes=sum(nbytes for _, nbytes in distinct.values()),
                wrappers=tuple(sorted(wrappers)),
                origin=getattr(place.container, "origin", None),
            )
        )
    dtypes: dict[str, tuple[int, int]] = {}
    for dtype, size in everything.values():
        count, nbytes = dtypes.get(short_dtype(dtype), (0, 0))
        dtypes[short_dtype(dtype)] = (count + 1, nbytes + size)
    return CheckpointInfo(
        path=checkpoint.path,
        format=checkpoint.format,
        containers=tuple(containers),
        tensors=tuple(tensors),
        values=values,
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
        nbytes=sum(nbytes for _, nbytes in everything.values()),
        wrappers=tuple(sorted({wrapper for container in containers for wrapper in container.wrappers})),
        checksums=checkpoint.checksums,
        metadata=checkpoint.metadata,
        notes=checkpoint.notes,
    )


def _outline(root: Any, places: Mapping[str, Place]) -> tuple[list[tuple[Place, list[str]]], dict[str, object]]:
    """The containers that are worth a line, each with the names that are its own, and the values beside them.

    That is, from the top down: each container that holds tensors of its own, or numbered or deeply nested ones. The
    tensors that lie loose at the top belong to the top; the containers beside them have lines of their own.
    """
    listed: list[tuple[Place, list[str]]] = []
    values: dict[str, object] = {}
    todo: list[tuple[str, Any, int]] = [("", root, 0)]
    for path, value, depth in todo:
        place = places.get(path)
        container = _held(value, path, places)
        if container is None:
            continue
        loose = [str(name) for name, inner in container.items() if is_tensor(inner)]
        is_numbered = bool(container) and all(str(name).isdigit() for name in container)
        ends_here = bool(path) and (bool(loose) or is_numbered or depth >= _DEEPEST)
        if place is not None and ends_here:
            listed.append((place, list(place.leaves)))
        elif place is not None and loose:
            listed.append((place, loose))
        for name, inner in container.items():
            below = f"{path}.{name}" if path else str(name)
            if below in places:
                if not ends_here:
                    todo.append((below, inner, depth + 1))
            elif not is_tensor(inner):
                values[below] = inner
    return listed, values


def _held(value: Any, path: str, places: Mapping[str, Place]) -> Mapping[Any, Any] | None:
    """`as_mapping`, but of a long list only its beginning, and what is or holds tensors."""
    if not isinstance(value, (list, tuple)):
        return as_mapping(value)
    prefix = f"{path}." if path else ""
    return {
        index: inner
        for index, inner in enumerate(value)
        if index < _LISTED_ELEMENTS or is_tensor(inner) or f"{prefix}{index}" in places
    }


def _dtype_of(entry: TensorEntry, leaf: object) -> torch.dtype:
    """The element type of a part of a leaf; that of the leaf itself where the part is its integers."""
    made_of = leaf.quantized if isinstance(leaf, OpaqueTensor) else None
    return made_of.dtype if made_of is not None and entry is made_of.data else entry.dtype


def _tensor(name: str, container: str, leaf: object) -> TensorInfo:
    if isinstance(leaf, TensorEntry):
        return TensorInfo(name, container, leaf.dtype, leaf.shape, leaf.nbytes)
    if not isinstance(leaf, OpaqueTensor):
        return TensorInfo(name, container, None, None, kind="extra state")
    dtype = leaf.quantized.dtype if leaf.quantized is not None else None
    return TensorInfo(name, container, dtype, leaf.shape, sum(e.nbytes for e in entries_in(leaf)), leaf.reason)


# --- words ---


def _title(container: ContainerInfo) -> str:
    return printable(container.path) or "(top level)"


def _extras(container: ContainerInfo) -> str:
    extras = [f"{segment}. in names" for segment in container.wrappers]
    if container.origin:
        extras.append(f"a whole {printable(container.origin)}")
    return "".join(f", {extra}" for extra in extras)


def _describe(tensor: TensorInfo) -> str:
    dtype = short_dtype(tensor.dtype) if tensor.dtype is not None else printable(tensor.kind)
    return f"{dtype} {tensor.shape}" if tensor.shape is not None else dtype


def _brief(value: object) -> str:
    """A value in a few words; what is large or nested is only named, since a file may make it endless."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
    if isinstance(value, str):
        return f"'{printable(value)}'"
    if isinstance(value, Record):
        return f"<{printable(value.name)}>"
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} bytes"
    if isinstance(value, Mapping):
        return f"a dict of {len(value):,}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"a {type(value).__name__} of {len(value):,}"
    return f"a {type(value).__name__}"
