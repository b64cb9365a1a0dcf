"""Files as torch, its peers and old versions write them that are not the usual one file of one state dict."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from torchload import inspect_checkpoint, read_state_dict, smart_load, verify_weights
from torchload.errors import (
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
)


def linear(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


# --- open files ---


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "file", "stream"])
def test_an_open_file_is_read_from_where_it_stands_and_left_behind_that(
    kind: str, zipped: bool, tmp_path: Path
) -> None:
    with open(tmp_path / "several", "wb") as writing:
        writing.write(b"my own header")
        for value in range(3):
            torch.save(linear(value).state_dict(), writing, _use_new_zipfile_serialization=zipped)
    with open(tmp_path / "several", "rb") as reading:
        file: Any = reading
        if kind == "bytes":
            file = io.BytesIO(reading.read())
        elif kind == "stream":
            file = types.SimpleNamespace(read=reading.read, seek=reading.seek, tell=reading.tell)
        file.seek(13)
        for value in range(3):
            model = nn.Linear(3, 2)
            smart_load(model, file)
            assert torch.equal(model.weight, linear(value).weight)
        assert file.tell() == os.path.getsize(tmp_path / "several")
        with pytest.raises(CorruptCheckpointError, match=r"seek\(0\)"):
            smart_load(nn.Linear(3, 2), file)


def test_files_of_every_format_follow_each_other_in_one_stream() -> None:
    file = io.BytesIO()
    file.write(save(linear(0).state_dict()))
    torch.save(linear(1).state_dict(), file)
    file.write(save(linear(2).state_dict()))
    torch.save(linear(3).state_dict(), file, _use_new_zipfile_serialization=False)
    torch.save(linear(4).state_dict(), file)
    end = file.tell()
    file.write(b"something else")
    file.seek(0)
    for value in range(5):
        model = nn.Linear(3, 2)
        smart_load(model, file)
        assert torch.equal(model.weight, linear(value).weight)
    assert file.tell() == end


@pytest.mark.parametrize("tail", [b"\n", bytes(512), b"PK\x05\x06"], ids=len)
def test_what_follows_a_zip_archive_is_counted_and_can_be_cut_off(tail: bytes, tmp_path: Path) -> None:
    torch.save(linear(3).state_dict(), tmp_path / "x.pth")
    size = os.path.getsize(tmp_path / "x.pth")
    with open(tmp_path / "x.pth", "ab") as file:
        file.write(tail)
    with pytest.raises(CorruptCheckpointError, match=rf"{len(tail)} bytes? behind .*: truncate -s {size}\b"):
        read_state_dict(tmp_path / "x.pth")
    os.truncate(tmp_path / "x.pth", size)  # the advice
    assert torch.equal(read_state_dict(tmp_path / "x.pth")["weight"], linear(3).weight)


def test_the_pickle_of_an_unpacked_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save(linear(3).state_dict(), tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        archive.extractall(tmp_path)
    with pytest.raises(CheckpointFormatError, match="zip checkpoint that was unpacked"):
        read_state_dict(tmp_path / "x" / "data.pkl")


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("tree", [lambda a, b: {"fc.w": a, "fc": {"w": b}}, lambda a, b: {0: a, "0": b}])
def test_one_name_of_two_tensors_is_refused(tree: Any, is_file: bool, tmp_path: Path) -> None:
    one, other = torch.ones(2), torch.zeros(2)
    source: Any = tree(one, other)
    if is_file:
        torch.save(source, tmp_path / "x.pth")
        source = tmp_path / "x.pth"
    with pytest.raises(IncompatibleCheckpointError, match="one name of two tensors"):
        read_state_dict(source)
    assert next(iter(read_state_dict(tree(one, one)).values())).tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_file_that_is_open_for_writing_only_and_a_nested_tensor_in_memory_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "x.pth", "ab") as file, pytest.raises(TypeError, match="open for writing only"):
        read_state_dict(file)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    with pytest.raises(IncompatibleCheckpointError, match="a nested tensor"):
        read_state_dict({"weight": torch.ones(1), "nested": nested})


def test_a_file_that_fails_stands_where_it_stood() -> None:
    file = io.BytesIO(b"header" + b"no checkpoint at all, just text")
    file.seek(6)
    with pytest.raises(CheckpointFormatError):
        read_state_dict(file)
    assert file.tell() == 6


def test_a_stream_that_cannot_seek_is_told_what_helps() -> None:
    read, write = os.pipe()
    os.close(write)
    with open(read, "rb", buffering=0) as stream, pytest.raises(TypeError, match=r"BytesIO\(stream\.read"):
        read_state_dict(stream)


def test_addresses_and_ids_lead_on() -> None:
    with pytest.raises(CheckpointNotFoundError, match="give the path itself: /models/a b.pth"):
        read_state_dict("file:///models/a%20b.pth")
    with pytest.raises(CheckpointNotFoundError, match=r"snapshot_download\('google/vit-base'\)"):
        read_state_dict("google/vit-base")
    with pytest.raises(CheckpointNotFoundError) as caught:
        read_state_dict("runs/model.pth")
    assert "hub" not in str(caught.value)


# --- what pickles hold ---


class Odd(collections.OrderedDict):  # type: ignore[type-arg]
    """A class of mappings that torchload never heard of."""


class Attributes(dict):  # type: ignore[type-arg]
    """One that is its own ``__dict__``, as there are many."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.__dict__ = self


