"""What `torch.save` wrote before torch 1.6, and still writes on request: pickles, then the storages.

Five pickles follow one another: a magic number, the protocol's version, facts about the machine that wrote it, the
object, and the list of storage keys. Behind them lie the storages in the order of that list, each as its element count
(8 bytes) and its elements. So once the object is read, the place of every storage is known.

Counts and elements are little-endian whatever machine wrote them: torch swaps them as it writes
(``THPStorage_writeFileRaw`` in torch/csrc/serialization.cpp), and ``torch.load`` never looks at the ``little_endian``
of the third pickle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchload.core.checkpoint import Checkpoint, Extent
from torchload.core.source import Source
from torchload.errors import CheckpointFormatError, damaged, incomplete
from torchload.formats.files import LEGACY_MAGIC_NUMBER
from torchload.formats.pickles.pickle_file import from_growing_window
from torchload.formats.pickles.unpickle import Storage, Unpickled, unpickle

if TYPE_CHECKING:
    from mmap import mmap

__all__ = ["open"]

PROTOCOL_VERSION = 1001
_COUNT_BYTES = 8
_WINDOW_BYTES = 256 << 10  # counts this near one another are read together
_SMALL_BYTES = _WINDOW_BYTES // 8  # storages up to this size are near one another


def open(source: Source, path: str) -> Checkpoint:
    """Index a legacy file without reading tensor data."""
    unpickled, keys = from_growing_window(source, lambda data: _read_head(data, source, path))
    extents, end = _locate(source, unpickled, keys, path)

    def extent_of(storage: Storage) -> Extent:
        extent = extents.get(storage.key)
        if extent is None:
            raise damaged(path, f"it refers to a storage {storage.key!r} that it doesn't have")
        if storage.nbytes != extent.nbytes:
            raise damaged(
                path, f"storage {storage.key!r} has {extent.nbytes} bytes, and is said to have {storage.nbytes} as well"
            )
        return extent

    root = unpickled.finish(extent_of)
    notes: tuple[str, ...] = ()
    if end < source.size:
        notes = (f"{source.size - end} bytes follow the checkpoint in its file; they were not looked at.",)
    return Checkpoint(path, "legacy checkpoint (torch < 1.6)", root, (source,), notes=notes, end=end)


def _read_head(data: bytes | mmap, source: Source, path: str) -> tuple[Unpickled, list[str]]:
    """The object, and the keys of the storages in the order in which they follow."""

    def following(start: int) -> Unpickled:
        return unpickle(data, start, name=path, source=source)

    magic = following(0)
    version = following(magic.end)
    system = following(version.end)
    if magic.finish() != LEGACY_MAGIC_NUMBER or not isinstance(system.finish(), dict):
        raise damaged(path, "its first pickles are not those of torch.save")
    number = version.finish()
    if number != PROTOCOL_VERSION:
        if type(number) is not int or abs(number) > 1 << 32:
            raise damaged(path, "its first pickles are not those of torch.save")
        raise CheckpointFormatError(
            f"{path} is a legacy checkpoint of protocol version {number}; {PROTOCOL_VERSION} is the only one that "
            "torch ever wrote.",
            path=path,
            found="legacy checkpoint",
        )
    unpickled = following(system.end)
    listed = following(unpickled.end)
    keys = listed.finish()
    if type(keys) is not list or not all(type(key) is str or (type(key) is int and abs(key) < 1 << 64) for key in keys):
        raise damaged(path, "its list of storage keys is malformed")
    unpickled.end = listed.end
    return unpickled, [key if type(key) is str else str(key) for key in keys]


def _locate(source: Source, unpickled: Unpickled, keys: list[str], path: str) -> tuple[dict[str, Extent], int]:
    """Where each storage lies, by its key, and where the last one ends."""
    storages = unpickled.storages
    position = unpickled.end
    extents: dict[str, Extent] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in extents:
            raise damaged(
                path, f"its list names a storage {key[:80]!r} " + ("twice" if storage else "that nothing uses")
            )
        position += _COUNT_BYTES
        extents[key] = Extent(source, position, storage.nbytes)
        position += storage.nbytes
    if position > source.size:
        raise incomplete(path, f"its {len(keys)} storages need {position} bytes, but the file has {source.size}")
    _check_counts(source, [(extents[key].offset - _COUNT_BYTES, storages[key]) for key in keys], path)
    return extents, position


def _check_counts(source: Source, places: list[tuple[int, Storage]], path: str) -> None:
    """Compare the element count before each storage with the pickle's; equal counts prove every place right."""
    window, window_start = b"", 0
    for offset, storage in places:
        start = offset - window_start
        if start + _COUNT_BYTES > len(window):
            amount = _WINDOW_BYTES if storage.nbytes <= _SMALL_BYTES else _COUNT_BYTES
            window = source.read(offset, min(amount, source.size - offset))
            window_start, start = offset, 0
        count = int.from_bytes(window[start : start + _COUNT_BYTES], "little")
        if count != storage.numel:
            raise damaged(
                path, f"storage {storage.key!r} should have {storage.numel} elements, and its count says {count}"
            )
