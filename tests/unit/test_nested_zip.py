"""Checkpoints inside a zip archive."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import pytest
import torch
from torch import nn

from tests.reading import read_tree, same_bits
from torchload import smart_load
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats import open_checkpoint
from torchload.formats.files import archives


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    file.seek(0)
    return file


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_agent_of_stable_baselines3(compression: int) -> None:
    model, target = nn.Linear(3, 2), nn.Linear(3, 2)
    members = {
        "data": b'{"policy_class": {}}',
        "policy.pth": saved(model.state_dict()),
        "policy.optimizer.pth": saved(torch.optim.Adam(model.parameters()).state_dict()),
        "_stable_baselines3_version": b"2.0",
    }
    file = zipped(members, compression)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.format == "checkpoints in a zip archive"
        assert list(checkpoint.root) == ["policy", "policy.optimizer"]
        assert checkpoint.checksums
    file.seek(0)
    report = smart_load(target, file)
    assert same_bits(target.weight, model.weight)
    assert "policy" in str(report)


def test_stored_members_are_read_where_they_lie() -> None:
    file = zipped({"a.pth": saved({"w": torch.zeros(1000)})})
    with open_checkpoint(file) as checkpoint:
        (box,) = checkpoint.root["a"]["w"].boxes
        assert box.extent.nbytes == 4000
        assert box.extent.crc32 is not None


def test_every_format_may_be_inside() -> None:
    from safetensors.torch import save

    state = {"w": torch.arange(3.0)}
    members = {
        "run/new.pth": saved(state),
        "run/old.pth": saved(state, _use_new_zipfile_serialization=False),
        "run/safe.safetensors": save(state),
        "run/log.txt": b"nothing",
    }
    tree = read_tree(zipped(members))
    assert list(tree) == ["new", "old", "safe"]
    assert all(same_bits(value["w"], state["w"]) for value in tree.values())


def test_members_of_one_name_keep_their_folders() -> None:
    tree = read_tree(zipped({"a/model.pth": saved({"w": 1}), "b/model.pth": saved({"w": 2}), "c.pth": saved({"w": 3})}))
    assert tree == {"a/model.pth": {"w": 1}, "b/model.pth": {"w": 2}, "c": {"w": 3}}


def test_archives_in_archives_in_archives_are_not_looked_into() -> None:
    inner = zipped({"deep.pth": saved({"w": 1})}).getvalue()
    with pytest.raises(CheckpointFormatError, match="Unpack"):
        open_checkpoint(zipped({"middle.pth": inner, "readme.txt": b""}))
    assert read_tree(zipped({"middle.zip": inner, "model.pth": saved({"w": 2})})) == {"model": {"w": 2}}


def test_a_damaged_checkpoint_inside_is_an_error() -> None:
    with pytest.raises(CorruptCheckpointError, match=r"model\.pth"):
        open_checkpoint(zipped({"model.pth": saved({"w": torch.ones(3)})[:-30]}))


def test_what_is_unpacked_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"a.pth": saved({"w": torch.zeros(5000)}), "b.pth": saved({"w": torch.zeros(5000)})}
    assert len(read_tree(zipped(members, zipfile.ZIP_DEFLATED))) == 2
    members["c.pth"] = saved({"w": torch.zeros(1 << 26)})
    with pytest.raises(CorruptCheckpointError, match="would take more memory"):
        open_checkpoint(zipped(members, zipfile.ZIP_DEFLATED))
    monkeypatch.setattr(archives, "MAX_CHECKPOINTS", 1)
    with pytest.raises(CheckpointFormatError, match="Unpack it"):
        open_checkpoint(zipped(members))
