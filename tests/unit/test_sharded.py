"""Checkpoints in several files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from tests.unit.test_safetensors import dense
from torchload import inspect_checkpoint, read_state_dict, smart_load
from torchload.core.source import FileSource
from torchload.errors import CheckpointFormatError, CheckpointNotFoundError, CorruptCheckpointError
from torchload.formats import open_checkpoint
from torchload.formats.sets import sharded

STATE = {f"layers.{i}.weight": torch.full((2, 3), float(i)) for i in range(4)}


def shard_name(number: int, total: int = 2) -> str:
    return f"model-{number:05}-of-{total:05}.safetensors"


def write_set(folder: Path, *, index: dict[str, Any] | None = None) -> Path:
    """Two safetensors shards of `STATE` and their index."""
    names = list(STATE)
    halves = {shard_name(1): names[:2], shard_name(2): names[2:]}
    for file, keys in halves.items():
        save_file({key: STATE[key] for key in keys}, folder / file, {"format": "pt"})
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index or {"metadata": {"total_size": 96}, "weight_map": weight_map}))
    return path


def slices(folder: Path, parts: list[tuple[torch.Tensor, list[int]]], name: str = "w") -> list[Path]:
    """One file per slice of a tensor, as torch's HuggingFaceStorageWriter lays them down."""
    paths = []
    for number, (part, origin) in enumerate(parts):
        info = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": origin}}), "DCP_VERSION": "1.0"}
        paths.append(folder / f"shard-{number:05}-model-00001-of-00001.safetensors")
        save_file({name: part.contiguous()}, paths[-1], info)
    return paths


def test_an_index_and_its_folder_open_alike(tmp_path: Path) -> None:
    for path in (write_set(tmp_path), tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.path == str(path)
            assert checkpoint.format == "2 safetensors shards"
            assert list(checkpoint.root) == list(STATE)
            assert all(torch.equal(dense(checkpoint.root[key]), value) for key, value in STATE.items())
            assert len(checkpoint.sources) == 2


def test_zip_shards_open_too(tmp_path: Path) -> None:
    pytest.importorskip("torchload.formats.files.torch_zip")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert {key: entry.shape for key, entry in checkpoint.root.items()} == {"a": (2,), "b": (3,)}
        assert checkpoint.format.startswith("2 zip")


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    for number in (1, 2):
        (tmp_path / shard_name(number)).unlink()
    with pytest.raises(CheckpointNotFoundError, match="2 of 2 shards") as caught:
        open_checkpoint(path)
    assert shard_name(1) in str(caught.value)
    assert shard_name(2) in str(caught.value)


def test_a_shard_that_is_an_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    (tmp_path / shard_name(2)).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(CheckpointFormatError, match=r"00002-of-00002.*git-lfs pointer"):
        open_checkpoint(path)


def test_an_index_of_another_save_is_found(tmp_path: Path) -> None:
    path = write_set(tmp_path, index={"weight_map": {"renamed.weight": shard_name(1), "other": shard_name(2)}})
    with pytest.raises(CorruptCheckpointError, match=r"lacks the tensor 'renamed.weight', and 1 more"):
        open_checkpoint(path)


def test_unlisted_tensors_and_a_wrong_total_are_noted_not_refused(tmp_path: Path) -> None:
    weight_map = {"layers.0.weight": shard_name(1), "layers.2.weight": shard_name(2)}
    path = write_set(tmp_path, index={"metadata": {"total_size": 7}, "weight_map": weight_map})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.root.keys() == STATE.keys()
        assert "2 entries of the shards are not in the index" in checkpoint.notes[0]
        assert "declares 7 bytes" in checkpoint.notes[1]


def test_the_index_decides_between_two_holders_of_one_name(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2), "a": torch.ones(1)}, tmp_path / shard_name(1))
    save_file({"w": torch.ones(2)}, tmp_path / shard_name(2))
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard_name(1), "w": shard_name(2)}}))
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(dense(checkpoint.root["w"]), torch.ones(2))
        assert "took model-00002" in checkpoint.notes[0]