class Pair(NamedTuple):
    """Two tensors."""

    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize("kind", [Odd, Attributes])
def test_a_mapping_is_known_by_what_it_holds(kind: Any, tmp_path: Path) -> None:
    torch.save(kind({"model": kind(linear(2).state_dict()), "epoch": 3}), tmp_path / "m.pth")
    model = nn.Linear(3, 2)
    report = smart_load(model, tmp_path / "m.pth")
    assert report.key == "model"
    assert torch.equal(model.weight, linear(2).weight)
    assert list(read_state_dict(tmp_path / "m.pth")) == ["weight", "bias"]


def test_a_namedtuple_of_tensors_keeps_them(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "pair": Pair(torch.zeros(1), torch.full((3,), 2.0))}, tmp_path / "m.pth")
    found = read_state_dict(tmp_path / "m.pth", key="")
    assert list(found) == ["w", "pair.0", "pair.1"]
    assert found["pair.1"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("sort", [True, False])
def test_a_packed_sequence_has_the_names_of_its_fields(tmp_path: Path, sort: bool) -> None:
    packed = pack_sequence([torch.randn(3, 2), torch.randn(2, 2)], enforce_sorted=sort)
    for value, prefix in ((packed, ""), ({"batch": packed}, "batch.")):
        torch.save(value, tmp_path / "m.pth")
        found = read_state_dict(tmp_path / "m.pth", key="")
        expected = {name: tensor for name, tensor in packed._asdict().items() if tensor is not None}
        assert list(found) == [prefix + name for name in expected]
        assert all(torch.equal(found[prefix + name], tensor) for name, tensor in expected.items())


def test_what_operators_return_and_tuples_with_gaps(tmp_path: Path) -> None:
    values = torch.randn(2, 3)
    largest = torch.max(values, 0)
    torch.save({"largest": largest, "pair": Pair(torch.ones(1), None)}, tmp_path / "m.pth")  # type: ignore[arg-type]
    found = read_state_dict(tmp_path / "m.pth", key="")
    assert list(found) == ["largest.0", "largest.1", "pair.0"]
    assert torch.equal(found["largest.0"], largest.values)
    assert torch.equal(found["largest.1"], largest.indices)


class Early:
    """A tensor as torch of early 2017 pickled it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        state = self.tensor.storage(), 0, tuple(self.tensor.size()), self.tensor.stride()  # type: ignore[no-untyped-call]
        return (torch.FloatTensor if self.tensor.dtype is torch.float32 else torch.LongTensor), (), state


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_of_early_2017(tmp_path: Path) -> None:
    state = {"weight": Early(linear(3).weight.detach()), "bias": Early(linear(3).bias.detach())}
    torch.save({**state, "count": Early(torch.arange(3))}, tmp_path / "m.pth")
    found = read_state_dict(tmp_path / "m.pth")
    assert torch.equal(found["weight"], linear(3).weight)
    assert torch.equal(found["count"], torch.arange(3))


class Holder:
    """An object that says nothing about its tensors."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return Holder, (self.tensor, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_tensor_is_left_out_in_silence(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": {"y": Holder(torch.ones(1))}}, tmp_path / "held.pth")
    with pytest.raises(IncompatibleCheckpointError, match=r"inside objects.*: x\.y\."):
        read_state_dict(tmp_path / "held.pth", key="")
    jagged = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged)
    torch.save({"w": torch.ones(2), "x": jagged}, tmp_path / "jagged.pth")
    with pytest.raises(IncompatibleCheckpointError, match=r"NestedTensor\): x"):
        read_state_dict(tmp_path / "jagged.pth")


