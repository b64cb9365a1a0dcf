"""Which kind of checkpoint a zip archive is, told by the names of its records; and checkpoints inside of archives.

All kinds share the directory, which is read once. Archives of anything else may hold whole checkpoints, as
stable-baselines3 packs them (``policy.pth``, ``pytorch_variables.pth``, …): a stored member is opened where it lies, a
compressed one is unpacked into memory first.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torchload.core.checkpoint import Checkpoint, Container
from torchload.core.source import Source
from torchload.core.text import printable
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats import files
from torchload.formats.files.zip_directory import STORED, ZipDirectory, read_directory

__all__ = ["ARCHIVES", "Archive", "is_checkpoint", "open", "open_inside", "open_members"]

MAX_MEMBERS = 10_000  # that are looked at
MAX_CHECKPOINTS = 100


class Archive(NamedTuple):
    """One kind of zip archive that holds weights.

    Attributes:
        name: What to call it.
        recognizes: Whether an archive is one.
        module: Of this folder, whose function of the next name indexes it, given the directory and the path.
        function: That name.
    """

    name: str
    recognizes: Callable[[ZipDirectory], bool]
    module: str
    function: str = "open_directory"


def _is_torchscript(archive: ZipDirectory) -> bool:
    return f"{archive.top}constants.pkl" in archive.records and f"{archive.top}data.pkl" in archive.records


def _is_exported(archive: ZipDirectory) -> bool:
    return f"{archive.top}archive_format" in archive.records or "serialized_exported_program.json" in archive.records


def _has_pickle(archive: ZipDirectory) -> bool:
    usual = f"{archive.top}data.pkl" in archive.records
    return usual or any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.records)


def _is_npz(archive: ZipDirectory) -> bool:
    return bool(archive.records) and all(name.endswith(".npy") for name in archive.records)


ARCHIVES: tuple[Archive, ...] = (
    Archive("TorchScript archive", _is_torchscript, "torchscript"),
    Archive("torch.export archive", _is_exported, "exported"),
    Archive("zip checkpoint", _has_pickle, "torch_zip"),
    Archive("numpy archive", _is_npz, "numpy_files", "open_npz"),
)


def open(source: Source, path: str) -> Checkpoint:
    """Index a zip archive of any kind without reading tensor data."""
    archive = read_directory(source)
    members = _candidates(archive)
    return _open_known(archive, path) or open_members(members, source, path, "zip archive") or _refuse(archive, path)


def open_inside(source: Source, path: str) -> Checkpoint:
    """`open` for an archive inside another one: it isn't searched for checkpoints in turn."""
    archive = read_directory(source)
    return _open_known(archive, path) or _refuse(archive, path)


def is_checkpoint(source: Source) -> bool:
    """Whether an archive is a checkpoint among other files; a numpy archive may hold anything, and counts as none."""
    try:
        archive = read_directory(source)
    except CorruptCheckpointError:
        return True  # perhaps a damaged checkpoint, which deserves its own error
    return any(kind.recognizes(archive) for kind in ARCHIVES if kind.recognizes is not _is_npz)


def open_members(members: Iterable[tuple[str, Source]], archive: Source, path: str, kind: str) -> Checkpoint | None:
    """Index every checkpoint among the members (name and content) of an archive without reading tensor data.

    Returns:
        Its root maps each member's name, without folder and suffix where that is clear, to what the member holds.
        ``None`` if there is no checkpoint inside.
    """
    found: dict[str, Checkpoint] = {}
    for name, member in members:
        if len(found) >= MAX_CHECKPOINTS:
            raise CheckpointFormatError(
                f"{path} holds more than {MAX_CHECKPOINTS} checkpoints, and so many are not read through an archive. "
                "Unpack it and give the path of the one you want.",
                path=path,
                found="archive with checkpoints inside",
            )
        try:
            found[name] = files.open_inside(member, f"{path}/{printable(name)}")
        except CorruptCheckpointError:
            raise
        except CheckpointFormatError:
            pass  # something else that looks alike, such as a zip archive of other things
    if not found:
        return None
    stems = [_stem(name) for name in found]
    labels = (stem if stems.count(stem) == 1 else name for name, stem in zip(found, stems))
    root = Container({label: checkpoint.root for label, checkpoint in zip(labels, found.values())})
    has_checksums = any(checkpoint.checksums for checkpoint in found.values())
    return Checkpoint(path, f"checkpoints in a {kind}", root, (archive,), checksums=has_checksums)


def _open_known(archive: ZipDirectory, path: str) -> Checkpoint | None:
    for kind in ARCHIVES:
        if kind.recognizes(archive):
            checkpoint: Checkpoint = getattr(files.reader(kind.module), kind.function)(archive, path)
            return checkpoint
    return None


def _refuse(archive: ZipDirectory, path: str) -> Checkpoint:
    if error := files.reader("foreign").describe_zip(archive.records, path):
        raise error
    checkpoint: Checkpoint = files.reader("torch_zip").open_directory(archive, path)  # raises; it lists the records
    return checkpoint


def _candidates(archive: ZipDirectory) -> Iterator[tuple[str, Source]]:
    """The members that begin as a checkpoint does; of a compressed one, as much is unpacked as that takes."""
    for record in list(archive.records.values())[:MAX_MEMBERS]:
        head = archive.source.read(record.offset, min(files.HEAD_BYTES, record.stored_size))
        if record.method != STORED:
            try:
                head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, files.HEAD_BYTES)
            except zlib.error:
                continue
        if files.may_be_inside(head):
            yield record.name, archive.source_of(record.name)


def _stem(name: str) -> str:
    file = name.rpartition("/")[2]
    return file.rpartition(".")[0] or file
