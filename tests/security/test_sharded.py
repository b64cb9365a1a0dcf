"""Index files and folders that are made to do harm."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tests.security._handmade import write
from torchload.core.checkpoint import Region
from torchload.errors import (
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    TorchLoadError,
)
from torchload.formats import open_checkpoint
from torchload.formats.sets.tiling import tiles

SECRET = save({"secret": torch.ones(1)})


def index(folder: Path, content: Any) -> str:
    text = content if isinstance(content, (bytes, str)) else json.dumps(content)
    return write(folder / "model" / "model.safetensors.index.json", text)


OUTSIDE = [
    "../secret.safetensors", "..", ".", "", "/etc/hostname", "//etc/hostname", "a/../../secret.safetensors",
    "./../secret.safetensors", "./secret.safetensors", "sub/../secret.safetensors", "sub//secret.safetensors", "sub/",
    "..\\secret.safetensors", "C:\\secret.safetensors", "C:secret.safetensors", "\\\\server\\share\\x",
    "file:///etc/hostname", "secret.safetensors\0", "secret\n.safetensors", "\u202esecret", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_folder_are_refused_unopened(tmp_path: Path, name: str) -> None:
    write(tmp_path / "secret.safetensors", SECRET)
    (tmp_path / "model" / "sub").mkdir(parents=True)
    write(tmp_path / "model" / "secret.safetensors", SECRET)
    path = index(tmp_path, {"weight_map": {"secret": name}})
    for target in (path, os.path.dirname(path)):
        with pytest.raises(CorruptCheckpointError, match="not a plain file name") as caught:
            open_checkpoint(target)
        assert len(str(caught.value)) < 2000


def test_an_absolute_name_of_an_existing_checkpoint_is_refused(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret.safetensors", SECRET)
    with pytest.raises(CorruptCheckpointError, match="not a plain file name"):
        open_checkpoint(index(tmp_path, {"weight_map": {"secret": secret}}))


def test_a_linked_folder_inside_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "outside" / "secret.safetensors", SECRET)
    path = index(tmp_path, {"weight_map": {"secret": "inside/secret.safetensors"}})
    (tmp_path / "model" / "inside").symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptCheckpointError, match="link to another folder"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", [None, 3, ["a"], {"a": 1}, True])
def test_names_that_are_no_text_are_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="the file of tensor 'w' is not text"):
        open_checkpoint(index(tmp_path, {"weight_map": {"w": name}}))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"weight_map": {}}, "lists no tensors"),
        ({"weight_map": []}, "JSON file"),
        ({"weight_map": "x"}, "JSON file"),
        ({"metadata": {}}, "JSON file"),
        ('{"weight_map": {"w": "a", "w": "b"}}', "'w' twice"),
        ('{"weight_map": {"w": "a"}, "weight_map": {}}', "'weight_map' twice"),
        ('{"weight_map": {"w": "a"', "valid JSON"),
        ('{"weight_map": ' + '{"a":' * 50_000, "nested too deep"),
        (b'{"weight_map": {"\xff": "a"}}', "not UTF-8"),
        ('{"weight_map": [' + "{}," * 4_000_000 + "]}", "values"),
    ],
)
def test_an_index_must_be_strict_json(tmp_path: Path, content: Any, expected: str) -> None:
    with pytest.raises(CheckpointFormatError, match=expected):
        open_checkpoint(index(tmp_path, content))


def test_a_giant_index_is_refused_unread(tmp_path: Path) -> None:
    path = index(tmp_path, '{"weight_map": {')
    os.truncate(path, 2**40)
    with pytest.raises(CorruptCheckpointError, match="no index of shards is"):
        open_checkpoint(path)


def test_an_index_that_names_itself_or_another_index_does_not_recurse(tmp_path: Path) -> None:
    path = index(tmp_path, {"weight_map": {"w": "model.safetensors.index.json"}})
    with pytest.raises(TorchLoadError):
        open_checkpoint(path)
    other = {"weight_map": {"w": "model.safetensors.index.json"}}
    write(tmp_path / "model" / "other.index.json", json.dumps(other))
    index(tmp_path, {"weight_map": {"w": "other.index.json"}})
    with pytest.raises(TorchLoadError):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device", "text", "empty"])
def test_a_shard_that_is_no_checkpoint_is_named_at_once(tmp_path: Path, kind: str) -> None:
    path = index(tmp_path, {"weight_map": {"w": "shard", "x": "good.safetensors"}})
    shard = tmp_path / "model" / "shard"
    save_file({"x": torch.ones(1)}, tmp_path / "model" / "good.safetensors")
    match kind:
        case "fifo":
            os.mkfifo(shard)
        case "folder":
            shard.mkdir()
        case "loop":
            shard.symlink_to("shard")
        case "device":
            shard.symlink_to("/dev/zero")
        case "text":
            shard.write_text("hello")
        case "empty":
            shard.touch()
    with pytest.raises((CheckpointFormatError, CheckpointNotFoundError), match="shard"):
        open_checkpoint(path)


def test_a_fifo_in_a_folder_is_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    (tmp_path / "b.pth").symlink_to("b.pth")
    save_file({"w": torch.ones(1)}, tmp_path / "c.pth")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.root.keys() == {"w"}


def test_thousands_of_files_take_moments(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"sample{number}.dat").write_bytes(b"not a checkpoint")
    save_file({"w": torch.ones(1)}, tmp_path / "weights.dat")
    started = time.process_time()
    open_checkpoint(tmp_path).close()
    assert time.process_time() - started < 5
    for number in range(3000):
        os.link(tmp_path / "weights.dat", tmp_path / f"copy{number}.dat")
    with pytest.raises(AmbiguousCheckpointError, match="3001 checkpoints") as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 4000


def test_a_numbered_set_of_a_billion_files_is_only_counted(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model-000001-of-999999.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="999998 of 999999 shards are missing"):
        open_checkpoint(tmp_path)


def test_a_grid_of_thousands_of_slices_is_checked_for_overlaps() -> None:
    grid = [Region((row, column), (1, 1)) for row in range(60) for column in range(60)]
    assert tiles((60, 60), grid)
    assert not tiles((60, 60), [*grid, Region((7, 7), (1, 1))])


@given(
    st.dictionaries(
        st.sampled_from(["weight_map", "metadata", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        ),
    )
)
def test_law_any_index_ends_in_a_torchload_error(content: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.raises(TorchLoadError):
        open_checkpoint(index(Path(folder), content))
