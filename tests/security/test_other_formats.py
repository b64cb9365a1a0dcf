"""Legacy, tar, TorchScript, torch.export, numpy and nested files: cut anywhere, flipped anywhere, made to do harm."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.data.generate import FOLDER, packed, tar_bytes
from tests.security._hostile import contained
from torchload.errors import CheckpointFormatError, CorruptCheckpointError, TorchLoadError
from torchload.formats import open_checkpoint

STATE = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), bias=torch.ones(2))


def legacy(value: Any = STATE, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False, **options)
    return file.getvalue()


def scripted() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(3, 2)), file)  # type: ignore[no-untyped-call]
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.arange(6.0), bias=np.ones(2, "f4"))
    return file.getvalue()


def nested() -> bytes:
    file = io.BytesIO()
    torch.save(STATE, file)
    return zipped({"policy.pth": file.getvalue(), "old.pth": legacy()})


MAKERS: dict[str, Callable[[], bytes]] = {
    "legacy": legacy,
    "legacy protocol 4": lambda: legacy(pickle_protocol=4),
    "tar": lambda: tar_bytes(STATE),
    "TorchScript": scripted,
    "torch.export": lambda: (FOLDER / "exported_2_7.pt2").read_bytes(),
    "numpy archive": npz,
    "numpy pickle": lambda: pickle.dumps({name: value.numpy() for name, value in STATE.items()}),
    "nested zip": nested,
    "tar of checkpoints": lambda: packed({"old.pth": legacy()}),
}
_MADE: dict[str, bytes] = {}


def made(name: str) -> bytes:
    if name not in _MADE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit, and storages that have a dtype
            _MADE[name] = MAKERS[name]()
    return _MADE[name]


def opened(data: bytes | bytearray) -> None:
    """Open it; only errors that are meant to come out may."""
    with contextlib.suppress(TorchLoadError):
        open_checkpoint(io.BytesIO(data)).close()


@pytest.mark.parametrize("name", MAKERS)
def test_truncation_anywhere_is_found(name: str) -> None:
    data = made(name)
    end = len(data)
    if "tar" in name:  # one empty block ends an archive; tarfile writes many
        end = len(data.rstrip(b"\0"))
    cuts = {*range(1, end, max(1, end // 400)), *range(max(1, end - 64), end)}
    for cut in sorted(cuts):
        with pytest.raises((CorruptCheckpointError, CheckpointFormatError)):
            open_checkpoint(io.BytesIO(data[:cut]))


@pytest.mark.parametrize("name", MAKERS)
def test_a_flipped_bit_anywhere_does_no_harm(name: str) -> None:
    data = made(name)
    step = max(1, len(data) // 800)
    for position in range(0, len(data), step):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position // step % 8)
        opened(damaged)


@given(st.sampled_from(sorted(MAKERS)), st.integers(0), st.binary(min_size=1, max_size=40), st.booleans())
def test_law_only_known_errors_come_out(name: str, place: int, content: bytes, inserted: bool) -> None:
    data = made(name)
    place %= len(data)
    opened(data[:place] + content + data[place if inserted else place + len(content) :])


@given(
    st.sampled_from([b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x04", b"(dp0\n"]), st.binary(max_size=300)
)
def test_law_anything_may_follow_a_magic_number(magic: bytes, content: bytes) -> None:
    opened(magic + content)


# ------------------------------------------------------------------------------------------------------------- no code


class Harm:
    """Pickles as a call that leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def in_legacy_head(harm: Harm) -> bytes:
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    return head + pickle.dumps(harm, 2) + pickle.dumps(STATE["bias"].numpy(), 2) + pickle.dumps([], 2)


def in_script(harm: Harm, record: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(made("TorchScript"))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith(record))
    members[name] = pickle.dumps({"x": harm}, 2)
    return zipped(members)


def in_tar(harm: Harm, member: str) -> bytes:
    members = {name: pickle.dumps(0, 2) + pickle.dumps([], 2) for name in ("sys_info", "storages", "tensors")}
    members["pickle"] = pickle.dumps({}, 2)
    members[member] = (pickle.dumps(1, 2) if member in {"storages", "tensors"} else b"") + pickle.dumps(harm, 2)
    return packed(members)


