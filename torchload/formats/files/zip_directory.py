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
from typing import NamedTuple

from torchload.core.checkpoint import Extent
from torchload.core.source import Source, UnpackedSource
from torchload.core.text import printable
from torchload.errors import CheckpointFormatError, CorruptCheckpointError, damaged, incomplete

__all__ = ["DEFLATED", "STORED", "ZipDirectory", "ZipRecord", "first_archive", "read_directory"]

STORED, DEFLATED = 0, 8
MAX_DIRECTORY_BYTES = 128 << 20
_UNPACKED_COST = 3  # bytes for each of a text that is unpacked: itself, and what is made of it on the way
_INFLATED_AT_ONCE = 1 << 20

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
# What is skipped: versions, times, attributes. The form of a record is its flags and, in the upper half, its method.
_CENTRAL = struct.Struct("<4s4xL4x3L4H6xL")
_LOCAL = struct.Struct("<4s2xL4x12s2H")
_SUMS = struct.Struct("<3L")  # CRC-32, length in the archive, length
_WIDE_SUMS = struct.Struct("<L2Q")
_NO_SUMS = bytes(_SUMS.size)
_DESCRIPTOR = b"PK\x07\x08"  # begins what stands behind data whose header was written before its sums were known
_MAX_DESCRIPTOR_BYTES = len(_DESCRIPTOR) + _WIDE_SUMS.size

_HAS_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_UNREADABLE = 1 | 1 << 5 | 1 << 6 | 1 << 13  # encrypted, patched, strongly encrypted, masked headers
_LIMIT16, _LIMIT32 = 0xFFFF, 0xFFFFFFFF
_ODD_FORM = _UNREADABLE | _LIMIT16 << 16  # unreadable, or not stored
# How many records are read: each takes more memory than it takes of the file, and next to data it is little of either.
_BASE_RECORDS = 100_000
_BYTES_PER_RECORD = 320
_SEARCHED_BYTES = 1 << 20
# Headers are read together where they lie near one another: for 20,000 small records, 40 reads instead of 20,000.
_NEAR_BYTES = 16 << 10  # so much data between two headers is read as quickly as a header alone
_WINDOW_BYTES = 256 << 10
_HEADER_BYTES = 1024  # holds a header and its name


class ZipRecord(NamedTuple):
    """One file of an archive.

    Attributes:
        name: Its path inside the archive.
        offset: Position of its data in the source, in bytes.
        size: Length in bytes once it is decompressed; for a stored record, as it is.
        stored_size: Length in bytes in the archive.
        crc32: Checksum of the decompressed data; 0 may mean that none was computed.
        method: `STORED` or `DEFLATED`.
    """

    name: str
    offset: int
    size: int
    stored_size: int
    crc32: int
    method: int


class ZipDirectory:
    """All records of an archive, in the order in which they lie there.

    Attributes:
        source: The archive.
        records: Name → record.
        top: The folder of the first record, with its slash; in what torch writes, everything is in it.
    """

    __slots__ = ("records", "source", "top")

    def __init__(self, source: Source, records: dict[str, ZipRecord]) -> None:
        self.source = source
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
        data = self.source.read(record.offset, record.size) if stored else self._inflate(record)
        # `torch.serialization.set_crc32_options(False)` records 0 for everything.
        if record.crc32 and zlib.crc32(data) != record.crc32:
            raise damaged(self.source.name, f"its record {record.name!r} does not match its checksum")
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
            raise damaged(self.source.name, f"its record {record.name!r} does not inflate ({error})") from None
        if size != record.size or not inflater.eof or inflater.unused_data:
            problem = f"its record {record.name!r} does not inflate to the {record.size} bytes it declares"
            raise damaged(self.source.name, problem)
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
        raise damaged(source.name, f"its directory of {size} bytes is larger than that of any checkpoint")
    rows = _central_rows(source, source.read(offset, size), count)
    rows.sort()  # by the position of their headers
    return ZipDirectory(source, _located(source, rows, offset))


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
        raise _incomplete(source)
    end = _END.unpack_from(tail, position)
    _, disk, central_disk, disk_count, count, size, offset, _ = end
    end_position = tail_start + position
    locator_position = end_position - _END64_LOCATOR.size
    if locator_position >= 0:
        locator = _END64_LOCATOR.unpack(source.read(locator_position, _END64_LOCATOR.size))
        if locator[0] == b"PK\x06\x07":
            end64_position = locator[2]
            if end64_position + _END64.size > locator_position:
                raise damaged(source.name, "its zip64 end record is not where its locator says")
            end64 = _END64.unpack(source.read(end64_position, _END64.size))
            if end64[0] != b"PK\x06\x06" or end64_position + 12 + end64[1] != locator_position:
                raise damaged(source.name, "its zip64 end record is not where its locator says")
            narrow = disk, central_disk, disk_count, count, size, offset
            limits = (_LIMIT16,) * 4 + (_LIMIT32,) * 2
            if any(value not in (wide, limit) for value, wide, limit in zip(narrow, end64[4:], limits)):
                raise damaged(source.name, "its two end records disagree")
            disk, central_disk, disk_count, count, size, offset = end64[4:]
            end_position = end64_position
    if disk or central_disk or disk_count != count:
        raise CheckpointFormatError(
            f"{source.name} is one part of a zip archive that was split over several files. Join them first.",
            path=source.name,
            found="split zip archive",
        )
    if offset + size != end_position:
        raise damaged(
            source.name,
            f"its directory is said to lie at bytes {offset} to {offset + size}, but ends at {end_position}: "
            "bytes are missing or were added",
        )
    most = _BASE_RECORDS + source.size // _BYTES_PER_RECORD
    if count > most:
        raise damaged(
            source.name, f"it declares {count:,} records, and more than {most:,} are not read from a file of its size"
        )
    if count * _CENTRAL.size > size:
        raise damaged(source.name, f"its directory is too short for the {count} records it declares")
    return count, offset, size


