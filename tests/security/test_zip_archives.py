"""Archives that two readers would read differently, and archives that were damaged, are refused."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.security._hostile import contained
from torchload.core.source import FileSource, MemorySource
from torchload.errors import CorruptCheckpointError, TorchLoadError
from torchload.formats.files import archives
from torchload.formats.files.zip_directory import read_directory


@cache
def saved() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.ones(40), "c": {"d": "text"}}, file)
    return file.getvalue()


def plain(**files: bytes) -> bytearray:
    """An archive as zipfile writes it: sizes in the local headers, no zip64."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return bytearray(buffer.getvalue())


def open_bytes(data: bytes) -> object:
    return archives.open(MemorySource(bytes(data)), "hostile.pt")


def put(data: bytearray, position: int, layout: str, value: int) -> bytearray:
    changed = bytearray(data)
    struct.pack_into("<" + layout, changed, position, value)
    return changed


LOCAL_FIELDS = {"flags": (6, "H"), "method": (8, "H"), "crc": (14, "L"), "packed": (18, "L"), "size": (22, "L")}
CENTRAL_FIELDS = {"flags": (8, "H"), "method": (10, "H"), "crc": (16, "L"), "packed": (20, "L"), "size": (24, "L")}
OTHER_CENTRAL_FIELDS = {
    "disk": (34, "H"),
    "header": (42, "L"),
    "name": (28, "H"),
    "extra": (30, "H"),
    "note": (32, "H"),
}
END_FIELDS = {
    "disk": (4, "H"),
    "start": (6, "H"),
    "here": (8, "H"),
    "all": (10, "H"),
    "size": (12, "L"),
    "at": (16, "L"),
}


@pytest.mark.parametrize("delta", [1, 7, 0x100, 0xFF00])
@pytest.mark.parametrize(
    ("signature", "field"),
    [
        *((b"PK\x03\x04", field) for field in LOCAL_FIELDS.values()),
        *((b"PK\x01\x02", field) for field in (CENTRAL_FIELDS | OTHER_CENTRAL_FIELDS).values()),
        *((b"PK\x05\x06", field) for field in END_FIELDS.values()),
    ],
)
def test_one_field_that_says_otherwise_is_found(signature: bytes, field: tuple[int, str], delta: int) -> None:
    data = plain(one=b"first data", two=b"second data")
    position = data.index(signature) + field[0]
    (value,) = struct.unpack_from("<" + field[1], data, position)
    changed = put(data, position, field[1], (value + delta) % (1 << 8 * struct.calcsize("<" + field[1])))
    with pytest.raises(TorchLoadError):
        read_all(changed)


def read_all(data: bytes) -> list[bytes]:
    directory = read_directory(MemorySource(bytes(data)))
    return [directory.read(name) for name in directory.records]


def test_a_name_twice_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("top/data.pkl", b"N.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("top/data.pkl", b"K\x01.")
    with pytest.raises(CorruptCheckpointError, match="two records"):
        open_bytes(buffer.getvalue())


def test_another_name_in_its_own_header_is_refused() -> None:
    data = plain(**{"top/data.pkl": b"N."})
    data[30 : 30 + 3] = b"pot"
    with pytest.raises(CorruptCheckpointError, match="its own header"):
        open_bytes(data)


def test_two_records_over_the_same_bytes_are_refused() -> None:
    data = plain(one=b"data", two=b"data")
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    with pytest.raises(CorruptCheckpointError, match="overlaps|own header"):
        read_directory(MemorySource(bytes(put(data, second + 42, "L", 0))))
    # A record within another one's data.
    inner = plain(two=b"data")
    outer = plain(one=bytes(inner[: inner.index(b"PK\x01\x02")]), two=b"data")
    second = outer.rindex(b"PK\x01\x02")
    with pytest.raises(CorruptCheckpointError, match="overlaps"):
        read_directory(MemorySource(bytes(put(outer, second + 42, "L", 33))))


def test_bytes_before_or_behind_the_archive_are_refused() -> None:
    for data in (b"#!/bin/sh\n" + saved(), saved() + b"x", saved() + bytes(70_000), saved() + saved()):
        with pytest.raises(CorruptCheckpointError):
            open_bytes(data)


def test_two_end_records_that_disagree_are_refused() -> None:
    data = bytearray(saved())
    end = data.rindex(b"PK\x05\x06")
    for offset, layout in END_FIELDS.values():
        (value,) = struct.unpack_from("<" + layout, data, end + offset)
        with pytest.raises(TorchLoadError):
            open_bytes(put(data, end + offset, layout, value + 1))


def test_a_wide_end_record_elsewhere_is_refused() -> None:
    data = bytearray(saved())
    locator = data.rindex(b"PK\x06\x07")
    for position in (0, 10, len(data) - 30, 1 << 40, (1 << 64) - 1):
        with pytest.raises(TorchLoadError):
            open_bytes(put(data, locator + 8, "Q", position))


@pytest.mark.parametrize("value", [0, 1, 0xFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1])
@pytest.mark.parametrize("offset", [4, 24, 32, 40, 48])
def test_wide_end_records_with_impossible_values_are_refused(offset: int, value: int) -> None:
    data = bytearray(saved())
    with pytest.raises(TorchLoadError):
        open_bytes(put(data, data.rindex(b"PK\x06\x06") + offset, "Q", value))


def test_every_truncation_is_found() -> None:
    data = saved()
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError, match="incomplete" if length > 200 else None):
            open_bytes(data[:length])


