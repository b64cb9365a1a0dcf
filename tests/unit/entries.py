"""Reads the data that an entry describes, in the plainest way: element by element of its strides."""

from __future__ import annotations

from typing import Any

import torch

from torchload.core.checkpoint import TensorEntry


def read_entry(entry: TensorEntry) -> torch.Tensor:
    """The tensor, as torch would have it."""
    assert isinstance(entry, TensorEntry), entry
    if not entry.boxes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    (box,) = entry.boxes
    assert box.shape == entry.shape
    extent = box.extent
    data = bytearray(extent.source.read(extent.offset, extent.nbytes))
    if extent.big_endian:
        item = entry.dtype.itemsize // (2 if entry.dtype.is_complex else 1)
        data = bytearray(b"".join(data[start : start + item][::-1] for start in range(0, len(data), item)))
    flat = torch.frombuffer(data[box.start :], dtype=torch.uint8)
    usable = flat[: len(flat) // entry.dtype.itemsize * entry.dtype.itemsize].view(entry.dtype)
    return torch.as_strided(usable, box.shape, box.strides).clone()


def assert_holds(tree: Any, expected: Any) -> None:
    """The tree holds what `expected` does, with an entry for each tensor of the same bits."""
    if isinstance(expected, torch.Tensor):
        tensor = read_entry(tree)
        assert tensor.dtype == expected.dtype
        assert tensor.shape == expected.shape
        assert same_bits(tensor, expected.detach())
    elif isinstance(expected, dict):
        assert isinstance(tree, dict)
        assert list(tree) == list(expected)
        for key, value in expected.items():
            assert_holds(tree[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(tree) is type(expected) or isinstance(expected, torch.Size)
        assert len(tree) == len(expected)
        for item, value in zip(tree, expected):
            assert_holds(item, value)
    else:
        assert tree == expected
        assert type(tree) is type(expected)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)

    return torch.equal(raw(one), raw(other))
