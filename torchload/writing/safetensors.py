"""safetensors: a JSON header and one buffer. Names that share a tensor are listed as aliases in the metadata."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from torchload.formats.files.safetensors import DTYPES
from torchload.writing.blocks import Content

__all__ = ["check", "order", "write"]

_HEADER_ALIGNMENT_BYTES = 8
_CODES: dict[torch.dtype, str] = {
    dtype: code
    for code, (bits, name) in DTYPES.items()
    if bits % 8 == 0 and isinstance(dtype := getattr(torch, str(name), None), torch.dtype)
}


def check(content: Content) -> list[str]:
    """Why the format can't hold a content; empty if it can."""
    reasons = [f"{name} is no tensor, and safetensors holds only tensors: save as .pth" for name in content.others]
    for block in content.blocks:
        if block.dtype not in _CODES:
            dtype = str(block.dtype).removeprefix("torch.")
            reasons.append(f"{block.name} is {dtype}, which safetensors does not have: save as .pth")
    beside: Mapping[Any, Any] = content.beside
    for name, value in beside.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            kind = type(value).__name__
            reasons.append(f"{name} is a {kind}; beside tensors, safetensors holds only text: save as .pth")
    if sys.byteorder != "little":
        reasons.append("safetensors is little-endian, and this machine is not: save as .pth")
    return reasons


def order(content: Content) -> list[int]:
    """The blocks in the order in which they are written.

    Wide elements come first: the data is packed without gaps, and this keeps every tensor aligned to its own elements.
    """
    kept = _kept_names(content)
    return sorted(kept, key=lambda index: (-content.blocks[index].dtype.itemsize, kept[index]))


def write(file: BinaryIO, content: Content) -> None:
    """Write a content whose blocks each hold exactly one tensor in row-major order, under one name or several."""
    kept = _kept_names(content)
    aliases = {name: kept[stored.block] for name, stored in content.tensors.items() if name != kept[stored.block]}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **aliases, **content.beside}}
    position = 0
    for index in order(content):
        block = content.blocks[index]
        header[kept[index]] = {
            "dtype": _CODES[block.dtype],
            "shape": list(content.tensors[kept[index]].shape),
            "data_offsets": [position, position + block.nbytes],
        }
        position += block.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    file.write(struct.pack("<Q", len(text)) + text)
    for index in order(content):
        file.writelines(content.blocks[index].chunks())


def _kept_names(content: Content) -> dict[int, str]:
    """Block → the one name under which it is stored: the first in the alphabet, as `safetensors.torch` has it."""
    kept: dict[int, str] = {}
    for name, stored in content.tensors.items():
        kept[stored.block] = min(kept.get(stored.block, name), name)
    return kept
