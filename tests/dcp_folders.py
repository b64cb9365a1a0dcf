"""Folders of `torch.distributed.checkpoint`, written chunk by chunk as no single process would."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchload.core.checkpoint import Region

File = dict[str, bytes]


def stream(value: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Folder:
    """A folder in the making; change `metadata` or `files` before `write` to make a damaged one."""

    def __init__(self) -> None:
        self.metadata = Metadata(state_dict_metadata={}, planner_data={}, storage_data={})
        self.files: dict[str, bytes] = {}

    def add_tensor(
        self, name: str, tensor: torch.Tensor, regions: Sequence[Region], path: tuple[Any, ...] | None = None
    ) -> None:
        """Cut a tensor up; the regions go to two files by turns."""
        chunks = [ChunkStorageMetadata(torch.Size(origin), torch.Size(size)) for origin, size in regions]
        properties = TensorProperties.create_from_tensor(tensor)
        self.metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.size(), chunks)
        for number, (origin, size) in enumerate(regions):
            part = tensor
            for dimension, (begin, count) in enumerate(zip(origin, size)):
                part = part.narrow(dimension, begin, count)
            index = MetadataIndex(name, origin, number)
            self.metadata.storage_data[index] = self.append(f"__{number % 2}_0.distcp", stream(part.clone()))
        self.metadata.planner_data[name] = path or (name,)

    def add_value(self, name: str, value: Any, path: tuple[Any, ...] | None = None) -> None:
        """A value that is no tensor."""
        self.metadata.state_dict_metadata[name] = BytesStorageMetadata()
        self.metadata.storage_data[MetadataIndex(name)] = self.append("__0_0.distcp", stream(value))
        self.metadata.planner_data[name] = path or (name,)

    def append(self, file: str, data: bytes) -> _StorageInfo:
        """Bytes at the end of a file."""
        before = self.files.get(file, b"")
        self.files[file] = before + data
        return _StorageInfo(file, len(before), len(data))

    def write(self, folder: Path, name: str = ".metadata") -> Path:
        """Everything into a folder."""
        for file, data in self.files.items():
            (folder / file).write_bytes(data)
        (folder / name).write_bytes(pickle.dumps(self.metadata))
        return folder


def whole(tensors: Mapping[str, torch.Tensor]) -> Folder:
    """A folder in which each tensor is one chunk."""
    folder = Folder()
    for name, tensor in tensors.items():
        folder.add_tensor(name, tensor, [Region((0,) * tensor.dim(), tuple(tensor.shape))])
    return folder
