"""Zip archives: the records of one, read and checked.

What the archive says of them is compared in `torchload.formats.files.zip_headers`.
"""

from __future__ import annotations

import contextlib
import zlib

from torchload.core.checkpoint import Extent
from torchload.core.source import Source, UnpackedSource
from torchload.core.text import printable
from torchload.errors import CheckpointFormatError, CorruptCheckpointError, damaged
from torchload.formats.files.zip_headers import (
    DEFLATED,
    END,
    STORED,
    ZipBytes,
    ZipRecord,
    central_rows,
    find_central,
    located,
)

__all__ = ["DEFLATED", "STORED", "ZipDirectory", "ZipRecord", "first_archive", "read_directory"]

MAX_DIRECTORY_BYTES = 128 << 20
_UNPACKED_COST = 3  # bytes for each of a text that is unpacked: itself, and what is made of it on the way
_INFLATED_AT_ONCE = 1 << 20
_SEARCHED_BYTES = 1 << 20


class ZipDirectory:
    """All records of an archive, in the order in which they lie there.

    Attributes:
        source: The archive.
        records: Name → record.
        top: The folder of the first record, with its slash; in what torch writes, everything is in it.
    """

    __slots__ = ("_archive", "records", "source", "top")

    def __init__(self, archive: ZipBytes, records: dict[str, ZipRecord]) -> None:
        self._archive = archive
        self.source = archive.source
        self.records = records
        folder, slash, _ = next(iter(records), "").partition("/")
        self.top = folder + slash if slash else ""

    def read(self, name: str) -> bytes:
        """The data of a record, decompressed and checked against its checksum.

        Raises:
            KeyError: There is no such record.
            CorruptCheckpointError: It is damaged, or larger than the size of the archive accounts for.
        """
        record = self.records[name]
        if record.method != STORED:
            self.source.budget.spend(_UNPACKED_COST * record.size, self.source.name)
        return bytes(self._checked(record))

    def source_of(self, name: str) -> Source:
        """A record as a source of its own: a part of the archive, or unpacked when it is first read.

        Raises:
            CorruptCheckpointError: It is compressed, and larger than the size of the archive accounts for.
        """
        record = self.records[name]
        label = f"{self.source.name}/{printable(name)}"
        if record.method == STORED:
            return self.source.slice(record.offset, record.size, label)
        self.source.budget.spend(record.size, self.source.name)
        return UnpackedSource(lambda: self._checked(record), record.size, label, self.source.budget)

    def extent_of(self, name: str, big_endian: bool = False) -> Extent:
        """Where the data of a record is; raises as `source_of`."""
        record = self.records[name]
        if record.method != STORED:  # its checksum is compared when it is unpacked
            return Extent(self.source_of(name), 0, record.size, None, big_endian)
        return Extent(self.source, record.offset, record.size, record.crc32 or None, big_endian)

    def _checked(self, record: ZipRecord) -> bytes | bytearray:
        stored = record.method == STORED
        data = self._archive.read(record.offset, record.size) if stored else self._inflate(record)
        # `torch.serialization.set_crc32_options(False)` records 0 for everything.
        if record.crc32 and zlib.crc32(data) != record.crc32:
            raise damaged(self.source.name, f"its record {record.name!r} does not match its checksum")
        return data

    def _inflate(self, record: ZipRecord) -> bytearray:
        packed = self._archive.read(record.offset, record.stored_size)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data, size = bytearray(record.size), 0  # all at once would take it twice for a moment
        try:
            while part := inflater.decompress(packed, _INFLATED_AT_ONCE):
                if size + len(part) <= record.size:
                    data[size : size + len(part)] = part
                size += len(part)
                packed = inflater.unconsumed_tail
                if size > record.size:
                    break
        except zlib.error as error:
            raise damaged(self.source.name, f"its record {record.name!r} does not inflate ({error})") from None
        if size != record.size or not inflater.eof or inflater.unused_data:
            problem = f"its record {record.name!r} does not inflate to the {record.size} bytes it declares"
            raise damaged(self.source.name, problem)
        return data


def read_directory(source: Source) -> ZipDirectory:
    """Read and check the directory of an archive, which the source is alone; no record's data is read.

    Raises:
        CorruptCheckpointError: It is truncated, contradicts itself, or has records that overlap or occur twice.
        CheckpointFormatError: It is encrypted, split, or compressed by a method that no checkpoint uses.
    """
    archive = ZipBytes(source)
    count, offset, size = find_central(archive)
    if size > MAX_DIRECTORY_BYTES:
        raise damaged(source.name, f"its directory of {size} bytes is larger than that of any checkpoint")
    rows = central_rows(archive, archive.read(offset, size), count)
    rows.sort()  # by the position of their headers
    return ZipDirectory(archive, located(archive, rows, offset))


def first_archive(source: Source) -> Source:
    """The archive that a run of bytes begins with, where others follow it; the whole run if none is found.

    The end is looked for from the front, since the directory at the end may be another archive's.
    """
    with contextlib.suppress(CorruptCheckpointError, CheckpointFormatError):
        find_central(ZipBytes(source))
        return source
    window, start = b"", 0
    while start + len(window) < source.size:
        start, window = start + max(len(window) - END.size, 0), window[-END.size :]
        window += source.read(start + len(window), min(_SEARCHED_BYTES, source.size - start - len(window)))
        found = -1
        while (found := window.find(b"PK\x05\x06", found + 1)) >= 0:
            end = start + found + END.size
            if end <= source.size:
                end = min(end + int.from_bytes(source.read(end - 2, 2), "little"), source.size)
                part = source.slice(0, end)
                with contextlib.suppress(CorruptCheckpointError, CheckpointFormatError):
                    find_central(ZipBytes(part))
                    return part
    return source
