"""Which kind of checkpoint a zip archive is: one row each, told apart by the names of the records.

All of them share the directory, which is read once. A module is imported when an archive of its kind is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from torchload.core.checkpoint import Checkpoint
from torchload.core.source import Source
from torchload.errors import CorruptCheckpointError
from torchload.formats.files import torch_zip
from torchload.formats.files.magic import HEAD_BYTES, is_legacy, is_zip
from torchload.formats.files.zip_directory import ZipDirectory, read_directory

__all__ = ["ARCHIVES", "Archive", "is_checkpoint", "is_openable", "open", "open_inside"]


class Archive(NamedTuple):
    """One kind of zip archive that holds weights.

    Attributes:
        name: What to call it.
        recognizes: Whether an archive is one, by the names of its records and the folder that the first is in.
        open: Indexes it.
    """

    name: str
    recognizes: Callable[[Collection[str], str], bool]
    open: Callable[[ZipDirectory, str, str], Checkpoint]


def _is_torchscript(names: Collection[str], top: str) -> bool:
    return f"{top}constants.pkl" in names and f"{top}data.pkl" in names


def _open_torchscript(directory: ZipDirectory, top: str, path: str) -> Checkpoint:
    from torchload.formats.files import torchscript

    return torchscript.open_directory(directory, top, path)


def _is_exported(names: Collection[str], top: str) -> bool:
    return any(name in names for name in (f"{top}archive_format", "serialized_exported_program.json"))


def _open_exported(directory: ZipDirectory, top: str, path: str) -> Checkpoint:
    from torchload.formats.files import exported

    return exported.open_directory(directory, top, path, open_inside)


def _has_pickle(names: Collection[str], top: str) -> bool:
    return f"{top}data.pkl" in names or any(name == "data.pkl" or name.endswith("/data.pkl") for name in names)


def _open_torch_zip(directory: ZipDirectory, top: str, path: str) -> Checkpoint:
    return torch_zip.open_directory(directory, path)


def _is_npz(names: Collection[str], top: str) -> bool:
    return bool(names) and all(name.endswith(".npy") for name in names)


def _open_npz(directory: ZipDirectory, top: str, path: str) -> Checkpoint:
    from torchload.formats.files import numpy_files

    return numpy_files.open_npz(directory, path)


def _open_nested(directory: ZipDirectory, top: str, path: str) -> Checkpoint:
    from torchload.formats.files import nested_zip

    return nested_zip.open_directory(directory, path, open_inside, is_openable) or _refuse(directory, top, path)


ARCHIVES: tuple[Archive, ...] = (
    Archive("TorchScript archive", _is_torchscript, _open_torchscript),
    Archive("torch.export archive", _is_exported, _open_exported),
    Archive("zip checkpoint", _has_pickle, _open_torch_zip),
    Archive("numpy archive", _is_npz, _open_npz),
)


def open(source: Source, path: str) -> Checkpoint:
    """Index a zip archive of any kind without reading tensor data.

    Args:
        source: The whole archive.
        path: The checkpoint as the caller named it.

    Raises:
        CheckpointFormatError: It holds no weights.
        CorruptCheckpointError: It is truncated, damaged or hostile.
    """
    return _open(source, path, _open_nested)


def open_inside(source: Source, path: str) -> Checkpoint:
    """Open a checkpoint that lies inside an archive; archives in archives in archives are not looked into.

    Raises:
        CheckpointFormatError: It is no checkpoint.
        CorruptCheckpointError: It is truncated, damaged or hostile.
    """
    from torchload.formats.files import foreign, legacy, safetensors

    head = source.read(0, min(HEAD_BYTES, source.size))
    if is_zip(head):
        return _open(source, path, _refuse)
    if is_legacy(head):
        return legacy.open(source, path)
    if safetensors.recognizes(head):
        return safetensors.open(source, path)
    raise foreign.describe(source, head, path)


def is_openable(head: bytes) -> bool:
    """Whether `open_inside` knows a file that begins with these bytes."""
    from torchload.formats.files import safetensors

    return is_zip(head) or is_legacy(head) or safetensors.recognizes(head)


def is_checkpoint(source: Source) -> bool:
    """Whether an archive is a checkpoint among other files; a numpy archive may hold anything, and counts as none."""
    try:
        names = read_directory(source).records
    except CorruptCheckpointError:
        return True  # perhaps a damaged checkpoint, which deserves its own error
    top = _top(names)
    return any(kind.recognizes(names, top) for kind in ARCHIVES if kind.recognizes is not _is_npz)


def _open(source: Source, path: str, open_other: Callable[[ZipDirectory, str, str], Checkpoint]) -> Checkpoint:
    directory = read_directory(source)
    top = _top(directory.records)
    for kind in ARCHIVES:
        if kind.recognizes(directory.records, top):
            return kind.open(directory, top, path)
    return open_other(directory, top, path)


def _refuse(directory: ZipDirectory, top: str, path: str) -> Checkpoint:
    from torchload.formats.files import foreign

    if error := foreign.describe_zip(directory.records, path):
        raise error
    return torch_zip.open_directory(directory, path)  # raises; its error lists the records


def _top(names: Collection[str]) -> str:
    """The folder of the first record, with its slash; in what torch writes, everything is in it."""
    folder, slash, _ = next(iter(names), "").partition("/")
    return folder + slash if slash else ""
