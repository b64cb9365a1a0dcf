"""`torch.distributed.checkpoint` folders, as FSDP, tensor parallelism and DDP save them: an index, and files of items.

``.metadata`` is a pickle that names each tensor's chunks and, for each, a run of bytes in one of the ``*.distcp``
files. Such a run is a whole `torch.save` file, or lies in a safetensors file. Where in the run a chunk's elements begin
is only looked up when somebody wants that chunk: whoever loads one rank's part of a model looks into the items of that
part, and not into those of other ranks or of the optimizer.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from torchload.core.budget import Budget
from torchload.core.checkpoint import (
    Box,
    Checkpoint,
    Container,
    OpaqueTensor,
    Record,
    Region,
    Shape,
    TensorEntry,
    record_fields,
)
from torchload.core.source import Source
from torchload.core.text import listed, plural
from torchload.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    damaged,
    incomplete,
)
from torchload.formats.locate import path_inside, source_of_file
from torchload.formats.pickles.unpickle import read_pickle
from torchload.formats.sets.items import Item, ItemBox, ItemReader
from torchload.formats.sets.members import OpenMember
from torchload.formats.sets.tiling import MAX_ELEMENTS, MisfitError, of_boxes

if TYPE_CHECKING:
    from typing import TypeGuard

__all__ = ["METADATA_NAME", "open_folder"]

METADATA_NAME = re.compile(r"(?:__\d+)?\.metadata")  # with a rank's number where the ranks saved without each other
MAX_METADATA_BYTES = 1 << 30
MAX_PATH_PARTS = 64
MAX_DIMENSIONS = 64


def open_folder(path: str, open_member: OpenMember) -> Checkpoint:
    """Index a folder that `torch.distributed.checkpoint.save` wrote; any number of ranks, no process group needed.

    Returns:
        A checkpoint whose root is nested as the saved object was. Tensors are entries of one box for each chunk.

    Raises:
        CheckpointNotFoundError: Files that the index names are missing; the message lists them.
        CorruptCheckpointError: The index contradicts itself or the files, or names something outside the folder.
        CheckpointFormatError: ``.metadata`` is something else.
    """
    index = _Index(open_member.budget)
    names = sorted(filter(METADATA_NAME.fullmatch, os.listdir(path)))
    if not names:
        raise CheckpointNotFoundError(
            "The checkpoint has files of torch.distributed.checkpoint, but not the file .metadata that says what is "
            "in them. It is written last, and its name begins with a dot, which hides it: either the save did not end, "
            "or the file was not copied."
        )
    for name in names[:1] if ".metadata" in names else names:
        index.add(os.path.join(path, name))
    with ExitStack() as stack:
        files: dict[str, Source] = {}
        for name, file in _located(path, index.file_names()).items():
            files[name] = stack.enter_context(closing(source_of_file(file, open_member.budget)))
        checkpoint = index.checkpoint(path, files)
        stack.pop_all()
    return checkpoint


class _Place(NamedTuple):
    """Where an item's bytes are, as the index says."""

    file_name: str
    offset: int
    size: int
    transforms: tuple[str, ...]


@dataclass(slots=True)
class _Tensor:
    """A tensor as the index describes it; its chunks may come from several indexes."""

    dtype: Any
    shape: Shape
    chunks: dict[str, tuple[Region, _Place]]


