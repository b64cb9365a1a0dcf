"""Checkpoints inside a zip archive, as stable-baselines3 packs them (``policy.pth``, ``pytorch_variables.pth``, …).

A stored member is opened where it lies; a compressed one is unpacked into memory first.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator

from torchload.core.checkpoint import Checkpoint, Container
from torchload.core.source import Source
from torchload.core.text import printable
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats.files.magic import HEAD_BYTES
from torchload.formats.files.zip_directory import STORED, ZipDirectory, ZipRecord

__all__ = ["MAX_MEMBERS", "open_directory", "open_members"]

MAX_MEMBERS = 10_000  # that are looked at
MAX_CHECKPOINTS = 100


def open_directory(
    directory: ZipDirectory,
    path: str,
    open_inside: Callable[[Source, str], Checkpoint],
    is_candidate: Callable[[bytes], bool],
) -> Checkpoint | None:
    """Index every checkpoint in a zip archive without reading tensor data.

    Args:
        directory: The archive.
        path: The checkpoint as the caller named it.
        open_inside: Opens one of them.
        is_candidate: Whether a file that begins with these bytes may be one.

    Returns:
        Its root maps each member's name, without folder and suffix where that is clear, to what the member holds.
        ``None`` if there is no checkpoint inside.

    Raises:
        CheckpointFormatError: There are too many.
        CorruptCheckpointError: One of them is truncated, damaged or hostile.
    """
    members = _candidates(directory, path, is_candidate)
    return open_members(members, directory.source, path, open_inside, "zip archive")


def open_members(
    members: Iterable[tuple[str, Source]],
    archive: Source,
    path: str,
    open_inside: Callable[[Source, str], Checkpoint],
    kind: str,
) -> Checkpoint | None:
    """Index those members of an archive that are checkpoints; arguments and errors as above.

    Args:
        members: Name and content of those that may be.
        archive: What they are in.
        kind: What to call that.
    """
    found: dict[str, Checkpoint] = {}
    for name, member in members:
        if len(found) >= MAX_CHECKPOINTS:
            raise _too_much(path)
        try:
            found[name] = open_inside(member, f"{path}/{printable(name)}")
        except CorruptCheckpointError:
            raise
        except CheckpointFormatError:
            pass  # something else that looks alike, such as a zip archive of other things
    if not found:
        return None
    root = Container({_label(name, found): checkpoint.root for name, checkpoint in found.items()})
    has_checksums = any(checkpoint.checksums for checkpoint in found.values())
    return Checkpoint(path, f"checkpoints in a {kind}", root, (archive,), checksums=has_checksums)


def _candidates(
    directory: ZipDirectory, path: str, is_candidate: Callable[[bytes], bool]
) -> Iterator[tuple[str, Source]]:
    for record in list(directory.records.values())[:MAX_MEMBERS]:
        if is_candidate(_head(directory.source, record)):
            yield record.name, directory.source_of(record.name)


def _too_much(path: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{path} holds more checkpoints than are read through an archive. Unpack it and give the path of "
        "the one you want.",
        path=path,
        found="archive with checkpoints inside",
    )


def _head(source: Source, record: ZipRecord) -> bytes:
    """The first bytes of a member; nothing where they don't unpack."""
    head = source.read(record.offset, min(HEAD_BYTES, record.stored_size))
    if record.method == STORED:
        return head
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _label(name: str, names: dict[str, Checkpoint]) -> str:
    """A member's name without folder and suffix, unless another one is called the same."""
    stems = [_stem(other) for other in names]
    return _stem(name) if stems.count(_stem(name)) == 1 else name


def _stem(name: str) -> str:
    file = name.rpartition("/")[2]
    return file.rpartition(".")[0] or file