def in_object_array(harm: Harm) -> bytes:
    file = io.BytesIO()
    np.savez(file, w=np.array([harm], dtype=object))
    return file.getvalue()


HARMFUL: dict[str, Callable[[Harm], bytes]] = {
    "legacy object": lambda harm: legacy({"w": torch.ones(1), "x": harm}),
    "legacy sys_info": in_legacy_head,
    "legacy in a zip": lambda harm: zipped({"policy.pth": legacy({"x": harm})}),
    "tar pickle": lambda harm: in_tar(harm, "pickle"),
    "tar storages": lambda harm: in_tar(harm, "storages"),
    "tar tensors": lambda harm: in_tar(harm, "tensors"),
    "tar sys_info": lambda harm: in_tar(harm, "sys_info"),
    "TorchScript data": lambda harm: in_script(harm, "/data.pkl"),
    "TorchScript constants": lambda harm: in_script(harm, "/constants.pkl"),
    "torch.export weights": lambda harm: zipped(
        {"serialized_exported_program.json": b"{}", "serialized_state_dict.pt": legacy({"x": harm})}
    ),
    "numpy pickle": lambda harm: pickle.dumps({"w": np.ones(2), "x": harm}),
    "numpy object array": in_object_array,
}


@pytest.mark.parametrize("name", HARMFUL)
def test_no_call_is_made(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    opened(HARMFUL[name](Harm(marker)))
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------------------------- bombs


def head(*values: Any) -> bytes:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, *values]
    return b"".join(pickle.dumps(value, 2) for value in parts)


def deflated(size_bytes: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("w.npy", "w") as member:
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size_bytes // 4},), }}\n".encode()
        member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        for _ in range(size_bytes >> 20):
            member.write(bytes(1 << 20))
    return file.getvalue()


def long_code() -> bytes:
    with zipfile.ZipFile(io.BytesIO(made("TorchScript"))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("linear.py") or ("/linear/" in name and name.endswith(".py")))
    members[name] += b"\nclass A(Module):" * 500_000 + b"\n" * 1_000_000
    return zipped(members)


BOMBS: dict[str, Callable[[], bytes]] = {
    "a storage of 2**62 elements": lambda: head() + legacy_storage(1 << 62) + pickle.dumps(["0"], 2),
    "a million storage keys": lambda: head({}, [str(number) for number in range(1_000_000)]),
    "nested lists": lambda: head() + b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"." + pickle.dumps([], 2),
    "a memo index of 2**28": lambda: head() + b"\x80\x02Nr\0\0\0\x10.",
    "a text of 4 GiB": lambda: head() + b"\x80\x02X\xff\xff\xff\xff" + b"x" * 100,
    "an inflated array": lambda: deflated(200 << 20),
    "a class per line of code": long_code,
    "a tar header in front of nothing": lambda: packed({"pickle": b"x" * 600})[:1024],
    "a numpy array of 2**60 elements": lambda: (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85"
        b"U\x01btR(K\x01\x8a\x08\0\0\0\0\0\0\0\x10\x85cnumpy\ndtype\nU\x02f4K\0K\1\x87R\x89U\x04abcdtb."
    ),
}


def legacy_storage(numel: int) -> bytes:
    key = pickle.dumps(numel, 2)[2:-1]
    return b"\x80\x02(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + key + b"tQ."


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_within_bounds(name: str) -> None:
    data = BOMBS[name]()
    assert contained(lambda: open_checkpoint(io.BytesIO(data))) != "done" or name == "a class per line of code"


def test_a_sparse_giant_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "giant.pth"
    path.write_bytes(head() + legacy_storage(1 << 36) + pickle.dumps(["0"], 2) + struct.pack("<q", 1 << 36))
    start = path.stat().st_size
    os.truncate(path, start + (1 << 38))
    assert contained(lambda: open_checkpoint(path)) == "done"
    os.truncate(path, start + (1 << 38) - 1)
    assert "incomplete" in contained(lambda: open_checkpoint(path))
