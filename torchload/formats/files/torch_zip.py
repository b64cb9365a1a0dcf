"""What `torch.save` has written since torch 1.6: a zip archive of a pickle and one record per storage.

Inside, below a folder named for the file: ``data.pkl``, the object; ``data/<key>``, the bytes of each storage, stored
uncompressed; ``byteorder``, from torch 2.1 on; ``version`` and more such small records.
"""

from __future__ import annotations

from collections.abc import Callable

from torchload.core.checkpoint import Checkpoint, Extent
from torchload.core.text import printable
from torchload.errors import CheckpointFormatError, damaged
from torchload.formats.files.zip_directory import STORED, ZipDirectory
from torchload.formats.pickles.unpickle import Storage, read_pickle

__all__ = ["open_directory"]

SMALL_BYTES = 1 << 16  # records this short, beside the tensors', are checked when the file is opened


def open_directory(directory: ZipDirectory, path: str) -> Checkpoint:
    """Index a zip checkpoint without reading tensor data."""
    source = directory.source
    top = _top_folder(directory, path)
    data_folder = f"{top}data/"
    pickle_record = directory.records[f"{top}data.pkl"]
    others = [record for name, record in directory.records.items() if not name.startswith(data_folder)]
    small = {record.name: directory.read(record.name) for record in others if record.size <= SMALL_BYTES}
    order = f"{top}byteorder"
    big_endian = _is_big_endian(small.get(order, b"") if order in directory.records else None, source.name)
    stored = pickle_record.method == STORED
    root = read_pickle(
        small.get(pickle_record.name) or directory.read(pickle_record.name),
        _storage_extents(directory, data_folder, big_endian),
        name=path,
        source=source.slice(pickle_record.offset, pickle_record.size) if stored else None,
        budget=source.budget,
    )
    has_checksums = any(record.crc32 for record in directory.records.values())
    return Checkpoint(path, "zip checkpoint", root, (source,), checksums=has_checksums)


def _storage_extents(directory: ZipDirectory, folder: str, big_endian: bool) -> Callable[[Storage], Extent]:
    """Where the storages of a pickle are, given the folder (with its slash) that holds their records."""
    source, records = directory.source, directory.records

    def extent_of(storage: Storage) -> Extent:
        record = records.get(folder + storage.key)
        if record is None:
            raise damaged(source.name, f"its pickle refers to a storage {storage.key!r} that it doesn't have")
        _, offset, size, _, crc32, method = record
        if size != storage.nbytes:
            raise damaged(
                source.name,
                f"storage {storage.key!r} should have {storage.nbytes} bytes, and its record has {size}",
            )
        if method != STORED:
            return directory.extent_of(record.name, big_endian)
        return Extent(source, offset, size, crc32 or None, big_endian)

    return extent_of


def _top_folder(directory: ZipDirectory, path: str) -> str:
    """The folder of ``data.pkl``, with its slash; empty where it lies at the top."""
    tops = [name[: -len("data.pkl")] for name in directory.records if name.endswith("data.pkl")]
    tops = [top for top in tops if not top or (top.endswith("/") and top.count("/") == 1)]
    if len(tops) == 1:
        return tops[0]
    names = sorted(directory.records)
    shown = ", ".join(map(printable, names[:5])) + (", …" if len(names) > 5 else "")
    raise CheckpointFormatError(
        f"{path} is a zip archive, but not one that torch.save wrote: "
        + ("it has no data.pkl" if not tops else f"it has {len(tops)} records named data.pkl")
        + (f" (it holds {shown})." if names else " (it is empty)."),
        path=path,
        found="zip archive",
    )


def _is_big_endian(order: bytes | None, name: str) -> bool:
    if order not in (None, b"little", b"big"):  # None before torch 2.1, on what is little-endian nearly always
        raise damaged(name, f"its byte order is {order[:20]!r}")
    return order == b"big"
