"""One small sound checkpoint of every format, all of the same weights: what damage and fuzzing begin with."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tests.versions import save_folder
from torchload.core.checkpoint import TensorEntry
from torchload.formats import open_checkpoint

__all__ = ["MAKERS", "Seed", "data_ranges", "model"]


def model(fill: float | None = None) -> nn.Module:
    """What all seeds fit. Every value differs from every other, so that no mistake hides; or all are the same."""
    built = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    count = 1.0
    with torch.no_grad():
        for tensor in built.state_dict().values():
            tensor.copy_(torch.arange(count, count + tensor.numel()).reshape(tensor.shape) if fill is None else fill)
            count += tensor.numel()
    return built.eval()


class Seed:
    """A checkpoint in a folder.

    Attributes:
        path: What to load.
        files: The files it consists of.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())


def _state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model().state_dict().items()}


def _arrays() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in _state().items()}


def _zip(folder: Path) -> Path:
    torch.save({"state_dict": _state(), "epoch": 3}, folder / "zip.pth")
    return folder / "zip.pth"


def _legacy(folder: Path) -> Path:
    torch.save(_state(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder / "legacy.pth"


def _safetensors(folder: Path) -> Path:
    save_file(_state(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def _sharded(folder: Path) -> Path:
    folder = folder / "sharded"
    folder.mkdir(exist_ok=True)
    state, files = _state(), {}
    names = list(state)
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        files.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _distributed(folder: Path) -> Path:
    save_folder(_state(), checkpoint_id=folder / "distributed")
    return folder / "distributed"


def _scripted(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model()), folder / "scripted.pt")
    return folder / "scripted.pt"


def _npz(folder: Path) -> Path:
    np.savez(folder / "weights.npz", **_arrays())
    return folder / "weights.npz"


def _pickle(folder: Path) -> Path:
    (folder / "weights.pkl").write_bytes(pickle.dumps({"model": _arrays()}, protocol=4))
    return folder / "weights.pkl"


def _nested(folder: Path) -> Path:
    inner = io.BytesIO()
    torch.save(_state(), inner)
    with zipfile.ZipFile(folder / "nested.zip", "w") as archive:
        archive.writestr("policy.pth", inner.getvalue())
        archive.writestr("data", "{}")
    return folder / "nested.zip"


def _tar(folder: Path) -> Path:
    inner = io.BytesIO()
    torch.save(_state(), inner)
    with tarfile.open(folder / "packed.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("model.pth")
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    return folder / "packed.tar"


_WRITERS: dict[str, Callable[[Path], Path]] = {
    "zip": _zip,
    "legacy": _legacy,
    "safetensors": _safetensors,
    "sharded": _sharded,
    "distributed": _distributed,
    "TorchScript": _scripted,
    "npz": _npz,
    "numpy pickle": _pickle,
    "nested zip": _nested,
    "tar": _tar,
}


@cache
def _made(name: str) -> tuple[str, dict[str, bytes]]:
    """What to load, and the files, by their paths: made once, since some writers put random names into them."""
    with tempfile.TemporaryDirectory() as folder:
        path = _WRITERS[name](Path(folder))
        files = {str(file.relative_to(folder)): file.read_bytes() for file in Seed(path).files}
        return str(path.relative_to(folder)), files


def _write(name: str, folder: Path) -> Seed:
    path, files = _made(name)
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return Seed(folder / path)


MAKERS: dict[str, Callable[[Path], Seed]] = {name: partial(_write, name) for name in _WRITERS}


def data_ranges(seed: Seed) -> list[tuple[str, int, int]]:
    """Where tensor data lies: (name of the file, first byte, byte past the last)."""
    ranges = []
    with open_checkpoint(seed.path) as checkpoint:
        for entry in _entries(checkpoint.root):
            for box in entry.boxes:
                source = box.extent.source
                first = source.base + box.extent.offset
                ranges.append((source.name, first, first + box.extent.nbytes))
    return ranges


def _entries(value: object) -> Iterator[TensorEntry]:
    if isinstance(value, TensorEntry):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _entries(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _entries(inner)