# What the central directory says of a record: position of its header, name, name in bytes, form, sums in bytes (as
# `_sums`), CRC-32, length in the archive, length. Plain tuples, because a checkpoint may have very many.
_Row = tuple[int, str, bytes, int, bytes, int, int, int]


def _ends_with_comment(tail: bytes, position: int) -> bool:
    return position + _END.size <= len(tail) and position + _END.size + _END.unpack_from(tail, position)[7] == len(tail)


def _central_rows(source: Source, central: bytes, count: int) -> list[_Row]:
    rows: list[_Row] = []
    position, unpack, width = 0, _CENTRAL.unpack_from, _CENTRAL.size
    for _ in range(count):
        if position + width > len(central):
            raise damaged(source.name, "its directory ends in the middle of a record")
        # fmt: off
        (signature, form, crc32, stored_size, size,
         name_size, extra_size, comment_size, disk, header) = unpack(central, position)
        # fmt: on
        end = position + width + name_size
        raw_name = central[position + width : end]
        sums = central[position + 16 : position + 28]
        position = end + extra_size + comment_size
        if signature != b"PK\x01\x02" or position > len(central):
            raise damaged(source.name, "its directory ends in the middle of a record")
        if size == _LIMIT32 or stored_size == _LIMIT32 or header == _LIMIT32:
            extra = central[end : end + extra_size]
            size, stored_size, header = _wide(source, extra, size, stored_size, header)
            sums = _sums(crc32, stored_size, size)
        try:
            name = raw_name.decode("utf-8" if form & _UTF8 else "cp437")
        except UnicodeDecodeError:
            raise damaged(source.name, f"a record's name is not UTF-8: {raw_name[:80]!r}") from None
        if "\0" in name or not name:
            raise damaged(source.name, f"a record has the impossible name {name[:80]!r}")
        if form & _ODD_FORM or disk or size != stored_size:
            _check_readable(source, name, form, disk, size == stored_size)
        rows.append((header, name, raw_name, form, sums, crc32, stored_size, size))
    if position != len(central):
        raise damaged(source.name, "its directory has bytes after its last record")
    return rows


def _check_readable(source: Source, name: str, form: int, disk: int, same_size: bool) -> None:
    method = form >> 16
    if form & _UNREADABLE:
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
        raise damaged(source.name, f"its record {name!r} is said to lie in another file")
    if method == STORED and not same_size:
        raise damaged(source.name, f"its record {name!r} is stored, yet has two different sizes")


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
    raise damaged(source.name, "a record has no zip64 sizes, though it declares them")


