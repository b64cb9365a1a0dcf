"""The directory of a zip archive, read strictly.

A zip file says everything twice: in the central directory at its end and in a header beside each record. Readers that
believe different copies see different archives, so both are compared here and any difference is refused, as are
records that overlap, names that occur twice, and bytes that belong to nothing the directory speaks of at its end.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from torchload.core.checkpoint import Extent
from torchload.core.source import Source, UnpackedSource
from torchload.core.text import printable
from torchload.errors import CheckpointFormatError, CorruptCheckpointError

__all__ = ["DEFLATED", "STORED", "ZipDirectory", "ZipRecord", "first_archive", "read_directory"]

STORED, DEFLATED = 0, 8
MAX_DIRECTORY_BYTES = 128 << 20
_UNPACKED_COST = 3  # bytes for each of a text that is unpacked: itself, and what is made of it on the way

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIPTOR = struct.Struct("<4s3L")
_DESCRIPTOR64 = struct.Struct("<4sL2Q")

_HAS_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_UNREADABLE = 1 | 1 << 5 | 1 << 6 | 1 << 13  # encrypted, patched, strongly encrypted, masked headers
_LIMIT16, _LIMIT32 = 0xFFFF, 0xFFFFFFFF
# How many records are read: each takes more memory than it takes of the file, and next to data it is little of either.
_BASE_RECORDS = 100_000
_BYTES_PER_RECORD = 320
_SEARCHED_BYTES = 1 << 20
_NEAR_BYTES = 16 << 10  # so much data between two headers is read as quickly as a header alone
_WINDOW_BYTES = 256 << 10  # headers this near one another are read together
_HEADER_BYTES = 1024  # else just this much, which holds a header and its name


class ZipRecord(NamedTuple):
    """One file of an archive.

    Attributes:
        name: Its path inside the archive.
        offset: Position of its data in the source, in bytes.
        size: Length in bytes once it is decompressed; for a stored record, as it is.
        stored_size: Length in bytes in the archive.
        crc32: Checksum of the decompressed data; 0 may mean that none was computed.
        method: `STORED` or `DEFLATED`.
        header_offset: Position of its local header.
        flags: General purpose flags.
    """

    name: str
    offset: int
    size: int
    stored_size: int
    crc32: int
    method: int
    header_offset: int
    flags: int


_INFLATED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class ZipDirectory:
    """All records of an archive, in the order of the central directory.

    Attributes:
        source: The archive.
        records: Name → record.
    """

    source: Source
    records: dict[str, ZipRecord]

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
        data = self.source.read(record.offset, record.size) if stored else self._inflate(record)
        # `torch.serialization.set_crc32_options(False)` records 0 for everything.
        if record.crc32 and zlib.crc32(data) != record.crc32:
            raise CorruptCheckpointError(
                f"{self.source.name} is damaged: its record {record.name!r} does not match its checksum. "
                "Download or copy it again.",
                path=self.source.name,
            )
        return data

    def _inflate(self, record: ZipRecord) -> bytearray:
        packed = self.source.read(record.offset, record.stored_size)
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
            _damaged(self.source, f"its record {record.name!r} does not inflate ({error})")
        if size != record.size or not inflater.eof or inflater.unused_data:
            _damaged(self.source, f"its record {record.name!r} does not inflate to the {record.size} bytes it declares")
        return data


def read_directory(source: Source) -> ZipDirectory:
    """Read and check the directory of an archive; no record's data is read.

    Args:
        source: The whole archive, without anything before or after it.

    Raises:
        CorruptCheckpointError: It is truncated, contradicts itself, or has records that overlap or occur twice.
        CheckpointFormatError: It is encrypted, split, or compressed by a method that no checkpoint uses.
    """
    count, offset, size = _find_central(source)
    if size > MAX_DIRECTORY_BYTES:
        _damaged(source, f"its directory of {size} bytes is larger than that of any checkpoint")
    rows = _central_rows(source, source.read(offset, size), count)
    rows.sort()  # by the position of their headers
    records = {record.name: record for record in _located(source, rows, offset)}
    if len(records) != len(rows):
        names = set()
        for row in rows:
            if row[1] in names:
                _damaged(source, f"it has two records named {row[1]!r}")
            names.add(row[1])
    return ZipDirectory(source, records)


def first_archive(source: Source) -> Source:
    """The archive that a run of bytes begins with, where others follow it; the whole run if none is found.

    The end is looked for from the front, since the directory at the end may be another archive's.
    """
    with contextlib.suppress(CorruptCheckpointError, CheckpointFormatError):
        _find_central(source)
        return source
    window, start = b"", 0
    while start + len(window) < source.size:
        start, window = start + max(len(window) - _END.size, 0), window[-_END.size :]
        window += source.read(start + len(window), min(_SEARCHED_BYTES, source.size - start - len(window)))
        found = -1
        while (found := window.find(b"PK\x05\x06", found + 1)) >= 0:
            end = start + found + _END.size
            if end <= source.size:
                end = min(end + int.from_bytes(source.read(end - 2, 2), "little"), source.size)
                part = source.slice(0, end)
                with contextlib.suppress(CorruptCheckpointError, CheckpointFormatError):
                    _find_central(part)
                    return part
    return source


def _find_central(source: Source) -> tuple[int, int, int]:
    """Number of records, and position and length of the central directory in bytes."""
    tail_size = min(source.size, _END.size + _LIMIT16)
    tail_start = source.size - tail_size
    tail = source.read(tail_start, tail_size)
    position = tail.rfind(b"PK\x05\x06")
    # A comment may contain the signature; the true end record is the one whose comment ends with the file.
    while position >= 0 and not _ends_with_comment(tail, position):
        position = tail.rfind(b"PK\x05\x06", 0, position)
    if position < 0:
        _incomplete(source)
    end = _END.unpack_from(tail, position)
    _, disk, central_disk, disk_count, count, size, offset, _ = end
    end_position = tail_start + position
    locator_position = end_position - _END64_LOCATOR.size
    if locator_position >= 0:
        locator = _END64_LOCATOR.unpack(source.read(locator_position, _END64_LOCATOR.size))
        if locator[0] == b"PK\x06\x07":
            end64_position = locator[2]
            if end64_position + _END64.size > locator_position:
                _damaged(source, "its zip64 end record is not where its locator says")
            end64 = _END64.unpack(source.read(end64_position, _END64.size))
            if end64[0] != b"PK\x06\x06" or end64_position + 12 + end64[1] != locator_position:
                _damaged(source, "its zip64 end record is not where its locator says")
            narrow = disk, central_disk, disk_count, count, size, offset
            limits = (_LIMIT16,) * 4 + (_LIMIT32,) * 2
            if any(value not in (wide, limit) for value, wide, limit in zip(narrow, end64[4:], limits)):
                _damaged(source, "its two end records disagree")
            disk, central_disk, disk_count, count, size, offset = end64[4:]
            end_position = end64_position
    if disk or central_disk or disk_count != count:
        raise CheckpointFormatError(
            f"{source.name} is one part of a zip archive that was split over several files. Join them first.",
            path=source.name,
            found="split zip archive",
        )
    if offset + size != end_position:
        _damaged(
            source,
            f"its directory is said to lie at bytes {offset} to {offset + size}, but ends at {end_position}: "
            "bytes are missing or were added",
        )
    most = _BASE_RECORDS + source.size // _BYTES_PER_RECORD
    if count > most:
        _damaged(source, f"it declares {count:,} records, and more than {most:,} are not read from a file of its size")
    if count * _CENTRAL.size > size:
        _damaged(source, f"its directory is too short for the {count} records it declares")
    return count, offset, size


# What the central directory says of a record: position of its header, name, name in bytes, flags, method, CRC-32,
# length in the archive, length. Plain tuples, because a checkpoint may have very many.
_Row = tuple[int, str, bytes, int, int, int, int, int]


def _ends_with_comment(tail: bytes, position: int) -> bool:
    return position + _END.size <= len(tail) and position + _END.size + _END.unpack_from(tail, position)[7] == len(tail)


def _central_rows(source: Source, central: bytes, count: int) -> list[_Row]:
    rows: list[_Row] = []
    position, unpack, width = 0, _CENTRAL.unpack_from, _CENTRAL.size
    for _ in range(count):
        if position + width > len(central):
            _damaged(source, "its directory ends in the middle of a record")
        # fmt: off
        (signature, _, _, flags, method, _, _, crc32, stored_size, size,
         name_size, extra_size, comment_size, disk, _, _, header_offset) = unpack(central, position)
        # fmt: on
        end = position + width + name_size
        raw_name = central[position + width : end]
        position = end + extra_size + comment_size
        if signature != b"PK\x01\x02" or position > len(central):
            _damaged(source, "its directory ends in the middle of a record")
        if size == _LIMIT32 or stored_size == _LIMIT32 or header_offset == _LIMIT32:
            extra = central[end : end + extra_size]
            size, stored_size, header_offset = _wide(source, extra, size, stored_size, header_offset)
        name = _decoded(source, raw_name, flags)
        if flags & _UNREADABLE or method != STORED or disk or size != stored_size:
            _check_readable(source, name, flags, method, disk, size == stored_size)
        rows.append((header_offset, name, raw_name, flags, method, crc32, stored_size, size))
    if position != len(central):
        _damaged(source, "its directory has bytes after its last record")
    return rows


def _check_readable(source: Source, name: str, flags: int, method: int, disk: int, same_size: bool) -> None:
    if flags & _UNREADABLE:
        raise CheckpointFormatError(
            f"{source.name}: its record {name!r} is encrypted. Unpack the archive with its password first.",
            path=source.name,
            found="encrypted zip archive",
        )
    if method not in (STORED, DEFLATED):
        raise CheckpointFormatError(
            f"{source.name}: its record {name!r} is compressed by method {method}; torch stores records "
            "uncompressed. Unpack the archive and pack it again with 'zip -0'.",
            path=source.name,
            found="compressed zip archive",
        )
    if disk not in (0, _LIMIT16):
        _damaged(source, f"its record {name!r} is said to lie in another file")
    if method == STORED and not same_size:
        _damaged(source, f"its record {name!r} is stored, yet has two different sizes")


def _decoded(source: Source, raw_name: bytes, flags: int) -> str:
    try:
        name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        _damaged(source, f"a record's name is not UTF-8: {raw_name[:80]!r}")
    if "\0" in name or not name:
        _damaged(source, f"a record has the impossible name {name[:80]!r}")
    return name


def _wide(source: Source, extra: bytes, *narrow: int) -> tuple[int, ...]:
    """The values that are too large for their field, from the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wanted = sum(value == _LIMIT32 for value in narrow)
            if size >= 8 * wanted and position + 4 + size <= len(extra):
                wide = iter(struct.unpack_from(f"<{wanted}Q", extra, position + 4))
                return tuple(next(wide) if value == _LIMIT32 else value for value in narrow)
            break
        position += 4 + size
    _damaged(source, "a record has no zip64 sizes, though it declares them")


