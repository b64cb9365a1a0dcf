"""What `open_checkpoint` takes, and what it says to everything else."""

from __future__ import annotations

import gc
import io
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from tests.unit.test_safetensors import dense
from torchload.errors import CheckpointFormatError, CheckpointNotFoundError, CorruptCheckpointError
from torchload.formats import open_checkpoint

WEIGHT = torch.arange(6.0)
DATA = save({"w": WEIGHT})


class Remote:
    """A stream as remote file systems give it: no descriptor, short reads, nothing but what is needed."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.closed_by_somebody = False

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, 7))

    def close(self) -> None:
        self.closed_by_somebody = True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"w": WEIGHT}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


class FsPath:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, FsPath, lambda path: [path], lambda path: (str(path),)])
def test_paths_of_every_kind(path: Path, kind: Any) -> None:
    with open_checkpoint(kind(path)) as checkpoint:
        assert torch.equal(dense(checkpoint.root["w"]), WEIGHT)
        assert checkpoint.path == str(path)


@pytest.mark.parametrize("kind", ["BytesIO", "buffered", "raw", "update", "temporary", "remote"])
def test_file_objects_are_read_from_where_they_stand_and_left_behind_that(path: Path, kind: str) -> None:
    with (
        tempfile.NamedTemporaryFile() as temporary,
        path.open("rb") as buffered,
        path.open("rb", 0) as raw,
        path.open("r+b") as update,
    ):
        temporary.write(b"header " + DATA)
        whole = b"header " + DATA
        path.write_bytes(whole)
        file: Any = {
            "BytesIO": io.BytesIO(whole), "buffered": buffered, "raw": raw, "update": update, "temporary": temporary,
            "remote": Remote(whole),
        }[kind]  # fmt: skip
        file.seek(7)
        with open_checkpoint(file) as checkpoint:
            assert torch.equal(dense(checkpoint.root["w"]), WEIGHT)
            assert file.tell() == len(whole)
        assert file.tell() == len(whole)
        assert not getattr(file, "closed", False)
        assert not getattr(file, "closed_by_somebody", False)


def test_an_open_checkpoint_outlives_its_file_object(path: Path) -> None:
    with path.open("rb") as file:
        checkpoint = open_checkpoint(file)
    assert torch.equal(dense(checkpoint.root["w"]), WEIGHT)
    checkpoint.close()
    file = io.BytesIO(DATA)
    checkpoint = open_checkpoint(file)
    file.truncate(0)
    assert torch.equal(dense(checkpoint.root["w"]), WEIGHT)


def test_a_compressing_file_object_is_read_through_not_around(tmp_path: Path) -> None:
    import gzip

    with gzip.open(tmp_path / "model.gz", "wb") as file:
        file.write(DATA)
    with gzip.open(tmp_path / "model.gz", "rb") as file, open_checkpoint(file) as checkpoint:
        assert torch.equal(dense(checkpoint.root["w"]), WEIGHT)


@pytest.mark.parametrize("value", [None, 3, b"model.pth", WEIGHT, object()], ids=lambda x: str(type(x)))
def test_anything_else_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint is a path"):
        open_checkpoint(value)


def test_a_text_file_object_is_a_type_error(path: Path) -> None:
    with path.open() as file, pytest.raises(TypeError, match="binary mode"):
        open_checkpoint(file)


@pytest.mark.parametrize("data", [io.BytesIO(), Remote(b"")], ids=["BytesIO", "remote"])
def test_an_empty_file_object_is_refused(data: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="empty"):
        open_checkpoint(data)


def test_a_stream_that_ends_early_is_refused() -> None:
    class Short(Remote):
        def read(self, count: int) -> bytes:
            return super().read(count) if self.tell() < 20 else b""

    with pytest.raises(CorruptCheckpointError, match="gave 0 bytes"):
        open_checkpoint(Short(DATA))


# ------------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("modl.safetensors", "Did you mean model.safetensors"),
        ("nothing/like/it.pth", "The folder .* does not exist either; .* does"),
        ("model.safetensors/inside", "does not exist"),
        ("x" * 300, "name is too long"),
        ("nul\0character", "NUL"),
    ],
)
def test_a_missing_path_is_answered_with_what_is_there(path: Path, name: str, expected: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=expected):
        open_checkpoint(path.parent / name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "path is empty"),
        ("~/model.pth", "'~' is not expanded"),
        ("https://example.com/model.pth", "is a URL"),
        ("no-such-file-anywhere.pth", "relative to"),
    ],
)
def test_paths_that_other_tools_understand_are_explained(name: str, expected: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=expected):
        open_checkpoint(name)


def test_an_unfinished_download_beside_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pth.crdownload").touch()
    with pytest.raises(
        CheckpointNotFoundError, match=r"model\.pth\.crdownload is there: its download has not finished"
    ):
        open_checkpoint(tmp_path / "model.pth")


def test_dangling_and_circular_links_are_named(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointNotFoundError, match="symbolic link to gone"):
        open_checkpoint(tmp_path / "dangling")
    with pytest.raises(CheckpointNotFoundError, match="leads back to itself"):
        open_checkpoint(tmp_path / "loop")


def test_an_empty_file_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "model.pth").touch()
    with pytest.raises(CorruptCheckpointError, match=r"0 bytes") as caught:
        open_checkpoint(tmp_path / "model.pth")
    assert caught.value.found == "empty file"


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, kind in [
            (tmp_path / "fifo", "FIFO"), (tmp_path / "socket", "socket"), ("/dev/null", "character device"),
            ("/dev/zero", "character device"),
        ]:  # fmt: skip
            with pytest.raises(CheckpointFormatError, match=kind):
                open_checkpoint(path)
    with pytest.raises(CorruptCheckpointError, match="0 bytes"):
        open_checkpoint("/proc/self/status")


def test_a_fifo_that_takes_a_files_place_is_refused_without_waiting(tmp_path: Path) -> None:
    from torchload.core.source import FileSource

    os.mkfifo(tmp_path / "fifo")
    before = open_files()
    with pytest.raises(CheckpointFormatError, match="not a regular file"):
        FileSource(tmp_path / "fifo")
    assert open_files() == before


# -------------------------------------------------------------------------------------------------- nothing is left


def test_no_descriptor_is_left_by_failure_or_close(path: Path) -> None:
    folder = path.parent
    bad = {
        "truncated": DATA[:-1],
        "text": b"hello",
        "empty": b"",
        "index.json": b'{"weight_map": {"w": "model.safetensors", "x": "truncated"}}',
        "wrong.json": b'{"weight_map": {"absent": "model.safetensors"}}',
        "lacking.json": b'{"weight_map": {"absent": "nowhere"}}',
    }
    gc.collect()
    before = open_files()
    for name, content in bad.items():
        (folder / name).write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            open_checkpoint(folder / name)
        assert open_files() == before, (name, caught.value)
    with pytest.raises(ValueError, match="incomplete"):
        open_checkpoint([path, folder / "truncated"])
    assert open_files() == before
    with path.open("rb") as file:
        open_checkpoint(file).close()
    open_checkpoint(path).close()
    open_checkpoint(folder).close()
    assert open_files() == before


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(path: Path, enabled: bool) -> None:
    try:
        gc.enable() if enabled else gc.disable()
        open_checkpoint(path).close()
        assert gc.isenabled() is enabled
        with pytest.raises(FileNotFoundError):
            open_checkpoint(path.parent / "gone")
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_every_row_of_the_tables_names_functions_that_are_there() -> None:
    """A reader is imported when a file needs it: a row that names none would show only then."""
    from torchload.formats import files
    from torchload.formats.files.archives import ARCHIVES

    for kind in files.FORMATS:
        for function in filter(None, (kind.function, kind.inside, kind.confirms)):
            assert callable(getattr(files.reader(kind.module), function)), (kind, function)
    for archive in ARCHIVES:
        assert callable(getattr(files.reader(archive.module), archive.function)), archive