def _located(source: Source, rows: list[_Row], limit: int) -> dict[str, ZipRecord]:
    """The records with the position of their data, each compared with its local header.

    Records follow one another without a gap, from the beginning of the archive to its directory: where data begins,
    only the local header says, and whoever could choose that freely could show other bytes than those that were meant.

    Args:
        source: The archive.
        rows: In the order of their local headers.
        limit: Where the central directory begins.
    """
    records: dict[str, ZipRecord] = {}
    headers = [row[0] for row in rows]
    unpack, width = _LOCAL.unpack_from, _LOCAL.size
    content, start, stop = b"", 0, 0  # what was read last: bytes start to stop of the archive
    before: _Row | None = None  # the record that ends with a descriptor, if the one before does
    end = 0  # of the data of the record before
    for number, row in enumerate(rows):
        header, name, raw_name, form, sums, crc32, stored_size, size = row
        data = header + width + len(raw_name)
        if header < end or data > limit:
            raise damaged(source.name, f"its record {name!r} overlaps another one or the directory")
        if header - end > (0 if before is None else _MAX_DESCRIPTOR_BYTES):
            raise damaged(source.name, f"nothing says what the {header - end} bytes before its record {name!r} are")
        if data > stop:
            start, stop = end, min(max(data, _end_of_window(headers, number)), limit)
            content = source.read(start, stop - start)
        at = header - start
        if before is not None and content[end - start : at] != _DESCRIPTOR + before[4]:
            _check_descriptor(source, before, content[end - start : at])
        signature, local_form, local_sums, name_size, extra_size = unpack(content, at)
        at += width
        if signature != b"PK\x03\x04" or local_form != form or content[at : at + name_size] != raw_name:
            raise damaged(source.name, f"its record {name!r} has another name, method or flags in its own header")
        data += extra_size
        end = data + stored_size
        if end > limit:
            raise damaged(source.name, f"its record {name!r} overlaps another one or the directory")
        if local_sums == _NO_SUMS and form & _HAS_DESCRIPTOR:
            before = row
        elif local_sums == sums:
            before = None
        else:
            before = row if _owes_descriptor(source, row, local_sums, data - extra_size, extra_size) else None
        if name in records:
            raise damaged(source.name, f"it has two records named {name!r}")
        records[name] = ZipRecord(name, data, size, stored_size, crc32, form >> 16)
    if before is not None:
        _check_descriptor(source, before, source.read(end, min(limit - end, _MAX_DESCRIPTOR_BYTES + 1)))
    elif end != limit:
        raise damaged(source.name, f"nothing says what the {limit - end} bytes before its directory are")
    return records


def _end_of_window(headers: list[int], number: int) -> int:
    """Up to where to read when the header of a record is needed, given where all of them are."""
    header = headers[number]
    last = bisect_right(headers, header + _WINDOW_BYTES) - 1
    if headers[last] - header > (last - number) * _NEAR_BYTES:
        last = number  # mostly data would be read
    return headers[last] + _HEADER_BYTES


def _owes_descriptor(source: Source, row: _Row, local_sums: bytes, extra: int, extra_size: int) -> bool:
    """Whether the sums of a record stand behind its data; else they must be in its own header, perhaps wide."""
    crc32, *sizes = _SUMS.unpack(local_sums)
    if _LIMIT32 in sizes:
        size, stored_size = _wide(source, source.read(extra, extra_size), *reversed(sizes))
        local_sums = _sums(crc32, stored_size, size)
    if row[3] & _HAS_DESCRIPTOR and local_sums == _NO_SUMS:
        return True
    if local_sums != row[4]:
        raise damaged(source.name, f"its record {row[1]!r} has another size or checksum in its own header")
    return False


def _sums(crc32: int, stored_size: int, size: int) -> bytes:
    """Checksum and sizes as a header has them; as a descriptor has them where they are wide."""
    return (_SUMS if max(stored_size, size) < _LIMIT32 else _WIDE_SUMS).pack(crc32, stored_size, size)


def _check_descriptor(source: Source, row: _Row, found: bytes) -> None:
    """What stands behind the data of a record must say what the central directory says."""
    # Writers use the wide form for whatever lies beyond 4 GiB, too.
    if found != _DESCRIPTOR + row[4] and found != _DESCRIPTOR + _WIDE_SUMS.pack(*row[5:]):
        raise damaged(source.name, f"its record {row[1]!r} has another size or checksum behind its data")


def _incomplete(source: Source) -> CorruptCheckpointError:
    """The archive has no end. How much of it is missing, its local headers may tell."""
    position = 0
    expected = 0
    for _ in range(1000):
        if position + _LOCAL.size > source.size:
            break
        signature, form, sums, name_size, extra_size = _LOCAL.unpack(source.read(position, _LOCAL.size))
        _, stored_size, size = _SUMS.unpack(sums)
        if signature != b"PK\x03\x04" or form & _HAS_DESCRIPTOR or _LIMIT32 in (stored_size, size):
            break
        position += _LOCAL.size + name_size + extra_size + stored_size
        expected = position
    needed = f" of at least {expected}" if expected > source.size else ""
    return incomplete(
        source.name,
        f"the file has {source.size} bytes{needed}, and the directory that ends a zip archive is not among them",
    )
