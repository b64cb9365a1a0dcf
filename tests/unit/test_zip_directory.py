from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchload.core.source import FileSource, MemorySource
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats.files.zip_directory import DEFLATED, STORED, read_directory

names = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=30)


@given(st.dictionaries(names, st.binary(max_size=3000), max_size=20), st.sampled_from([STORED, DEFLATED]))
def test_whatever_zipfile_writes_is_read(files: dict[str, bytes], method: int) -> None:
    files = {name: data for name, data in files.items() if zipfile.ZipInfo(name).filename == name}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    directory = read_directory(MemorySource(buffer.getvalue()))
    assert list(directory.records) == list(files)
    for name, data in files.items():
        assert directory.read(name) == data
        assert directory.records[name].size == len(data)
        assert directory.records[name].method == method


class Unseekable(io.RawIOBase):
    """Makes zipfile write descriptors behind the data."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, piece: object) -> int:
        self.data += bytes(piece)  # type: ignore[call-overload]
        return len(bytes(piece))  # type: ignore[call-overload]


@pytest.mark.parametrize("force_zip64", [False, True])
def test_sizes_behind_the_data_and_wide_sizes(force_zip64: bool) -> None:
    for stream in (io.BytesIO(), Unseekable()):
        with zipfile.ZipFile(stream, "w") as archive:  # type: ignore[arg-type]
            for number in range(3):
                with archive.open(f"top/{number}", "w", force_zip64=force_zip64) as record:
                    record.write(b"x" * 100 * number)
        data = stream.getvalue() if isinstance(stream, io.BytesIO) else bytes(stream.data)
        directory = read_directory(MemorySource(data))
        assert [directory.read(name) for name in directory.records] == [b"", b"x" * 100, b"x" * 200]


def test_where_torch_says_a_record_is_there_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt")
    torch.save([torch.rand(size) for size in (1, 10, 5000, 100_000)] + [torch.rand(3)] * 50, path)
    directory = read_directory(FileSource(path))
    reader = torch._C.PyTorchFileReader(path)
    assert {name.partition("/")[2] for name in directory.records} == set(reader.get_all_records())
    for name, record in directory.records.items():
        assert record.offset == reader.get_record_offset(name.partition("/")[2])


def test_a_comment_may_hold_the_signature() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"data")
        archive.comment = b"PK\x05\x06 and more PK\x05\x06"
    assert read_directory(MemorySource(buffer.getvalue())).read("a") == b"data"


def test_checksums_are_checked_where_there_are_any() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"data")
    data = buffer.getvalue()
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        read_directory(MemorySource(data.replace(b"data", b"dbta"))).read("a")


def test_records_tile_the_archive() -> None:
    stream = Unseekable()
    with zipfile.ZipFile(stream, "w") as archive:  # type: ignore[arg-type]
        archive.writestr("a", b"one")
    one = bytes(stream.data)
    central = one.index(b"PK\x01\x02")
    gap = bytes(5000)
    end = bytearray(one[-22:])
    end[16:20] = (central + len(gap)).to_bytes(4, "little")
    data = one[:central] + gap + one[central:-22] + bytes(end)
    with pytest.raises(CorruptCheckpointError, match="behind its data"):
        read_directory(MemorySource(data))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"PK 16 bytes long")
        archive.writestr("b", b"two")
    whole = bytearray(buffer.getvalue())
    whole[28:30] = (8).to_bytes(2, "little")  # 'a' begins 8 bytes later, by its own header alone
    with pytest.raises(CorruptCheckpointError, match="overlaps"):
        read_directory(MemorySource(bytes(whole)))


@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_a_gap_that_no_record_speaks_of_is_refused(at: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"one")
        archive.writestr("b", b"two")
        records = [record.header_offset for record in archive.infolist()]
    whole = buffer.getvalue()
    central = whole.index(b"PK\x01\x02")
    position = {"before": 0, "between": records[1], "after": central}[at]
    moved = bytearray(whole[:position] + bytes(5) + whole[position:])
    for entry in (moved.index(b"PK\x01\x02"), moved.rindex(b"PK\x01\x02")):
        offset = int.from_bytes(moved[entry + 42 : entry + 46], "little")
        moved[entry + 42 : entry + 46] = (offset + 5 * (offset >= position)).to_bytes(4, "little")
    moved[-6:-2] = (central + 5).to_bytes(4, "little")
    with pytest.raises(CorruptCheckpointError, match="nothing says what the 5 bytes before"):
        read_directory(MemorySource(bytes(moved)))


def test_encrypted_and_oddly_compressed_archives_are_named() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", b"data")
    with pytest.raises(CheckpointFormatError, match="method 12") as caught:
        read_directory(MemorySource(buffer.getvalue()))
    assert caught.value.found == "compressed zip archive"
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("a", b"data")
    data = bytearray(plain.getvalue())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(CheckpointFormatError, match="encrypted"):
        read_directory(MemorySource(bytes(data)))


def test_an_empty_archive_has_no_records() -> None:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    assert read_directory(MemorySource(buffer.getvalue())).records == {}


@pytest.mark.parametrize("change", [b"PK\x07\x09", b"\0\0\0\0"], ids=["signature", "checksum"])
def test_descriptors_are_compared_with_the_directory(change: bytes) -> None:
    stream = Unseekable()
    with zipfile.ZipFile(stream, "w") as archive:  # type: ignore[arg-type]
        for name in ("a", "b"):
            archive.writestr(name, b"data" + name.encode())
    whole = bytes(stream.data)
    first, last = whole.index(b"PK\x07\x08"), whole.rindex(b"PK\x07\x08")
    assert list(read_directory(MemorySource(whole)).records) == ["a", "b"]
    for descriptor in (first, last):
        at = descriptor if change.startswith(b"PK") else descriptor + 4
        damaged = whole[:at] + change + whole[at + 4 :]
        with pytest.raises(CorruptCheckpointError, match="another size or checksum behind its data"):
            read_directory(MemorySource(damaged))
