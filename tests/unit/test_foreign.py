"""Files that are no checkpoints are named for what they are."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import pickle
import re
import sqlite3
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchload.core.source import MemorySource
from torchload.errors import CheckpointFormatError, TorchLoadError
from torchload.formats import open_checkpoint
from torchload.formats.files import foreign

PAYLOAD = b"payload " * 200

LFS = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 102530333
"""


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("model.pth")
        member.size = len(PAYLOAD)
        archive.addfile(member, io.BytesIO(PAYLOAD))
    return file.getvalue()


def zipped(names: list[str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, PAYLOAD)
    return file.getvalue()


def numpy_array(value: Any = None) -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(4) if value is None else np.array(value, dtype=object))
    return file.getvalue()


def headless_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/data.pkl", PAYLOAD)
    return b"<html>" + file.getvalue()[6:]


def database() -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("create table t (x)")
        return connection.serialize() if sys.version_info >= (3, 11) else b"SQLite format 3\0" + b"\0" * 4080


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return bytes([number << 3 | 2, len(content)]) + content


def onnx_model() -> bytes:
    return b"\x08\x0a" + field(2, b"pytorch") + field(3, b"2.4.0") + field(7, b"\x12\x04main")


def flax_weights() -> bytes:
    return b"\x81\xa6params\x81\xa5Dense\x82\xa6kernel\xc7\x10\x01" + b"\x93" * 16 + b"\xa4bias\xc0"


# One row per row of `foreign.KINDS`, and more where a row has several forms: what the file holds, what it is called,
# and what the message must tell.
CASES: list[tuple[str, bytes, str, str]] = [
    ("lfs", LFS.encode(), "git-lfs pointer", "97.8 MiB.*sha256:4d7a21.*git lfs pull"),
    ("lfs-small", b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "git-lfs pointer", "12 B"),
    ("annex", b"/annex/objects/MD5E-s123--abc.pth\n", "git-annex pointer", "git annex get"),
    ("html", b"<!DOCTYPE html>\n<html><head><title>404  Not\nFound</title>", "HTML page", "'404 Not Found'"),
    ("html-bom", b"\xef\xbb\xbf\r\n<HTML><body>Sign in", "HTML page", "Download the file again"),
    ("xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML document", "'AccessDenied'"),
    ("gzip", gzip.compress(PAYLOAD), "gzip file", "Unpack it"),
    ("gzip-tar", gzip.compress(tarred()), "gzip file", "of a tar archive"),
    ("gzip-zip", gzip.compress(zipped(["archive/data.pkl"])), "gzip file", "of a zip file, perhaps of a checkpoint"),
    ("gzip-pickle", gzip.compress(pickle.dumps([1])), "gzip file", "of a pickle"),
    ("bzip2", bz2.compress(tarred()), "bzip2 file", "of a tar archive"),
    ("xz", lzma.compress(tarred()), "xz file", "of a tar archive"),
    ("zstd", b"\x28\xb5\x2f\xfd\x04\x58" + PAYLOAD, "Zstandard file", "Unpack it"),
    ("lz4", b"\x04\x22\x4d\x18\x64\x40" + PAYLOAD, "LZ4 file", "Unpack it"),
    ("7z", b"7z\xbc\xaf\x27\x1c\0\x04" + PAYLOAD, "7-Zip archive", "Unpack it"),
    ("rar", b"Rar!\x1a\x07\x01\0" + PAYLOAD, "RAR archive", "Unpack it"),
    ("tar", tarred(), "tar archive", "Unpack it"),
    ("zip-empty", zipped([]), "empty zip archive", "Download"),
    ("zip-split", b"PK\x07\x08PK\x03\x04" + PAYLOAD, "part of a split zip archive", "Join"),
    ("gguf", b"GGUF\x03\0\0\0" + PAYLOAD, "GGUF file", "llama.cpp"),
    ("ggml", b"lmgg" + PAYLOAD, "GGML file", "whisper.cpp"),
    ("hdf5", b"\x89HDF\r\n\x1a\n\0" + PAYLOAD, "HDF5 file", "Keras"),
    ("tflite", b"\x1c\0\0\0TFL3" + PAYLOAD, "TensorFlow Lite model", "another framework"),
    ("savedmodel", b"\x08\x01\x12\x90\x4e\x0a" + PAYLOAD, "TensorFlow SavedModel", "another framework"),
    ("onnx", onnx_model(), "ONNX model", "PyTorch file it was exported from"),
    ("tf-index", b"\0\0\x08\x01" + PAYLOAD + struct.pack("<Q", 0xDB4775248B80FB57), "TensorFlow checkpoint index",
     "another framework"),
    ("mxnet", struct.pack("<QQ", 0x112, 0) + PAYLOAD, "MXNet parameter file", "another framework"),
    ("torch7", struct.pack("<iii", 4, 1, 3) + b"V 1" + PAYLOAD, "Lua Torch7 file", "another framework"),
    ("npy", numpy_array(), "numpy array", "numpy.load"),
    ("npy", numpy_array({"w": np.ones(3)}), "numpy file of a pickled object", "numpy.savez"),
    ("pth", headless_zip(), "zip archive whose beginning is damaged or was replaced", "Download or copy it again"),
    ("mat", b"MATLAB 5.0 MAT-file, Platform: GLNXA64", "MATLAB file", "Check the path"),
    ("png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG image", "Check the path"),
    ("jpeg", b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG image", "Check the path"),
    ("gif", b"GIF89a\x01\0\x01\0", "GIF image", "Check the path"),
    ("pdf", b"%PDF-1.7\n%\xe2\xe3", "PDF document", "Check the path"),
    ("riff", b"RIFF\x24\0\0\0WAVE", "RIFF file (WebP, WAV or AVI)", "Check the path"),
    ("elf", Path(sys.executable).resolve().read_bytes()[:4096], "program or library (ELF)", "Check the path"),
    ("exe", b"MZ\x90\0\x03\0", "Windows program or library", "Check the path"),
    ("sqlite", database(), "SQLite database", "Check the path"),
    ("parquet", b"PAR1\x15\x04" + PAYLOAD, "Parquet file", "Check the path"),
    ("arrow", b"ARROW1\0\0" + PAYLOAD, "Arrow file", "Check the path"),
    ("flax", flax_weights(), "msgpack file (Flax)", "another framework"),
    ("zeros", b"\0" * 100_000, "filled with zeros", "never arrived"),
    ("json", json.dumps({"hidden_size": 64}).encode(), "JSON file", "the file that holds the weights"),
    ("json-error", b'{"error": "Repository not found"}', "JSON file", "'Repository not found'"),
    ("json-list", b' [{"id": 1}]', "JSON file", "the file that holds the weights"),
    ("text", "Entry not found – é\n".encode(), "text file", "'Entry not found – é'"),
    ("text-cut", ("x" * 4095 + "é" * 10).encode(), "text file", "xxx"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "found", "message"), CASES, ids=[case[0] for case in CASES])
def test_a_file_is_named_for_what_it_is(tmp_path: Path, name: str, content: bytes, found: str, message: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=f"(?s){message}") as caught:
        open_checkpoint(path)
    assert caught.value.found == found
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)