def _located(source: Source, rows: list[_Row], limit: int) -> Iterator[ZipRecord]:
    """The records with the position of their data, each compared with its local header.

    Records follow one another without a gap, from the beginning of the archive to its directory: where data begins,
    only the local header says, and whoever could choose that freely could show other bytes than those that were meant.

    Args:
        source: The archive.
        rows: In the order of their local headers.
        limit: Where the central directory begins.
    """
    window = _Window(source, [row[0] for row in rows], limit)
    end = 0  # of the record before
    for number, row in enumerate(rows):
        header, name, raw_name, flags, method, crc32, stored_size, size = row
        data = header + _LOCAL.size + len(raw_name)
        if header < end or data > limit:
            _damaged(source, f"its record {name!r} overlaps another one or the directory")
        if header > end:
            _damaged(source, f"nothing says what the {header - end} bytes before its record {name!r} are")
        start = window.around(number, data)
        # fmt: off
        (signature, _, local_flags, local_method, _, _, local_crc32, local_stored_size, local_size,
         name_size, extra_size) = _LOCAL.unpack_from(window.content, start)
        # fmt: on
        start += _LOCAL.size
        if (
            signature != b"PK\x03\x04"
            or window.content[start : start + name_size] != raw_name
            or local_flags != flags
            or local_method != method
        ):
            _damaged(source, f"its record {name!r} has another name, method or flags in its own header")
        data += extra_size
        if _LIMIT32 in (local_size, local_stored_size):
            extra = source.read(data - extra_size, extra_size)
            local_size, local_stored_size = _wide(source, extra, local_size, local_stored_size)
        end = data + stored_size
        if end > limit:
            _damaged(source, f"its record {name!r} overlaps another one or the directory")
        if flags & _HAS_DESCRIPTOR and local_crc32 == local_stored_size == local_size == 0:
            end += window.descriptor_size(number, row, end)
        elif (local_crc32, local_stored_size, local_size) != (crc32, stored_size, size):
            _damaged(source, f"its record {name!r} has another size or checksum in its own header")
        yield ZipRecord(name, data, size, stored_size, crc32, method, header, flags)
    if end != limit:
        _damaged(source, f"nothing says what the {limit - end} bytes before its directory are")


