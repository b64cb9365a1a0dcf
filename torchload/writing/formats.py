"""Writing: from named tensors to a file. One module per format; `FORMATS` is the table, by suffix."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from torchload.writing import safetensors, torch_zip
from torchload.writing.blocks import Content

__all__ = ["FORMATS", "FileFormat", "format_of"]


@dataclass(frozen=True, slots=True)
class FileFormat:
    """One kind of file that can be written.

    Attributes:
        name: What to call it, as reading does.
        suffixes: What the names of such files end in.
        check: Gives the reasons why a content can't be stored in it, one phrase each.
        order: Gives the positions of the blocks in the order in which they are written.
        write: Writes a content to a file that is open for writing and seeking.
        keeps_views: Whether a block may hold several tensors that overlap, or one that is not row-major.
    """

    name: str
    suffixes: tuple[str, ...]
    check: Callable[[Content], list[str]]
    order: Callable[[Content], list[int]]
    write: Callable[[BinaryIO, Content], None]
    keeps_views: bool


FORMATS: tuple[FileFormat, ...] = (
    FileFormat(
        "zip checkpoint", (".pth", ".pt", ".bin", ".ckpt"), torch_zip.check, torch_zip.order, torch_zip.write, True
    ),
    FileFormat("safetensors", (".safetensors",), safetensors.check, safetensors.order, safetensors.write, False),
)


def format_of(path: Any) -> FileFormat:
    """The format that a file of this name has.

    Raises:
        TypeError: `path` is no path.
        ValueError: The suffix stands for no format that can be written.

    Example:
        >>> format_of("model.safetensors").name
        'safetensors'
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"path is the name of the file to write, not {type(text).__name__}")
    suffix = os.path.splitext(text)[1].lower()
    for kind in FORMATS:
        if suffix in kind.suffixes:
            return kind
    known = "; ".join(f"{', '.join(kind.suffixes)} ({kind.name})" for kind in FORMATS)
    raise ValueError(f"the suffix of {text!r} decides the format, and {suffix or 'none'!r} is not one of {known}")