ZIPS = {
    "Keras model": ["metadata.json", "config.json", "model.weights.h5"],
    "stable-baselines3 agent": ["data", "policy.pth", "_stable_baselines3_version"],
    "TorchScript archive of torch < 1.4": ["m/version", "m/code/m.py", "m/model.json", "m/tensors/0"],
    "office document": ["[Content_Types].xml", "word/document.xml"],
    "Java archive or Android package": ["META-INF/MANIFEST.MF", "A.class"],
    "Python package": ["p/__init__.py", "p-1.dist-info/METADATA"],
    "zip archive with checkpoints inside": ["run/epoch=3.ckpt", "run/log.txt"],
    "zip archive": ["something/else"],
}


@pytest.mark.parametrize("found", ZIPS)
def test_a_zip_archive_is_named_by_what_it_holds(tmp_path: Path, found: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(zipped(ZIPS[found]))
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path)
    assert caught.value.found == found


def test_every_row_has_a_case() -> None:
    tested = {found for _, _, found, _ in CASES}
    assert tested == {re.sub("^an? ", "", kind.found) for kind in foreign.KINDS}


def test_unknown_bytes_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"\xfe\xed\xfa\xce" * 100)
    with pytest.raises(CheckpointFormatError, match=r"400 bytes.*fe ed fa ce") as caught:
        open_checkpoint(path)
    assert caught.value.found is None


def test_zeros_at_the_beginning_are_not_taken_for_an_empty_download() -> None:
    data = b"\0" * 200_000 + b"\x01" * 200_000
    assert foreign.describe(MemorySource(data), data[:4096], "x").found is None


def test_unfinished_downloads_are_told_by_their_name_or_their_neighbour(tmp_path: Path) -> None:
    (tmp_path / "model.pth.part").write_bytes(b"\0" * 5000)
    with pytest.raises(CheckpointFormatError, match="By its name it is a download that has not finished"):
        open_checkpoint(tmp_path / "model.pth.part")
    (tmp_path / "model.pth").write_bytes(b"\0" * 5000)
    with pytest.raises(CheckpointFormatError, match=r"model\.pth\.part beside it"):
        open_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0"])
def test_a_damaged_compressed_file_is_still_named(magic: bytes) -> None:
    content = magic + b"\xff" * 100
    assert "not a checkpoint" in str(foreign.describe(MemorySource(content), content, "x"))


def test_a_page_of_text_makes_a_short_message() -> None:
    for content in (b"<html><title>" + b"x" * 4000 + b"</title>", b"y" * 4000, b'{"error": "' + b"z" * 4000 + b'"}'):
        assert len(str(foreign.describe(MemorySource(content), content, "x"))) < 400


@given(st.binary(max_size=300))
def test_law_any_bytes_end_in_a_torchload_error(content: bytes) -> None:
    with pytest.raises(TorchLoadError):
        open_checkpoint(io.BytesIO(content))


@given(st.sampled_from([case[1][:2000] for case in CASES]), st.data())
def test_law_any_damaged_file_ends_in_a_torchload_error(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged) - 1, 64)))] = data.draw(st.integers(0, 255))
    with pytest.raises(TorchLoadError):
        open_checkpoint(io.BytesIO(bytes(damaged)))


def test_the_content_behind_a_link_is_not_quoted(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a password: hunter2\n")
    (tmp_path / "model.pth").symlink_to(secret)
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(str(tmp_path / "model.pth"))
    assert "a text file, not a checkpoint" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    secret.write_bytes(b"\xfe\xed secret")
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(str(tmp_path / "model.pth"))
    assert "fe ed" not in str(caught.value)
    with pytest.raises(CheckpointFormatError, match="fe ed"):
        open_checkpoint(str(secret))