class Python2(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes an ``OrderedDict`` as Python 2 did: a call with a list of pairs."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is collections.OrderedDict:
            return collections.OrderedDict, ([[key, inner] for key, inner in value.items()],)
        return NotImplemented


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_of_python_2(zipped: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for module in model.modules():
        for name in ("_parameters", "_buffers", "_modules"):
            module.__dict__[name] = collections.OrderedDict(module.__dict__[name])
    python2 = types.SimpleNamespace(
        Pickler=Python2, Unpickler=pickle.Unpickler, dump=pickle.dump, load=pickle.load, __name__="python2"
    )
    path = tmp_path / "m.pth"
    torch.save({"model": model}, path, pickle_module=python2, _use_new_zipfile_serialization=zipped)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert smart_load(other, path).tensors == 7
    assert torch.equal(other[0].weight, model[0].weight)


# --- archives, folders, sets ---


def test_a_compressed_archive_loads(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 3))
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "m.pth")
    with (
        zipfile.ZipFile(tmp_path / "m.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    for options in ({}, {"verify": True}, {"mmap": True}, {"dtype": torch.bfloat16}):
        other = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 3))
        smart_load(other, tmp_path / "packed.pth", **options)  # type: ignore[arg-type]
        assert torch.equal(other[0].weight, model[0].weight.to(other[0].weight.dtype))
    assert verify_weights(model, tmp_path / "packed.pth").ok
    damaged = bytearray((tmp_path / "packed.pth").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "packed.pth").write_bytes(damaged)
    with pytest.raises(CorruptCheckpointError):
        smart_load(other, tmp_path / "packed.pth")


def test_a_numpy_file_of_a_dict_is_named_for_it(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", {"weight": np.ones(3)})  # type: ignore[arg-type]
    with pytest.raises(CheckpointFormatError, match=r"pickled object.*numpy\.savez"):
        inspect_checkpoint(tmp_path / "w.npy")


def test_an_index_that_is_a_plain_mapping(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    for number in "01":
        part = {name: tensor for name, tensor in model.state_dict().items() if name[0] == number}
        torch.save(part, tmp_path / f"part{number}.bin")
    index = {name: f"part{name[0]}.bin" for name in model.state_dict()}
    (tmp_path / "weights.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "weights.index.json"):
        other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
        assert smart_load(other, path).tensors == 4
        assert torch.equal(other[1].weight, model[1].weight)


def test_parts_without_an_index_are_told_to_be_given_as_a_list(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    paths = []
    for number in "01":
        part = {name: tensor for name, tensor in model.state_dict().items() if name[0] == number}
        paths.append(tmp_path / f"part_{'ab'[int(number)]}.pth")
        torch.save(part, paths[-1])
    with pytest.raises(AmbiguousCheckpointError, match="give the list of their paths"):
        smart_load(model, tmp_path)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    assert smart_load(other, paths).tensors == 4
    torch.save(model.state_dict(), paths[0])
    with pytest.raises(AmbiguousCheckpointError) as caught:
        smart_load(model, tmp_path)
    assert "list" not in str(caught.value)


def test_folders_and_archives_in_pieces_are_named(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "m.pth")
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        archive.extractall(tmp_path / "unpacked")
    with pytest.raises(CheckpointFormatError, match="was unpacked.*zip -0 -r"):
        read_state_dict(tmp_path / "unpacked" / "m")
    with zipfile.ZipFile(tmp_path / "again.pth", "w") as archive:
        for file in sorted((tmp_path / "unpacked").rglob("*")):
            archive.write(file, file.relative_to(tmp_path / "unpacked"))
    assert list(read_state_dict(tmp_path / "again.pth")) == ["weight", "bias"]
    whole = (tmp_path / "m.pth").read_bytes()
    for head in (bytes(64), b"<html>" + bytes(58), b"PK\x03\x00" + whole[4:64]):
        (tmp_path / "m.pth").write_bytes(head + whole[64:])
        with pytest.raises(CheckpointFormatError, match=r"beginning is damaged|is damaged"):
            read_state_dict(tmp_path / "m.pth")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / ".snapshot_metadata").write_text("{}")
    with pytest.raises(CheckpointFormatError, match=r"torchsnapshot folder.*torch\.save"):
        read_state_dict(tmp_path / "snapshot")


def test_more_shards_than_may_be_open(tmp_path: Path) -> None:
    weight_map = {}
    for number in range(60):
        save_file({f"l{number}": torch.full((3,), float(number))}, tmp_path / f"{number}.safetensors")
        weight_map[f"l{number}"] = f"{number}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    script = """
import resource, sys
from torchload import errors, read_state_dict
hard = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
try:
    print(len(read_state_dict(sys.argv[1])))
except errors.TorchLoadError as error:
    print(error)
"""
    pytest.importorskip("resource")

    def told(hard: int) -> str:
        command = [sys.executable, "-c", script, str(tmp_path), str(hard)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert told(200) == "60\n"
    assert "ulimit -n" in told(40)