def test_a_shard_in_a_subfolder_opens(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "parts" / "one.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": "parts/one.safetensors"}}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "1 safetensors shard"


def test_a_download_cache_of_links_opens(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_set(blobs)
    for file in list(blobs.iterdir()):
        blob = file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    for path in (snapshot, snapshot / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.root.keys() == STATE.keys()
    with pytest.raises(CheckpointNotFoundError, match="snapshots/abc"):
        open_checkpoint(tmp_path)


def test_a_list_of_shards_opens_in_any_order(tmp_path: Path) -> None:
    write_set(tmp_path)
    for order in ([1, 2], [2, 1], [1, 2, 1]):
        with open_checkpoint([tmp_path / shard_name(number) for number in order]) as checkpoint:
            assert checkpoint.root.keys() == STATE.keys()
    with open_checkpoint([tmp_path / shard_name(1)]) as checkpoint:
        assert list(checkpoint.root) == list(STATE)[:2]


def test_a_list_with_equal_duplicates_is_joined_and_with_others_refused(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"rank{number}.safetensors" for number in range(3))
    save_file({"norm": torch.ones(3), "a": torch.ones(1)}, first)
    save_file({"norm": torch.ones(3), "b": torch.ones(1)}, second)
    save_file({"norm": torch.tensor([1.0, 1.0, 2.0])}, third)
    with open_checkpoint([first, second]) as checkpoint:
        assert checkpoint.root.keys() == {"norm", "a", "b"}
    with open_checkpoint((first, third)) as checkpoint:
        for _ in range(2):
            with pytest.raises(CheckpointFormatError, match="both hold 'norm', with different values"):
                checkpoint.confirm()
    for use in (lambda paths: read_state_dict(paths), lambda paths: smart_load(nn.Linear(1, 1), paths, strict=False)):
        with pytest.raises(CheckpointFormatError, match="both hold 'norm', with different values"):
            use([first, third])


def test_no_tensor_is_read_to_inspect_shards_that_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        save_file({"shared": torch.zeros(1 << 20), f"own{number}": torch.ones(2)}, path)
    read_bytes = 0
    plain = FileSource.readinto

    def counted(self: FileSource, offset: int, buffer: memoryview) -> None:
        nonlocal read_bytes
        read_bytes += len(buffer)
        plain(self, offset, buffer)

    monkeypatch.setattr(FileSource, "readinto", counted)
    assert len(inspect_checkpoint(paths).tensors) == 3
    assert read_bytes < 10_000
    assert len(read_state_dict(paths)) == 3


@pytest.mark.parametrize("paths", [[], ()])
def test_an_empty_list_is_the_callers_mistake(paths: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        open_checkpoint(paths)


def test_a_list_of_something_else_is_the_callers_mistake() -> None:
    with pytest.raises(TypeError, match="list of shards holds paths, not int"):
        open_checkpoint([1])


def test_an_index_without_its_folder_is_refused(tmp_path: Path) -> None:
    import io

    with pytest.raises(CheckpointFormatError, match="give its path instead"):
        open_checkpoint(io.BytesIO(write_set(tmp_path).read_bytes()))


# ------------------------------------------------------------------------------------------------ slices of one tensor


def test_slices_become_boxes_of_one_tensor(tmp_path: Path) -> None:
    whole = torch.arange(20.0).reshape(5, 4)
    paths = slices(tmp_path, [(whole[:3], [0, 0]), (whole[3:], [3, 0])])
    for path in (paths, tmp_path):
        with open_checkpoint(path) as checkpoint:
            entry = checkpoint.root["w"]
            assert [box.origin for box in entry.boxes] == [(0, 0), (3, 0)]
            assert torch.equal(dense(entry), whole)


def test_slices_named_by_an_index_are_all_found(tmp_path: Path) -> None:
    whole = torch.arange(20.0).reshape(5, 4)
    first, second = slices(tmp_path, [(whole[:, :1], [0, 0]), (whole[:, 1:], [0, 1])])
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    index = {"weight_map": {"w": second.name, "x": first.name}}
    save_file({"w": whole[:, :1].contiguous(), "x": torch.ones(1)}, first, {
        "DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [0, 0]}, "x": {"saved_offsets": [0]}})
    })  # fmt: skip
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(dense(checkpoint.root["w"]), whole)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([((2, 4), [0, 0]), ((2, 4), [3, 0])], "hole"),
        ([((3, 4), [0, 0]), ((3, 4), [2, 0])], "overlap"),
        ([((2, 2), [0, 0]), ((2, 2), [1, 1]), ((1, 1), [0, 2])], "overlap"),
        ([((2, 4), [0, 0]), ((2, 4), [2])], "number of dimensions"),
        ([((2, 4), [0, 0]), ((2,), [2])], "number of dimensions"),
        ([((2, 4), [0, 0]), ((2, 4), [-2, 0])], "invalid at tensor 'w'"),
        ([((2, 4), [0, 0]), ((2, 4), [2.0, 0])], "invalid at tensor 'w'"),
        ([((2, 4), [0, 0]), ((2, 4), [2**62, 2**62])], "larger than any tensor"),
        ([((0, 4), [0, 0]), ((0, 4), [2**80, 0])], "larger than any tensor"),
    ],
)
def test_slices_that_do_not_fit_together_are_refused(tmp_path: Path, parts: Any, expected: str) -> None:
    paths = slices(tmp_path, [(torch.ones(shape), origin) for shape, origin in parts])
    with pytest.raises(CorruptCheckpointError, match=expected):
        open_checkpoint(paths)


def test_slices_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    paths = slices(tmp_path, [(torch.ones(2), [0]), (torch.ones(2, dtype=torch.int32), [2])])
    with pytest.raises(CorruptCheckpointError, match="dtype"):
        open_checkpoint(paths)


def test_a_lone_later_slice_is_incomplete(tmp_path: Path) -> None:
    paths = slices(tmp_path, [(torch.ones(2), [0]), (torch.ones(2), [2])])
    save_file({"else": torch.ones(1)}, paths[0])
    with pytest.raises(CorruptCheckpointError, match="only one slice"):
        open_checkpoint(paths)


@given(st.data())
def test_law_any_grid_of_slices_is_the_tensor(data: st.DataObject) -> None:
    import tempfile

    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    cuts = [sorted(data.draw(st.sets(st.integers(1, size), max_size=2)) | {0, size}) for size in shape]
    parts: list[tuple[torch.Tensor, list[int]]] = [(whole, [0] * len(shape))]
    for dimension, borders in enumerate(cuts):
        parts = [
            (part.narrow(dimension, start, end - start), [*origin[:dimension], start, *origin[dimension + 1 :]])
            for part, origin in parts
            for start, end in itertools.pairwise(borders)
        ]
    parts = data.draw(st.permutations(parts))
    with tempfile.TemporaryDirectory() as folder, open_checkpoint(slices(Path(folder), parts)) as checkpoint:
        assert torch.equal(dense(checkpoint.root["w"]), whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_set_that_torch_writes_opens(tmp_path: Path) -> None:
    storage = pytest.importorskip("torch.distributed.checkpoint.hf_storage", reason="needs torch's HuggingFace storage")
    import torch.distributed.checkpoint as dcp

    dcp.save(
        STATE,
        storage_writer=storage.HuggingFaceStorageWriter(
            str(tmp_path), fqn_to_index_mapping={key: 1 + i // 2 for i, key in enumerate(STATE)}
        ),
        no_dist=True,
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.root.keys() == STATE.keys()
        assert all(torch.equal(dense(checkpoint.root[key]), value) for key, value in STATE.items())


def test_recognizing_an_index_needs_no_certain_order() -> None:
    assert sharded.recognizes(b' \n{"weight_map": {}')
    assert not sharded.recognizes(b'["weight_map"]')
    assert not sharded.recognizes(save({"weight_map": torch.ones(1)}))