class _Index:
    """What all metadata files of a folder say together.

    Attributes:
        tensors: Name → description.
        values: Name → where the pickled value is.
        paths: Name → keys and list indices that led to it in the saved object.
    """

    def __init__(self, budget: Budget) -> None:
        self.tensors: dict[str, _Tensor] = {}
        self.values: dict[str, _Place] = {}
        self.paths: dict[str, tuple[str | int, ...]] = {}
        self.taken: set[tuple[str, int]] = set()  # file and offset of every chunk's item
        self.budget = budget
        self.chunks_left = 0  # more chunks than this can only be the same list in many places

    # --- reading ---

    def add(self, file: str) -> None:
        """Read one metadata file."""
        fields = self._fields(_read_metadata(file, self.budget), "Metadata")
        described, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
        if not isinstance(described, dict) or not isinstance(stored, dict):
            raise damaged(None, "its .metadata lacks the list of tensors or the list of their places")
        places = self._places(stored)
        self.chunks_left += 1000 + 2 * (len(described) + len(stored))
        for name, description in described.items():
            if type(name) is not str:
                raise damaged(None, "a name in its .metadata is not text")
            kind = _class_name(description)
            if kind == "TensorStorageMetadata":
                self._add_tensor(name, record_fields(description), places)
            elif kind == "BytesStorageMetadata":
                self.values.setdefault(name, self._place_of(places, name, None))
            else:
                raise damaged(None, f"its .metadata describes {_short(name)} as {kind or 'something unknown'}")
        paths = fields.get("planner_data")
        if isinstance(paths, dict):
            self.paths.update((name, keys) for name, keys in paths.items() if _is_path(keys))

    def _fields(self, record: Any, kind: str) -> dict[str, Any]:
        if _class_name(record) != kind:
            raise CheckpointFormatError(
                "The checkpoint has a .metadata file that is not torch.distributed.checkpoint's: it holds "
                f"{_class_name(record) or type(record).__name__} instead of {kind}."
            )
        return record_fields(record)

    def _places(self, stored: dict[Any, Any]) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        for key, info in stored.items():
            if _class_name(key) != "MetadataIndex" or _class_name(info) != "_StorageInfo":
                raise damaged(
                    None, "the storage info in its .metadata has a form that only a custom storage writer knows"
                )
            index, place = record_fields(key), record_fields(info)
            name, origin = index.get("fqn"), index.get("offset")
            file_name, offset, size = place.get("relative_path"), place.get("offset"), place.get("length")
            transforms = place.get("transform_descriptors") or ()
            if (
                type(name) is not str
                or not (origin is None or _is_shape(origin))
                or type(file_name) is not str
                or not (type(offset) is int and type(size) is int and offset >= 0 and size >= 0)
                or not (isinstance(transforms, (list, tuple)) and all(type(part) is str for part in transforms))
            ):
                raise damaged(None, f"the storage info of {_short(name)} in its .metadata is malformed")
            places[_place_key(name, origin)] = _Place(file_name, offset, size, tuple(transforms))
        return places

    def _place_of(self, places: dict[str, _Place], name: str, origin: Shape | None) -> _Place:
        place = places.get(_place_key(name, origin))
        if place is None:
            part = f" at {list(origin)}" if origin else ""
            raise damaged(None, f"its .metadata does not say where {_short(name)}{part} is")
        return place

    def _add_tensor(self, name: str, fields: dict[str, Any], places: dict[str, _Place]) -> None:
        shape, chunks, properties = fields.get("size"), fields.get("chunks"), fields.get("properties")
        state = properties.state if isinstance(properties, Record) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if not _is_shape(shape) or not isinstance(chunks, list):
            raise damaged(None, f"the shape or the list of chunks of {_short(name)} in its .metadata is malformed")
        tensor = self.tensors.setdefault(name, _Tensor(dtype, shape, {}))
        if (tensor.shape, tensor.dtype) != (shape, dtype) and not isinstance(dtype, Record):
            raise damaged(None, f"two ranks describe {_short(name)} differently")
        self.chunks_left -= len(chunks)
        if self.chunks_left < 0:
            raise damaged(None, "its .metadata describes more chunks than it has places for")
        for chunk in chunks:
            region = record_fields(chunk) if _class_name(chunk) == "ChunkStorageMetadata" else {}
            origin, size = region.get("offsets"), region.get("sizes")
            if not _is_shape(origin) or not _is_shape(size) or not len(origin) == len(size) == len(shape):
                raise damaged(None, f"the offsets or sizes of a chunk of {_short(name)} in its .metadata are malformed")
            if 0 not in size:  # replicas, which ranks that saved without each other each describe, are taken once
                place = self._place_of(places, name, origin)
                tensor.chunks.setdefault(_place_key("", origin), (Region(origin, size), place))

    # --- building ---

    def file_names(self) -> list[str]:
        """Every file that an item lies in, sorted."""
        names = {place.file_name for place in self.values.values()}
        names.update(place.file_name for tensor in self.tensors.values() for _, place in tensor.chunks.values())
        return sorted(names)

    def checkpoint(self, path: str, files: dict[str, Source]) -> Checkpoint:
        """The tree over the opened files."""
        reader = ItemReader()
        entries: dict[str, Any] = {}
        for name, tensor in self.tensors.items():
            entries[name] = self._entry(name, tensor, files, reader)
        for name, place in self.values.items():
            if place.transforms:
                entries[name] = Record("torch.distributed.checkpoint value behind " + ", ".join(place.transforms)[:200])
            else:
                entries[name] = reader.value(self._item(name, place, files))
        kind = f"torch.distributed.checkpoint folder ({plural(len(files), 'file')})"
        return Checkpoint(path, kind, self._tree(entries), tuple(files.values()), checksums=True)

    def _entry(
        self, name: str, tensor: _Tensor, files: dict[str, Source], reader: ItemReader
    ) -> TensorEntry | OpaqueTensor:
        shape, dtype = tensor.shape, tensor.dtype
        if type(dtype) is not torch.dtype:
            return OpaqueTensor(f"a tensor of a dtype that torch {torch.__version__} lacks", shape)
        boxes: list[Box] = []
        for (origin, size), place in tensor.chunks.values():
            # Only in a safetensors file, where sizes are those of the data alone, do items begin at the same byte.
            begin = (place.file_name, place.offset)
            if begin in self.taken and place.size != math.prod(size) * dtype.itemsize:
                raise damaged(None, f"its .metadata says that a chunk of {_short(name)} lies where another one lies")
            self.taken.add(begin)
            boxes.append(ItemBox(reader, self._item(name, place, files), dtype, size, origin))
        try:
            entry = of_boxes(dtype, shape, boxes)
        except MisfitError as error:
            raise damaged(None, f"the {len(boxes)} chunks of {_short(name)} make no tensor: {error}") from None
        transforms = [part for _, place in tensor.chunks.values() for part in place.transforms]
        if transforms:
            return OpaqueTensor(f"a tensor written through {', '.join(dict.fromkeys(transforms))[:200]}", shape)
        return entry

    def _item(self, name: str, place: _Place, files: dict[str, Source]) -> Item:
        source = files[place.file_name]
        if place.offset + place.size > source.size:
            end = place.offset + place.size
            raise incomplete(None, f"{place.file_name} has {source.size} bytes, but {_short(name)} ends at byte {end}")
        return Item(source, place.offset, place.size, name)

    def _tree(self, entries: dict[str, Any]) -> Container:
        """The entries nested as they were when they were saved; flat where no path is known."""
        root = Container()
        paths = self.paths
        if sum(map(len, paths.values())) > 1000 + 10 * len(entries):
            paths = {}  # deeper than any object is; each level costs a container
        for name, entry in entries.items():
            if not _insert(root, paths.get(name, (name,)), entry) and not _insert(root, (name,), entry):
                raise damaged(None, f"two values have the name {_short(name)}")
        return _with_lists(root)


