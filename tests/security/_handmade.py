"""Writes files that no honest writer would."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def tensor(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """A header entry of a safetensors file."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header (JSON text, or something to make it from), whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(path: Path, content: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)
