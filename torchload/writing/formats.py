"""Writing: from named tensors to a file. One module per format; `FORMATS` is the table, by suffix."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from torchload.writing import safetensors, torch_zip
from torchload.writing.blocks import Content

__all__ = ["FORMATS", "FileFormat", "format_of"]


@dataclass(frozen=True, slots=True)
class FileFormat:
    """One kind of file that can be written.

    Attributes:
        name: What to call it, as reading does.
        suffixes: What the names of such files end in.
        check: Gives the reasons why a content can't be stored in it, one phrase each, if there can be any.
        order: Gives the positions of the blocks in the order in which they are written.
        write: Writes a content to a file that is open for writing and seeking.
        keeps_views: Whether a block may hold several tensors that overlap, or one that is not row-major.
    """

    name: str
    suffixes: tuple[str, ...]
    check: Callable[[Content], list[str]] | None
    order: Callable[[Content], list[int]]
    write: Callable[[BinaryIO, Content], None]
    keeps_views: bool


FORMATS: tuple[FileFormat, ...] = (
    FileFormat("zip checkpoint", (".pth", ".pt", ".bin", ".ckpt"), None, torch_zip.order, torch_zip.write, True),
    FileFormat("safetensors", (".safetensors",), safetensors.check, safetensors.order, safetensors.write, False),
)


def format_of(path: str) -> FileFormat | None:
    """The format that a file of this name has; ``None`` where it has no suffix: the name of a folder.

    Raises:
        ValueError: The suffix stands for no format that can be written.

    Example:
        >>> format_of("model.safetensors").name
        'safetensors'
    """
    suffix = os.path.splitext(path)[1].lower()
    for kind in FORMATS:
        if suffix in kind.suffixes:
            return kind
    if not suffix:
        return None
    known = "; ".join(f"{', '.join(kind.suffixes)} ({kind.name})" for kind in FORMATS)
    raise ValueError(
        f"the suffix of {path!r} decides the format, and {suffix!r} is not one of {known}; a name without a suffix is "
        "a folder of torch.distributed.checkpoint"
    )
