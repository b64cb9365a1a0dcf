"""What a zip archive says of its records, twice: in the directory at its end and in a header beside each of them.

Readers that believe different copies see different archives, so both are compared here and any difference is refused,
as are records that overlap, names that occur twice, and bytes that nothing speaks of.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import NamedTuple

from torchload.core.source import Source
from torchload.core.text import plural
from torchload.errors import GET_IT_AGAIN, CheckpointFormatError, CorruptCheckpointError, damaged, incomplete

__all__ = ["DEFLATED", "END", "STORED", "ZipBytes", "ZipRecord", "central_rows", "find_central", "located"]

STORED, DEFLATED = 0, 8

END = struct.Struct("<4s4H2LH")
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


class ZipBytes:
    """An archive whose last 64 KiB were read at once: of a small file, all. Opening one then takes 2 reads, not 15."""

    __slots__ = ("_start", "_tail", "name", "size", "source")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = source.name
        self.size = source.size
        self._start = max(source.size - END.size - _LIMIT16, 0)
        self._tail = source.read(self._start, source.size - self._start)

    def read(self, offset: int, size: int) -> bytes:
        """As `Source.read`."""
        at = offset - self._start
        return self._tail[at : at + size] if 0 <= at <= len(self._tail) - size else self.source.read(offset, size)

    def end_position(self) -> tuple[int, int]:
        """Where the record that ends the archive is, and where the archive ends; -1 twice where there is none."""
        tail, last = self._tail, (-1, -1)
        position = tail.rfind(b"PK\x05\x06")
        while position >= 0:
            end = position + END.size + int.from_bytes(tail[position + END.size - 2 : position + END.size], "little")
            if end == len(tail):  # a comment may contain the signature; this one's comment ends with the file
                return position + self._start, self.size
            if end < len(tail) and last[0] < 0:
                last = position + self._start, end + self._start
            position = tail.rfind(b"PK\x05\x06", 0, position)
        return last


def find_central(source: ZipBytes) -> tuple[int, int, int]:
    """Number of records, and position and length of the central directory in bytes."""
    end_position, end = source.end_position()
    if end_position < 0:
        raise _incomplete(source)
    _, disk, central_disk, disk_count, count, size, offset, _ = END.unpack(source.read(end_position, END.size))
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
    if end < source.size:
        raise CorruptCheckpointError(
            f"{source.name} has {plural(source.size - end, 'byte')} behind the end of its zip archive. {GET_IT_AGAIN} "
            f"If they are no part of it, as a line end or padding is, cut them off: truncate -s {end}",
            path=source.name,
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


def central_rows(source: ZipBytes, central: bytes, count: int) -> list[_Row]:
    """What the central directory says of each record."""
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


def _check_readable(source: ZipBytes, name: str, form: int, disk: int, same_size: bool) -> None:
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


def _wide(source: ZipBytes, extra: bytes, *narrow: int) -> tuple[int, ...]:
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


def located(source: ZipBytes, rows: list[_Row], limit: int) -> dict[str, ZipRecord]:
    """The records, in the order of their headers, with the position of their data, each compared with its header.

    Records follow one another without a gap, from the beginning of the archive to its directory: where data begins,
    only the local header says, and whoever could choose that freely could show other bytes than those that were meant.
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


def _owes_descriptor(source: ZipBytes, row: _Row, local_sums: bytes, extra: int, extra_size: int) -> bool:
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


def _check_descriptor(source: ZipBytes, row: _Row, found: bytes) -> None:
    """What stands behind the data of a record must say what the central directory says."""
    # Writers use the wide form for whatever lies beyond 4 GiB, too.
    if found != _DESCRIPTOR + row[4] and found != _DESCRIPTOR + _WIDE_SUMS.pack(*row[5:]):
        raise damaged(source.name, f"its record {row[1]!r} has another size or checksum behind its data")


def _incomplete(source: ZipBytes) -> CorruptCheckpointError:
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
