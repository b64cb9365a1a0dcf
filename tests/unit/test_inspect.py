"""inspect_checkpoint: what is in a file, in milliseconds, and without running or showing anything dangerous."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchload import errors, inspect_checkpoint, smart_load


def training_checkpoint(path):
    model = nn.DataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 37,
        "best": 0.25,
        "arch": "tiny",
        "args": argparse.Namespace(lr=1e-3),
        "loss": torch.tensor(0.5),
    }
    torch.save(content, path)


@pytest.fixture
def info(tmp_path):
    training_checkpoint(tmp_path / "model.pth")
    return inspect_checkpoint(tmp_path / "model.pth")


def test_containers(info):
    assert info.format == "zip checkpoint"
    found = {container.path: (container.tensors, container.nbytes) for container in info.containers}
    assert found == {
        "": (1, 4),
        "state_dict": (7, (12 + 4 * 5) * 4 + 8),
        "optimizer.state": (12, (12 * 2 + 4 * 6 + 4) * 4),
    }
    assert info.containers[1].wrappers == info.wrappers == ("module",)
    assert info.checksums


def test_tensors(info):
    by_name = {(tensor.container, tensor.name): tensor for tensor in info.tensors}
    weight = by_name["state_dict", "module.0.weight"]
    assert (weight.dtype, weight.shape, weight.nbytes, weight.kind) == (torch.float32, (4, 3), 48, "")
    assert by_name["optimizer.state", "0.exp_avg"].shape == (4, 3)
    assert len(info.tensors) == 20


def test_values_are_plain_or_inert(info):
    assert (info.values["epoch"], info.values["best"], info.values["arch"]) == (37, 0.25, "tiny")
    assert (info.values["args"].name, info.values["args"].state) == ("argparse.Namespace", {"lr": 1e-3})
    assert info.values["optimizer.param_groups"][0]["lr"] == 1e-3


def test_totals(info):
    assert info.dtypes == {"float32": (19, info.nbytes - 8), "int64": (1, 8)}
    assert list(info.dtypes) == ["float32", "int64"]


def test_ties_count_once(tmp_path):
    weight = torch.ones(10)
    torch.save({"a": weight, "b": weight}, tmp_path / "tied.pth")
    info = inspect_checkpoint(tmp_path / "tied.pth")
    assert (len(info.tensors), info.containers[0].tensors, info.nbytes) == (2, 2, 40)
    assert info.dtypes == {"float32": (1, 40)}


def test_text(info):
    text = str(info)
    assert "zip checkpoint, 20 tensors, " in text.splitlines()[0]
    assert "state_dict       7 tensors, 136 B, module. in names" in text
    assert "module.0.weight  float32 (4, 3)" in text
    assert "epoch = 37, best = 0.25, arch = 'tiny', args = <argparse.Namespace>" in text
    assert "checksums recorded" in text
    assert len(text.splitlines()) < 20
    assert "20 tensors" in repr(info)


def test_the_keys_are_those_that_smart_load_takes(tmp_path, info):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert smart_load(model, tmp_path / "model.pth", key=info.containers[1].path).tensors == 7


def test_it_is_frozen(info):
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.path = "other"


def test_safetensors_and_folders(tmp_path):
    save_file({"w": torch.ones(2), "b": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"licence": "MIT"})
    info = inspect_checkpoint(tmp_path)
    assert (info.format, info.checksums, info.metadata) == ("safetensors", False, {"licence": "MIT"})
    assert sorted(tensor.name for tensor in info.tensors) == ["b", "w"]
    assert "licence = 'MIT'" in str(info)
    assert "checksums none" in str(info)


def test_whole_modules_say_what_they_are(tmp_path):
    torch.save({"model": nn.Sequential(nn.Linear(2, 2))}, tmp_path / "whole.pth")
    (container,) = inspect_checkpoint(tmp_path / "whole.pth").containers
    assert (container.path, container.tensors) == ("model", 2)
    assert container.origin == "torch.nn.modules.container.Sequential"
    assert "a whole torch.nn.modules.container.Sequential" in str(inspect_checkpoint(tmp_path / "whole.pth"))


def test_what_is_no_dense_tensor_is_listed(tmp_path):
    torch.save({"adjacency": torch.eye(3).to_sparse(), "dense": torch.ones(1)}, tmp_path / "sparse.pth")
    sparse = next(t for t in inspect_checkpoint(tmp_path / "sparse.pth").tensors if t.name == "adjacency")
    assert sparse.dtype is None
    assert "sparse" in sparse.kind


@pytest.mark.parametrize(
    ("content", "tensors"), [(torch.ones(3), 1), ([torch.ones(1), 2], 1), ({"epoch": 1}, 0), (3, 0), (None, 0)]
)
def test_files_of_other_shapes(tmp_path, content, tensors):
    torch.save(content, tmp_path / "odd.pth")
    info = inspect_checkpoint(tmp_path / "odd.pth")
    assert len(info.tensors) == tensors
    assert str(info)
    assert info._repr_html_()


def test_nested_state_dicts(tmp_path):
    torch.save({"model": {"a": {"b": {"c": {"d": torch.ones(1)}}}}}, tmp_path / "deep.pth")
    (tensor,) = inspect_checkpoint(tmp_path / "deep.pth").tensors
    assert f"{tensor.container}.{tensor.name}" == "model.a.b.c.d"


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(errors.CheckpointFormatError, match="HTML"):
        inspect_checkpoint(tmp_path / "page.pth")
    with pytest.raises(errors.CheckpointNotFoundError):
        inspect_checkpoint(tmp_path / "nothing.pth")


# --- hostile ---

ESCAPE = "\x1b[31m\x07\r\n"
SCRIPT = "<script>alert(1)</script>"


def test_hostile_text_reaches_neither_terminal_nor_page(tmp_path):
    content = {
        f"{ESCAPE}{SCRIPT}": torch.ones(1),
        "note": f"{ESCAPE}{SCRIPT}",
        f"{SCRIPT}{ESCAPE}box": {f"w{SCRIPT}": torch.ones(1)},
        "\ud800": 3,
        "long" * 1000: "long" * 1000,
    }
    with open(tmp_path / "hostile.pth", "wb") as file:
        torch.save(content, file)
    info = inspect_checkpoint(tmp_path / "hostile.pth")
    for text in (str(info), repr(info), info._repr_html_()):
        assert all(character.isprintable() or character == "\n" for character in text)
    assert "<script" not in info._repr_html_()
    assert "\\x1b[31m" in str(info)
    assert len(str(info)) < 5000


def test_nothing_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    torch.save({"w": torch.ones(1), "trap": Trap()}, tmp_path / "trap.pth")
    info = inspect_checkpoint(tmp_path / "trap.pth")
    assert "mkdir" in str(info)
    assert not (tmp_path / "trap").exists()


def test_values_that_expand_without_end_are_only_named(tmp_path):
    bomb = []
    for _ in range(60):
        bomb = [bomb, bomb]
    loop = {}
    loop["self"] = loop
    torch.save({"args": argparse.Namespace(bomb=bomb), "loop": loop, "w": torch.ones(1)}, tmp_path / "bomb.pth")
    del bomb  # a failing test would show it
    info = inspect_checkpoint(tmp_path / "bomb.pth")
    shown = str(info), repr(info), info._repr_html_()
    names = list(info.values)
    del info
    assert names == ["args", "loop"]
    assert "args = <argparse.Namespace>, loop = a dict of 1" in shown[0]
    assert max(map(len, shown)) < 2000


# --- size ---


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    count, each = 40, 256 << 20
    header = {
        f"layer.{index}": {
            "dtype": "F32",
            "shape": [each // 4],
            "data_offsets": [index * each, (index + 1) * each],
        }
        for index in range(count)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count * each)
    code = """
import resource, sys
from torchload import inspect_checkpoint
inspect_checkpoint(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
info = inspect_checkpoint(sys.argv[1])
print(info.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    save_file({"w": torch.ones(1)}, tmp_path / "small.safetensors")
    command = [sys.executable, "-c", code, path, tmp_path / "small.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    nbytes, grown_kib = map(int, done.stdout.split())
    assert nbytes == 10 << 30
    assert grown_kib < 16 * 1024


def test_infos_of_tensors_can_be_sent_elsewhere(info):
    assert pickle.loads(pickle.dumps(info.tensors)) == info.tensors
    assert pickle.loads(pickle.dumps(info.containers)) == info.containers
