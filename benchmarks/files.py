"""The checkpoints: random weights from a fixed seed, written once into a folder and kept for the next run."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.models import build_meta, named_tensors

__all__ = ["CheckpointFile", "checksum", "prepare"]

VERSION = 1  # change it with anything that changes the files
SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint on disk, and what a model must hold once it is loaded.

    Attributes:
        path: The file.
        nbytes: Bytes of tensor data in it.
        tensors: Number of tensors in it.
        expected: Checksum of the model after a correct load, in the case's model dtype.
    """

    path: str
    nbytes: int
    tensors: int
    expected: str


def prepare(case: Case, folder: Path, variant: str | None = None) -> CheckpointFile:
    """The case's file, made if it isn't there.

    Args:
        case: What to make.
        folder: Where.
        variant: The layout of one peer alone (a key of `WRITERS`) instead of the case's format.
    """
    layout = variant or case.file_format
    stem = f"{case.model}-{case.amount}-{case.file_dtype}-v{VERSION}"
    path, facts_path = folder / f"{stem}.{layout}", folder / f"{stem}.json"
    folder.mkdir(parents=True, exist_ok=True)
    facts = json.loads(facts_path.read_text()) if facts_path.exists() else {"expected": {}}
    if not path.exists() or case.model_dtype not in facts["expected"]:
        state = _random_state(case)
        if not path.exists():
            partial = path.with_suffix(".partial")
            WRITERS[layout](state, str(partial))
            _sync(partial)
            partial.rename(path)
        facts["nbytes"] = sum(tensor.nbytes for tensor in state.values())
        facts["tensors"] = len(state)
        dtype = getattr(torch, case.model_dtype)
        facts["expected"][case.model_dtype] = checksum((name, _cast(state[name], dtype)) for name in state)
        facts_path.write_text(json.dumps(facts, indent=1))
    return CheckpointFile(str(path), facts["nbytes"], facts["tensors"], facts["expected"][case.model_dtype])


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, dtypes, shapes and every byte, whatever the order and the device."""
    lines = []
    for name, tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        view = (ctypes.c_char * data.nbytes).from_address(data.data_ptr()) if data.nbytes else b""
        lines.append(f"{name} {data.dtype} {tuple(data.shape)} {zlib.crc32(view):08x}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _random_state(case: Case) -> dict[str, Tensor]:
    """Weights as after an initialisation: small, never subnormal, the same on every machine."""
    dtype = getattr(torch, case.file_dtype)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in named_tensors(build_meta(case.model, case.amount, dtype)):
        if not tensor.is_floating_point():
            state[name] = torch.randint(0, 1000, tensor.shape, dtype=tensor.dtype, generator=generator)
            continue
        values = torch.empty(tensor.shape, dtype=torch.float32).uniform_(-0.05, 0.05, generator=generator)
        state[name] = (values.abs() + 0.5 if name.endswith("running_var") else values).to(dtype)
    return state


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_safetensors(state: dict[str, Tensor], path: str) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, tensor in state.items():
        begin, end = end, end + tensor.nbytes
        kind = SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def _write_flashpack(state: dict[str, Tensor], path: str) -> None:
    from flashpack import pack_to_file

    pack_to_file(state, path, target_dtype=None)


WRITERS: dict[str, Callable[[dict[str, Tensor], str], None]] = {
    "pth": torch.save,
    "safetensors": _write_safetensors,
    "flashpack": _write_flashpack,
    "fvcore.pth": lambda state, path: torch.save({"model": state}, path),
}


def _sync(path: Path) -> None:
    """Written back, so that its pages can be dropped from the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