class _Window:
    """Local headers, and the descriptors before them: those that lie near one another are read at once.

    Attributes:
        content: The bytes that were read last.
    """

    __slots__ = ("_headers", "_limit", "_source", "_start", "content")

    def __init__(self, source: Source, headers: list[int], limit: int) -> None:
        self._source = source
        self._headers = headers
        self._limit = limit
        self._start = 0
        self.content = b""

    def around(self, number: int, needed: int, first: int | None = None) -> int:
        """Have the header of a record at hand, up to byte `needed` of the archive; where in `content` it begins.

        Args:
            number: Of the record.
            needed: Up to which byte of the archive its header is looked at.
            first: What to have at hand before it; the header itself if nothing is.
        """
        header = self._headers[number]
        start = header if first is None else first
        if needed > self._start + len(self.content):
            last = bisect_right(self._headers, header + _WINDOW_BYTES) - 1
            if self._headers[last] - header > (last - number) * _NEAR_BYTES:
                last = number  # mostly data would be read
            end = min(max(needed, self._headers[last] + _HEADER_BYTES), self._limit)
            self._start, self.content = start, self._source.read(start, end - start)
        return start - self._start

    def descriptor_size(self, number: int, row: _Row, end: int) -> int:
        """Length of the descriptor behind the data of a record, which must say what the central directory says.

        Args:
            number: Of the record.
            row: The record, whose own header leaves its checksum and sizes open.
            end: Where its data ends.
        """
        following = self._headers[number + 1] if number + 1 < len(self._headers) else self._limit
        size = following - end
        values = b"PK\x07\x08", row[5], row[6], row[7]
        # Writers use the wide form for whatever lies beyond 4 GiB, too.
        forms = [form for form in (_DESCRIPTOR, _DESCRIPTOR64) if form.size == size]
        if forms and (forms[0] is _DESCRIPTOR64 or max(values[2:]) < _LIMIT32):
            if number + 1 < len(self._headers):
                at = self.around(number + 1, following + _LOCAL.size, end)
                found = self.content[at : at + size]
            else:
                found = self._source.read(end, size)
            if found == forms[0].pack(*values):
                return size
        _damaged(self._source, f"its record {row[1]!r} has another size or checksum behind its data")


def _incomplete(source: Source) -> NoReturn:
    """The archive has no end. How much of it is missing, its local headers may tell."""
    position = 0
    expected = 0
    for _ in range(1000):
        if position + _LOCAL.size > source.size:
            break
        local = _LOCAL.unpack(source.read(position, _LOCAL.size))
        if local[0] != b"PK\x03\x04" or local[2] & _HAS_DESCRIPTOR or _LIMIT32 in local[7:9]:
            break
        position += _LOCAL.size + local[9] + local[10] + local[7]
        expected = position
    needed = f" of at least {expected}" if expected > source.size else ""
    raise CorruptCheckpointError(
        f"{source.name} is incomplete: the file has {source.size} bytes{needed}, and the directory that ends a zip "
        "archive is not among them. Download or copy it again.",
        path=source.name,
    )


def _damaged(source: Source, what: str) -> NoReturn:
    raise CorruptCheckpointError(f"{source.name} is damaged: {what}. Download or copy it again.", path=source.name)