def test_a_truncated_archive_says_how_much_is_missing() -> None:
    data = bytes(plain(**{"top/data.pkl": b"N.", "top/data/0": bytes(5000)}))
    with pytest.raises(CorruptCheckpointError, match="has 1000 bytes of at least 5"):
        open_bytes(data[:1000])


def test_every_flipped_bit_outside_tensor_data_is_found_or_means_nothing() -> None:
    """What the file says stays the same, or it is refused: never silently something else."""
    data = saved()
    expected = described(open_bytes(data))
    chooser = random.Random(0)
    directory = read_directory(MemorySource(data))
    tensors = [record for name, record in directory.records.items() if "/data/" in name and ".data" not in name]
    silent = 0
    for _ in range(4000):
        position = chooser.randrange(len(data))
        if any(record.offset <= position < record.offset + record.size for record in tensors):
            continue
        changed = bytearray(data)
        changed[position] ^= 1 << chooser.randrange(8)
        try:
            found = described(open_bytes(changed))
        except TorchLoadError:
            continue
        silent += 1
        assert found == expected
    assert silent > 0  # padding, dates and versions


def described(checkpoint: object) -> object:
    def walk(value: object) -> object:
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        if hasattr(value, "boxes"):
            return value.dtype, [(box.extent.offset, box.extent.crc32, box.start, box.shape) for box in value.boxes]
        return value

    return walk(checkpoint.root)  # type: ignore[attr-defined]


def test_inflating_is_bounded() -> None:
    def bomb(size: int, declared: int | None = None) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("top/data.pkl", bytes(size))
        data = bytearray(buffer.getvalue())
        if declared is not None:
            put_into = (22, data.index(b"PK\x01\x02") + 24)
            for position in put_into:
                struct.pack_into("<L", data, position, declared)
        return bytes(data)

    cases = [("more memory", bomb(100 << 20)), ("inflate", bomb(100 << 20, 1000)), ("inflate", bomb(1000, 5000))]
    for what, data in cases:
        assert what in contained(lambda data=data: open_bytes(data))  # type: ignore[misc]


def _directory_of(count: int, size: int) -> bytes:
    """An end record that promises this much directory, before it nothing."""
    return b"PK\x03\x04" + bytes(26) + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, 30, 0)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "directory that isn't there": lambda: _directory_of(10, 1 << 31),
    "directory of zeros": lambda: b"PK\x03\x04" + bytes(26 + 46 * 100) + struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, 100, 100, 4600, 30, 0),
    "more records than bytes": lambda: _directory_of(0xFFFE, 0),
    "only end records": lambda: b"PK\x05\x06" * 100_000,
    "end records with comments": lambda: struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 9) * 50_000,
    "only local headers": lambda: plain(a=b"")[:31] * 100_000,
    "many empty records": lambda: bytes(plain(**{f"top/{number}": b"" for number in range(20_000)})),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_directories_end_soon(name: str) -> None:
    data = HOSTILE[name]()
    assert contained(lambda: open_bytes(data)) != "done"


def test_a_sparse_giant_takes_no_memory(tmp_path: object) -> None:
    path = f"{tmp_path}/giant.pt"
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        size = 1 << 40
        end64 = size - 98
        file.truncate(size)
        file.seek(end64)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 30, 1 << 30, end64 - 100, 100))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end64, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    outcome = contained(lambda: archives.open(FileSource(path), path))
    assert "directory" in outcome


def test_random_damage_raises_nothing_else() -> None:
    data = saved()
    chooser = random.Random(1)
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(chooser.randint(1, 6)):
            start = chooser.randrange(len(changed))
            kind = chooser.randrange(4)
            if kind == 0:
                changed[start] = chooser.randrange(256)
            elif kind == 1:
                del changed[start : start + chooser.randrange(1, 40)]
            elif kind == 2:
                changed[start:start] = changed[chooser.randrange(len(changed)) :][: chooser.randrange(1, 40)]
            else:
                changed[start : start + 4] = struct.pack("<L", chooser.choice([0, 0xFFFFFFFF, 1 << 31]))
        try:
            open_bytes(changed)
        except TorchLoadError:
            continue
