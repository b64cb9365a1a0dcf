from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from tests.unit.entries import assert_holds
from torchload.core.source import FileSource, MemorySource
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats.files import archives
from torchload.formats.files.zip_directory import STORED

VALUE = {"model": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}, "epoch": 3}


def saved(value: object = VALUE) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def repacked(data: bytes, changes: dict[str, bytes | None], method: int = STORED) -> bytes:
    """The same archive with some records replaced (or left out), by what follows the top folder."""
    original, result = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(result, "w", method) as archive:
        for name in original.namelist():
            content = changes.get(name.partition("/")[2], original.read(name))
            if content is not None:
                archive.writestr(name, content)
    return result.getvalue()


def test_an_ordinary_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(saved())
    with archives.open(FileSource(path), str(path)) as checkpoint:
        assert checkpoint.format == "zip checkpoint"
        assert checkpoint.path == str(path)
        assert checkpoint.checksums
        assert_holds(checkpoint.root, VALUE)
        extent = checkpoint.root["model"]["weight"].boxes[0].extent
        assert extent.offset % 64 == 0
        assert extent.crc32 is not None


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"large": torch.ones(4 << 20)}, path)
    read: list[int] = []

    class Counting(FileSource):
        def readinto(self, offset: int, buffer: memoryview) -> None:
            read.append(len(buffer))
            super().readinto(offset, buffer)

    archives.open(Counting(path), str(path))
    assert sum(read) < 1 << 20


def test_a_small_file_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(3), "bias": torch.ones(2)}, path)
    read: list[int] = []

    class Counting(FileSource):
        def readinto(self, offset: int, buffer: memoryview) -> None:
            read.append(len(buffer))
            super().readinto(offset, buffer)

    assert list(archives.open(Counting(path), str(path)).root) == ["weight", "bias"]
    assert len(read) == 1


def test_checksums_that_were_not_computed_say_nothing() -> None:
    options = getattr(torch.serialization, "set_crc32_options", None)
    if options is None:
        pytest.skip("this torch always computes checksums")
    options(False)
    try:
        data = saved()
    finally:
        options(True)
    checkpoint = archives.open(MemorySource(data), "test.pt")
    assert not checkpoint.checksums
    assert checkpoint.root["model"]["weight"].boxes[0].extent.crc32 is None
    assert_holds(checkpoint.root, VALUE)


def test_an_archive_of_another_byte_order() -> None:
    weight = VALUE["model"]["weight"]  # type: ignore[index]
    swapped = weight.numpy().astype(">f4").tobytes()
    data = repacked(saved({"weight": weight}), {"byteorder": b"big", "data/0": swapped})
    root = archives.open(MemorySource(data), "test.pt").root
    assert root["weight"].boxes[0].extent.big_endian
    assert_holds(root, {"weight": weight})
    without = archives.open(MemorySource(repacked(saved(), {"byteorder": None})), "test.pt").root
    assert not without["model"]["weight"].boxes[0].extent.big_endian
    with pytest.raises(CorruptCheckpointError, match="byte order"):
        archives.open(MemorySource(repacked(saved(), {"byteorder": b"middle"})), "test.pt")


def test_an_archive_that_was_packed_again() -> None:
    root = archives.open(MemorySource(repacked(saved(), {})), "test.pt").root
    assert_holds(root, VALUE)
    packed = archives.open(MemorySource(repacked(saved(), {}, zipfile.ZIP_DEFLATED)), "test.pt").root
    assert_holds(packed, VALUE)
    no_tensors = repacked(saved({"epoch": 3}), {}, zipfile.ZIP_DEFLATED)
    assert archives.open(MemorySource(no_tensors), "test.pt").root == {"epoch": 3}


def test_storages_that_are_missing_or_of_another_size() -> None:
    with pytest.raises(CorruptCheckpointError, match="storage '0'"):
        archives.open(MemorySource(repacked(saved(), {"data/0": None})), "test.pt")
    for content in (b"short", bytes(1000)):
        with pytest.raises(CorruptCheckpointError, match="should have 24 bytes"):
            archives.open(MemorySource(repacked(saved(), {"data/0": content})), "test.pt")


def test_other_archives_are_named() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    with pytest.raises(CheckpointFormatError, match=r"word/document\.xml") as caught:
        archives.open(MemorySource(buffer.getvalue()), "letter.docx")
    assert caught.value.found == "zip archive"
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(CheckpointFormatError, match="empty"):
        archives.open(MemorySource(empty.getvalue()), "empty.zip")


def test_two_pickles_are_one_too_many() -> None:
    data = io.BytesIO(saved())
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("other/data.pkl", b"N.")
    with pytest.raises(CheckpointFormatError, match="2 records named"):
        archives.open(MemorySource(data.getvalue()), "test.pt")
