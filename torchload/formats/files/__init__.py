"""Files: one module per format, each of which turns a source into a checkpoint; and the registry of them.

`FORMATS` is the table of what a single file may be, standing alone or inside an archive: one row each, tried in order.
How files begin is told here, so that opening one kind imports the reader of that kind alone.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torchload.core.checkpoint import Checkpoint
from torchload.core.source import Source

__all__ = [
    "FORMATS",
    "HEAD_BYTES",
    "Format",
    "head_of",
    "is_safetensors",
    "is_tar",
    "is_zip",
    "kind_of",
    "may_be_inside",
    "open_inside",
    "reader",
]

HEAD_BYTES = 4096  # what recognizers see of a file
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C

# The number pickled by protocol 2 and later, with or without a frame, or as text by the protocols before.
_LEGACY = (
    rb"(?s:\x80[\x02-\x05](?:\x95.{8})?\x8a\x0a" + re.escape(LEGACY_MAGIC_NUMBER.to_bytes(10, "little")) + rb"|"
    rb"L" + str(LEGACY_MAGIC_NUMBER).encode() + rb"L?\n)\."
)
_PICKLE = rb"\x80[\x02-\x05]|\(dp\d|\(lp\d|\(dq|\}q|\]q|c[\w.]+\n[\w.]+\n|\(i[\w.]+\n[\w.]+\n"


class Format(NamedTuple):
    """One kind of checkpoint file.

    Attributes:
        name: What to call it.
        recognizes: Whether a file that begins with these bytes (at most `HEAD_BYTES`) is one, sound or damaged.
        module: Of this folder, which reads it.
        function: Of that module, called with the source, which stays open, and the path as the caller named it. It
            raises `CorruptCheckpointError` for what is truncated, damaged or hostile, and `CheckpointFormatError` for
            what turns out to be something else after all.
        inside: Its function for such a file inside an archive; empty where archives are not searched for it.
        confirms: Its function that tells whether a recognized file is one after a closer look, which is taken where a
            folder holds several; ``None`` where it always is, empty where it may hold anything, and was not meant.
    """

    name: str
    recognizes: Callable[[bytes], bool]
    module: str
    function: str = "open"
    inside: str = ""
    confirms: str | None = None

    def open(self, source: Source, path: str) -> Checkpoint:
        """Index it, standing alone."""
        checkpoint: Checkpoint = getattr(reader(self.module), self.function)(source, path)
        return checkpoint

    def is_meant(self, source: Source) -> bool:
        """Whether a recognized file of a folder is a checkpoint."""
        return self.confirms is None or (self.confirms != "" and getattr(reader(self.module), self.confirms)(source))


def is_zip(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a zip archive."""
    return head.startswith(b"PK\x03\x04")


def _is_legacy(head: bytes) -> bool:
    return re.match(_LEGACY, head) is not None


def _is_pickle(head: bytes) -> bool:
    # The length of a safetensors header can begin as a pickle does (640 is 80 02); then four zeros and a brace follow.
    return re.match(_PICKLE, head) is not None and head[4:9] != b"\0\0\0\0{"


def is_tar(head: bytes) -> bool:
    """Whether it is a tar archive."""
    return head[257:262] == b"ustar"


def is_safetensors(head: bytes) -> bool:
    """Whether it claims to be safetensors, well-formed or not.

    Example:
        >>> is_safetensors((2).to_bytes(8, "little") + b"{}")
        True
        >>> is_safetensors(b'{"model":{"epoch": 3}}')
        False
    """
    # A length of eight printable characters would be 2 EB or more: that is text with a brace at the ninth place.
    return head[8:9] == b"{" and not all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head[:8])


FORMATS: tuple[Format, ...] = (
    Format("zip archive", is_zip, "archives", inside="open_inside", confirms="is_checkpoint"),
    Format("legacy checkpoint", _is_legacy, "legacy", inside="open"),
    Format("tar archive", is_tar, "tar", confirms=""),
    Format("pickle", _is_pickle, "numpy_files", "open_pickle", confirms=""),
    Format("safetensors", is_safetensors, "safetensors", inside="open"),
)


def reader(module: str) -> Any:
    """A module of this folder, imported when a file first needs it; the names are those of our own tables."""
    return importlib.import_module(f"{__name__}.{module}")


def head_of(source: Source) -> bytes:
    """The first bytes of a file, which say what it is."""
    return source.read(0, min(HEAD_BYTES, source.size))


def kind_of(head: bytes) -> Format | None:
    """What a file that begins with these bytes is, or ``None``."""
    return next((kind for kind in FORMATS if kind.recognizes(head)), None)


def may_be_inside(head: bytes) -> bool:
    """Whether `open_inside` may know what to do with a file that begins with these bytes."""
    kind = kind_of(head)
    return kind is not None and kind.inside != ""


def open_inside(source: Source, path: str) -> Checkpoint:
    """Open a checkpoint that lies inside an archive; archives in archives in archives are not looked into.

    Raises:
        CheckpointFormatError: It is no checkpoint.
        CorruptCheckpointError: It is truncated, damaged or hostile.
    """
    head = head_of(source)
    kind = kind_of(head)
    if kind is None or not kind.inside:
        raise reader("foreign").describe(source, head, path)
    checkpoint: Checkpoint = getattr(reader(kind.module), kind.inside)(source, path)
    return checkpoint