# --- files ---


def _read_metadata(file: str, budget: Budget) -> Any:
    with closing(source_of_file(file, budget)) as source:
        if source.size > MAX_METADATA_BYTES:
            raise CorruptCheckpointError(f"{file} has {source.size:,} bytes; no index is that large.", path=file)
        data = source.read(0, source.size)
    return read_pickle(data, name=file, budget=budget)


def _located(path: str, names: list[str]) -> dict[str, str]:
    """Name in the index → path; all are there."""
    located = {name: path_inside(name, path, path) for name in names}
    missing = [name for name, file in located.items() if not os.path.exists(file)]
    if missing:
        raise CheckpointNotFoundError(
            f"{len(missing)} of the {len(names)} files of the checkpoint are missing: {listed(missing, 20)}. Copy them "
            "into the folder; every rank of the job that saved wrote its own."
        )
    return located


# --- names ---


def _insert(root: Container, keys: tuple[str | int, ...], entry: Any) -> bool:
    """Put an entry at its path; false if something else stands in the way."""
    here: Any = root
    for key in keys[:-1]:
        here = here.setdefault(key, Container())
        if type(here) is not Container:
            return False
    if keys[-1] in here:
        return False
    here[keys[-1]] = entry
    return True


def _with_lists(root: Container) -> Container:
    """What was a list becomes one again: containers whose keys are 0, 1, 2, … as numbers."""
    holders: list[Container] = [root]
    for holder in holders:
        holders.extend(value for value in holder.values() if type(value) is Container)
    for holder in reversed(holders):
        for key, value in holder.items():
            if type(value) is Container and value and list(value) == list(range(len(value))):
                holder[key] = list(value.values())
    return root


def _is_path(keys: Any) -> bool:
    return (
        isinstance(keys, tuple)
        and 0 < len(keys) <= MAX_PATH_PARTS
        and all(type(key) is str or (type(key) is int and 0 <= key < 1 << 31) for key in keys)
    )


# --- small things ---


def _class_name(record: Any) -> str | None:
    """The name of a recorded object's class; its module has moved between versions of torch."""
    return record.name.rpartition(".")[2] if isinstance(record, Record) else None


def _is_shape(value: Any) -> TypeGuard[Shape]:
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in value)
    )


def _place_key(name: str, origin: Shape | None) -> str:
    """Text, because a file can make the hashes of tuples of numbers collide, but not those of text."""
    return f"{origin}{name}"


def _short(name: Any) -> str:
    text = repr(name) if type(name) is str else type(name).__name__
    return text if len(text) <= 200 else text[:197] + "..."
