"""Sharded checkpoints: several files that together hold one set of tensors.

An index (``*.index.json``) names the file of every tensor. Its text may come from anybody, so a name in it must stay
inside the index's folder by its spelling alone, and may pass through no linked folder. The file itself may be a
symbolic link: caches of downloaded models are made of them, and a link on this disk is its owner's doing, not the
index's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchload.core.checkpoint import Checkpoint, Container, OpaqueTensor, Shape, TensorEntry
from torchload.core.source import FileSource, Source
from torchload.core.text import listed, plural
from torchload.errors import CheckpointFormatError, CheckpointNotFoundError, CorruptCheckpointError
from torchload.formats.json_text import parse_object
from torchload.formats.locate import path_inside
from torchload.formats.sets.members import Members, OpenFile, may_be_same, naming
from torchload.formats.sets.tiling import MisfitError, assemble

__all__ = ["files_of", "open_index", "open_list", "recognizes"]

_MAX_INDEX_BYTES = 100_000_000
_MAX_INDEX_NAMES = 500_000
_COMPARED_BYTES = 1024 * 1024
_SLICES_KEY = "DCP_SHARDING_INFO"  # in a safetensors header: tensor name → {"saved_offsets": origin of the slice}


def recognizes(head: bytes) -> bool:
    """Whether a file that begins with `head` may be an index of shards.

    Example:
        >>> recognizes(b'{"metadata": {"total_size": 10}, "weight_map": {')
        True
        >>> recognizes(b'{"error": "Not found"}')
        False
    """
    return head.lstrip()[:1] == b"{" and (b'"weight_map"' in head or b'"metadata"' in head)


def open_index(source: Source, path: str, open_file: OpenFile) -> Checkpoint:
    """Open the shards that an index lists; they lie beside it. Its source is not closed.

    Raises:
        CheckpointNotFoundError: Shards are missing; the message names all of them.
        CheckpointFormatError: The file is JSON, but no index of shards.
        CorruptCheckpointError: The index or a shard contradicts itself, or names files outside the folder.
    """
    with naming(path):
        index = _index_in(source, path)
        weight_map = _weight_map(index)
        if not isinstance(weight_map, dict):
            raise CheckpointFormatError(
                "The checkpoint is a JSON file, not a checkpoint: an index of shards would have a 'weight_map'. "
                "Give the file that holds the weights, or its folder.",
                found="JSON file",
            )
        if len(weight_map) > _MAX_INDEX_NAMES:
            raise CorruptCheckpointError(f"The checkpoint lists {len(weight_map):,} tensors; no index of shards does.")
        if not weight_map:
            raise CorruptCheckpointError("The checkpoint lists no tensors: its weight_map is empty.")
        shards = _shard_paths(weight_map, path)
        return _merged(path, shards, open_file, index, weight_map)


def files_of(source: Source, path: str) -> list[str]:
    """The names of the files that an index lists; nothing of them is looked at."""
    weight_map = _weight_map(_index_in(source, path))
    return sorted({name for name in weight_map.values() if isinstance(name, str)} if weight_map else ())


def _weight_map(index: dict[str, Any]) -> Any:
    if index and "weight_map" not in index and all(isinstance(name, str) for name in index.values()):
        return index  # accelerate's plain form: tensor → file
    return index.get("weight_map")


def _index_in(source: Source, path: str) -> dict[str, Any]:
    if not isinstance(source, FileSource):
        raise CheckpointFormatError(
            "The checkpoint is an index of shards, which lie beside it; give its path instead of a file object.",
            found="index of shards",
        )
    if source.size > _MAX_INDEX_BYTES:
        raise CorruptCheckpointError(f"The checkpoint is {source.size:,} bytes long; no index of shards is.")
    data = bytearray(source.size)
    source.readinto(0, memoryview(data))
    return parse_object(data, "index", path)


def open_list(paths: list[str], open_file: OpenFile) -> Checkpoint:
    """Open files, in any order, that together are one checkpoint.

    Raises:
        CheckpointNotFoundError: Shards are missing; the message names all of them.
        CheckpointFormatError: The files are no shards of one set: they hold different values under one name.
        ValueError: The list is empty.
    """
    if not paths:
        raise ValueError("the list of shards is empty")
    paths = list(dict.fromkeys(paths))
    path = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    with naming(path):
        _check_present({shard: shard for shard in paths})
        return _merged(path, dict(zip(paths, paths)), open_file, {}, {})


def _merged(
    path: str,
    shards: Mapping[str, str],
    open_file: OpenFile,
    index: Mapping[str, Any],
    weight_map: Mapping[str, str],
) -> Checkpoint:
    """What shards, name → path, hold together."""
    with Members(open_file) as members:
        opened = {name: members.open(shard) for name, shard in shards.items()}
        for name, shard in opened.items():
            if not isinstance(shard.root, Container):
                kind = type(shard.root).__name__
                raise CheckpointFormatError(f"{name} is no shard: it holds a {kind}, not named tensors.", path=name)
        if len(opened) == 1 and not index:
            return members.opened[0]
        _check_listed(weight_map, opened)
        merged = _Merge(weight_map, opened)
        kinds = " and ".join(sorted({shard.format for shard in opened.values()}))
        whole = members.joined(
            path, plural(len(opened), f"{kinds} shard"), merged.root, (*merged.notes, *_size_note(index, merged.root))
        )
        return replace(whole, confirm=merged.confirm)


def _shard_paths(weight_map: Mapping[str, Any], path: str) -> dict[str, str]:
    """File name in the index → path, for each file once; all names checked, all files there."""
    folder = os.path.dirname(path)
    shards: dict[str, str] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CorruptCheckpointError(
                f"The checkpoint is invalid: the file of tensor {key!r} is not text but {type(name).__name__}."
            )
        if name not in shards:
            shards[name] = path_inside(name, folder, path)
    _check_present(shards)
    return shards


def _check_present(shards: Mapping[str, str]) -> None:
    missing = [name for name, shard in shards.items() if not os.path.exists(shard)]
    if missing:
        raise CheckpointNotFoundError(
            f"{len(missing)} of {len(shards)} shards {'is' if len(missing) == 1 else 'are'} missing: "
            f"{listed(missing, 20)}. Download them into the same folder."
        )


def _check_listed(weight_map: Mapping[str, str], shards: Mapping[str, Checkpoint]) -> None:
    absent = [(key, name) for key, name in weight_map.items() if key not in shards[name].root]
    if absent:
        key, name = absent[0]
        raise CorruptCheckpointError(
            f"The checkpoint does not fit its shards: {name} lacks the tensor {key!r}"
            + (f", and {len(absent) - 1} more are not where the index says" if len(absent) > 1 else "")
            + ". Index and shards come from different saves; download all of them again."
        )


class _Merge:
    """The union of several roots.

    Attributes:
        root: Name → entry: in the index's order first, then what the index does not list.
        notes: What is worth telling.
    """

    def __init__(self, weight_map: Mapping[str, str], shards: Mapping[str, Checkpoint]) -> None:
        self.weight_map = weight_map
        self.shards = shards
        self.notes: list[str] = []
        self.unread: list[tuple[Any, list[str], list[TensorEntry]]] = []
        holders: dict[Any, list[str]] = {key: [] for key in weight_map}
        for name, shard in shards.items():
            for key in shard.root:
                holders.setdefault(key, []).append(name)
        self.origins = {name: _slice_origins(shard) for name, shard in shards.items()}
        self.root = Container()
        for key, names in holders.items():
            self.root[key] = shards[names[0]].root[key] if len(names) == 1 else self._resolve(key, names)
        for key, names in holders.items():
            if len(names) == 1 and any(self.origins[names[0]].get(key, ())):
                raise CorruptCheckpointError(
                    f"The checkpoint is incomplete: of the tensor {key!r} only one slice is there. "
                    "Shards are missing; give all of them."
                )
        metadata: dict[str, Any] = {}
        for shard in shards.values():
            metadata.update(shard.root.metadata or {})
        self.root.metadata = metadata or None
        unlisted = [key for key in self.root if key not in weight_map] if weight_map else []
        if unlisted:
            self.notes.append(f"{len(unlisted)} entries of the shards are not in the index, such as {unlisted[0]!r}")

    def _resolve(self, key: Any, names: list[str]) -> Any:
        entries = [self.shards[name].root[key] for name in names]
        origins = [self.origins[name].get(key) for name in names]
        if all(origin is not None for origin in origins) and len(set(origins)) > 1:
            try:
                return assemble(zip((origin or () for origin in origins), entries))
            except MisfitError as error:
                raise CorruptCheckpointError(
                    f"The slices of tensor {key!r} in its shards do not fit together: {error}. "
                    "Is a shard missing, or from another save?"
                ) from None
        if key in self.weight_map:
            self.notes.append(f"{key!r} is in {len(names)} shards; took {self.weight_map[key]}, as the index says")
            return self.shards[self.weight_map[key]].root[key]
        if not all(may_be_same(entries[0], entry) for entry in entries[1:]):
            raise self._differing(key, names)
        if isinstance(entries[0], TensorEntry):
            self.unread.append((key, names, entries))
        return entries[0]

    def confirm(self) -> None:
        """Compare the data of tensors that several shards hold; what it is equal to is read once."""
        while self.unread:
            key, names, entries = self.unread[-1]
            if not all(_same_data(entries[0], entry) for entry in entries[1:]):
                raise self._differing(key, names)
            self.unread.pop()

    def _differing(self, key: Any, names: list[str]) -> CheckpointFormatError:
        return CheckpointFormatError(
            f"{names[0]} and {names[1]} are not shards of one checkpoint: both hold {key!r}, with different "
            "values. Files saved by one process each (ranks of a parallel run) can't be joined by name."
        )


def _slice_origins(shard: Checkpoint) -> dict[str, Shape]:
    """Tensor name → origin of the slice that this file holds, where its header says so.

    `torch.distributed.checkpoint.HuggingFaceStorageWriter` lets each rank write a file of its own: the same names in
    every file, each with the part of the tensor that the rank holds.
    """
    text = shard.metadata.get(_SLICES_KEY)
    if text is None:
        return {}
    info = parse_object(text.encode(), f"metadata {_SLICES_KEY}", shard.path)
    origins: dict[str, Shape] = {}
    for name, fields in info.items():
        offsets = fields.get("saved_offsets") if isinstance(fields, dict) else None
        if not isinstance(offsets, list) or not all(type(offset) is int and offset >= 0 for offset in offsets):
            raise CorruptCheckpointError(
                f"The metadata {_SLICES_KEY} of {shard.path} is invalid at tensor {name!r}.", path=shard.path
            )
        origins[name] = tuple(offsets)
    return origins


def _same_data(left: TensorEntry, right: TensorEntry) -> bool:
    """Compares the bytes of two tensors of equal dtype and shape; different layouts count as different data."""
    if len(left.boxes) != len(right.boxes):
        return False
    for one, other in zip(left.boxes, right.boxes):
        if (one.shape, one.strides, one.origin) != (other.shape, other.strides, other.origin) or not one.is_contiguous:
            return False
        size = min(one.extent.nbytes - one.start, other.extent.nbytes - other.start, left.nbytes)
        for done in range(0, size, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, size - done)
            here, there = (box.extent.source.read(box.extent.offset + box.start + done, count) for box in (one, other))
            if here != there:
                return False
    return True


def _size_note(index: Mapping[str, Any], root: Container) -> tuple[str, ...]:
    declared = index.get("metadata")
    declared = declared.get("total_size") if isinstance(declared, dict) else None
    if not isinstance(declared, (int, float)) or any(isinstance(entry, OpaqueTensor) for entry in root.values()):
        return ()
    entries = [entry for entry in root.values() if isinstance(entry, TensorEntry)]
    present = sum({entry.location: entry.nbytes for entry in entries}.values())
    if declared in {present, sum(entry.nbytes for entry in entries)}:  # some writers count tied tensors once
        return ()
    return (f"the index declares {json.dumps(declared)} bytes of tensors, the shards hold {present}",)
