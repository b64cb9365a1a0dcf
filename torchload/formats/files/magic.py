"""How files of `torch.save` and pickles begin; cheap, so that opening one kind doesn't import the readers of others."""

from __future__ import annotations

import re

__all__ = ["HEAD_BYTES", "LEGACY_MAGIC_NUMBER", "is_legacy", "is_pickle", "is_ustar", "is_zip"]

HEAD_BYTES = 4096  # what recognizers see of a file
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C

# The number pickled by protocol 2 and later, with or without a frame, or as text by the protocols before.
_LEGACY = re.compile(
    rb"(?:\x80[\x02-\x05](?:\x95.{8})?\x8a\x0a" + re.escape(LEGACY_MAGIC_NUMBER.to_bytes(10, "little")) + rb"|"
    rb"L" + str(LEGACY_MAGIC_NUMBER).encode() + rb"L?\n)\.",
    re.DOTALL,
)
_PICKLE = re.compile(
    rb"\x80[\x02-\x05]|\(dp\d|\(lp\d|\(dq|\}q|\]q|c[\w.]+\n[\w.]+\n|\(i[\w.]+\n[\w.]+\n",
)


def is_zip(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a zip archive."""
    return head.startswith(b"PK\x03\x04")


def is_legacy(head: bytes) -> bool:
    """Whether it is a file of `torch.save` in the format before torch 1.6."""
    return _LEGACY.match(head) is not None


def is_pickle(head: bytes) -> bool:
    """Whether it is a pickle of any protocol."""
    # The length of a safetensors header can begin as a pickle does (640 is 80 02); then four zeros and a brace follow.
    return _PICKLE.match(head) is not None and head[4:9] != b"\0\0\0\0{"


def is_ustar(head: bytes) -> bool:
    """Whether it is a tar archive."""
    return head[257:262] == b"ustar"
