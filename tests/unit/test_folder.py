"""Which checkpoint of a folder is opened."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from torchload.errors import (
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
)
from torchload.formats import open_checkpoint

WEIGHTS = save({"w": torch.ones(2)})


def fill(folder: Path, *names: str, content: bytes = WEIGHTS) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)
    return folder


def taken(folder: Path) -> str:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.path == str(folder)
        (source,) = checkpoint.sources
        return Path(source.name).name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], "model.safetensors"),
        (["model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"], "model.safetensors"),
        (["pytorch_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin"], "pytorch_model.bin"),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["open_clip_pytorch_model.bin", "config.json"], "open_clip_pytorch_model.bin"),
        (["adapter_model.safetensors", "adapter_config.json"], "adapter_model.safetensors"),
        (["model.safetensors", "global_step2/", "latest"], "model.safetensors"),
        (["yolov8n.pt", "yolov8n.safetensors"], "yolov8n.safetensors"),
        (["epoch=3.ckpt", "hparams.yaml", "events.out.tfevents.1.host"], "epoch=3.ckpt"),
        (["weights", "README.md"], "weights"),
        (["consolidated.safetensors", "params.json", "tokenizer.json"], "consolidated.safetensors"),
        (["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
    ],
)
def test_the_weights_are_found_among_what_lies_beside_them(tmp_path: Path, names: list[str], expected: str) -> None:
    assert taken(fill(tmp_path, *names)) == expected


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    fill(tmp_path, "a.pth", content=b"just a text")
    fill(tmp_path, "b.dat")
    assert taken(tmp_path) == "b.dat"


def test_archives_of_other_things_are_no_candidates(tmp_path: Path) -> None:
    fill(tmp_path, "weights.pt")
    with zipfile.ZipFile(tmp_path / "predictions.npz", "w") as archive:
        archive.writestr("a.npy", b"data")
    assert taken(tmp_path) == "weights.pt"


def test_a_damaged_checkpoint_stays_a_candidate(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptCheckpointError, match=r"model\.pth"):
        open_checkpoint(tmp_path)
    fill(tmp_path, "other.pt")
    with pytest.raises(AmbiguousCheckpointError):
        open_checkpoint(tmp_path)


def test_the_choice_and_what_was_left_aside_are_noted(tmp_path: Path) -> None:
    with open_checkpoint(fill(tmp_path, "model.safetensors", "pytorch_model.bin")) as checkpoint:
        assert checkpoint.notes[0] == "took model.safetensors of the folder"
        assert "pytorch_model.bin" in checkpoint.notes[1]


@pytest.mark.parametrize(
    "names",
    [
        ["checkpoint_best.pt", "checkpoint_last.pt"],
        ["rank0.pt", "rank1.pt"],
        ["model.safetensors", "diffusion_pytorch_model.bin"],
        ["a.safetensors.index.json", "b.safetensors.index.json"],
    ],
)
def test_several_checkpoints_are_ambiguous(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(AmbiguousCheckpointError) as caught:
        open_checkpoint(fill(tmp_path, *names))
    assert caught.value.candidates == tuple(str(tmp_path / name) for name in names)
    assert caught.value.argument == "path"
    assert all(name in str(caught.value) for name in names)


def test_a_numbered_set_without_index_opens_when_complete(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        content = save({f"w{number}": torch.ones(number)})
        fill(tmp_path, f"model-0000{number}-of-00003.safetensors", content=content)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.root.keys() == {"w1", "w2", "w3"}
        assert checkpoint.notes == ("took 3 shards without an index",)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match="1 of 3 shards are missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "is an empty folder"),
        (["README.md", "config.json"], "the files README.md, config.json"),
        (["optimizer.bin", "random_states_0.pkl"], r"training states \(optimizer.bin, random_states_0.pkl\)"),
        (["checkpoint-500/", "checkpoint-1000/"], "the folders checkpoint-1000, checkpoint-500"),
        (["snapshots/0123abc/x", "refs/main"], "snapshots/0123abc"),
        (["model.safetensors.part"], "download of model.safetensors.part has not finished"),
    ],
)
def test_a_folder_without_weights_says_what_is_there(tmp_path: Path, names: list[str], expected: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=expected):
        open_checkpoint(fill(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["latest_checkpointed_iteration.txt", "iter_0000010/"], "Megatron checkpoint folder"),
        (["mp_rank_00/", "mp_rank_01/"], "Megatron checkpoint folder"),
        (["saved_model.pb", "variables/"], "TensorFlow SavedModel"),
        (["checkpoint", "model.ckpt-1.index", "model.ckpt-1.data-00000-of-00001"], "TensorFlow checkpoint"),
        (["_CHECKPOINT_METADATA", "manifest.ocdbt"], "Orbax"),
    ],
)
def test_folders_of_other_kinds_are_named(tmp_path: Path, names: list[str], expected: str) -> None:
    with pytest.raises(CheckpointFormatError, match=expected) as caught:
        open_checkpoint(fill(tmp_path, *names, content=b"?"))
    assert caught.value.found is not None


def test_a_dangling_link_by_the_conventional_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(CheckpointNotFoundError, match=r"symbolic link to \.\./blobs/gone"):
        open_checkpoint(tmp_path)
