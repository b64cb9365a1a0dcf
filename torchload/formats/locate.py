"""From what the caller handed over to a `Source`: paths, file objects, and everything that is not there.

A path is looked at before it is opened, so that a FIFO or a device is refused instead of waited for, and a path that
does not exist is answered with what does.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import urllib.parse
from typing import Any

from torchload.core.budget import Budget
from torchload.core.source import FileSource, MemorySource, Source, StreamSource
from torchload.core.text import printable
from torchload.errors import GET_IT_AGAIN, CheckpointFormatError, CheckpointNotFoundError, CorruptCheckpointError

__all__ = [
    "UNFINISHED_SUFFIXES",
    "folder_around",
    "path_inside",
    "path_text",
    "pointer_text",
    "source_of_file",
    "source_of_object",
    "status_of",
]

UNFINISHED_SUFFIXES = (".part", ".partial", ".crdownload", ".incomplete", ".download", ".aria2", ".tmp")

_MAX_LISTED = 10_000  # directory entries looked at for near names

_MAX_POINTER_BYTES = 4096

# Of torch.distributed.checkpoint; of DeepSpeed under ZeRO 3, where the parameters in them are empty.
_MEMBER_OF_FOLDER = re.compile(
    r"(?:__\d+)?\.metadata | __\d+_\d+\.distcp | (?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", re.VERBOSE
)

_HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<!\.pt)(?<!\.pth)(?<!\.bin)(?<!\.safetensors)"

_SPECIAL_KINDS = (
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def path_text(path: object) -> str | None:
    """The path as text, or ``None`` for anything that is not a path."""
    if isinstance(path, (str, os.PathLike)):
        return os.fsdecode(path)
    return None


def status_of(path: str) -> os.stat_result:
    """`os.stat` of a regular file or a folder.

    Raises:
        CheckpointNotFoundError: Nothing is there; the message names what is.
        CheckpointFormatError: It is a FIFO, a socket or a device.
        OSError: It can't be looked at, such as for lack of permission.
    """
    try:
        status = os.stat(path)
    except ValueError:
        raise CheckpointNotFoundError(f"{path!r} is not a path: it holds a NUL character.", path=path) from None
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}:
            raise CheckpointNotFoundError(_absence(path, error), path=path) from None
        raise
    for is_kind, kind in _SPECIAL_KINDS:
        if is_kind(status.st_mode):
            raise CheckpointFormatError(
                f"{path} is {kind}, not a file: a checkpoint is read at many places, not from front to back. "
                "Write it to a file first.",
                path=path,
                found=kind.split(" ", 1)[1],
            )
    return status


def path_inside(name: str, folder: str, path: str) -> str:
    """The path of a file that an index in a folder names; whoever wrote that does not choose what else is opened.

    Raises:
        CorruptCheckpointError: The name leads, or passes through a link that may lead, out of the folder.
    """
    parts = name.split("/")
    harmless = name.isprintable() and not any(character in name for character in "\\:")
    if not harmless or len(name) > 4096 or any(part in {"", ".", ".."} for part in parts):
        raise CorruptCheckpointError(
            f"{path} names the file {name[:200]!a}, which is not a plain file name inside its folder. It is not "
            "opened; an honest index never does this.",
            path=path,
        )
    step = folder
    for part in parts[:-1]:
        step = os.path.join(step, part)
        if os.path.islink(step):
            raise CorruptCheckpointError(
                f"{path} names the file {name!r}, but {step} is a link to another folder. It is not opened.",
                path=path,
            )
    return os.path.join(folder, *parts)


def source_of_file(path: str, budget: Budget | None = None) -> Source:
    """Open a regular file that holds something, as a part of the load with this budget, or as all of one.

    Raises:
        CorruptCheckpointError: The file is empty.
        CheckpointNotFoundError, CheckpointFormatError, OSError: As `status_of`.
    """
    status_of(path)
    source = FileSource(path, budget)
    if source.size == 0:
        source.close()
        problem = "is empty (0 bytes): the download or the save never wrote to it"
        raise CorruptCheckpointError(f"{path} {problem}. {GET_IT_AGAIN}", path=path, found="empty file")
    return source


def folder_around(path: str) -> str | None:
    """The folder of a file that is nothing without the others in it, such as one rank's; ``None`` for other files."""
    folder, name = os.path.split(path)
    if not _MEMBER_OF_FOLDER.fullmatch(name):
        return None
    return folder or os.curdir


def pointer_text(path: str) -> str:
    """The content of a small text file that names another file, such as ``latest``; what can't be text is cut off."""
    source = source_of_file(path)
    try:
        return source.read(0, min(source.size, _MAX_POINTER_BYTES)).decode("utf-8", "replace").strip()
    finally:
        source.close()


def source_of_object(file: Any) -> Source:
    """A binary file object as a source, from where it stands to its end; the object stays open and where it is.

    Raises:
        TypeError: It is no binary, seekable file object.
        CorruptCheckpointError: It is empty, or stands at its end.
    """
    name = getattr(file, "name", None)
    name = name if name and isinstance(name, str) else f"<{type(file).__name__}>"
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"{name} is open as text; open it in binary mode: open(path, 'rb')")
    if isinstance(file, io.IOBase) and not file.closed and not file.readable():
        raise TypeError(f"{name} is open for writing only; open it for reading: open(path, 'rb')")
    if callable(seekable := getattr(file, "seekable", None)) and not seekable():
        raise TypeError(
            f"{name} can't seek, and a checkpoint is read at many places. Write it to a file first, or read it into "
            "memory: io.BytesIO(stream.read())"
        )
    source: Source
    raw = getattr(file, "raw", file)
    if isinstance(file, io.BytesIO):
        source = MemorySource(file.getvalue(), name)  # shares the buffer until somebody writes to it
    elif isinstance(file, (io.FileIO, io.BufferedReader, io.BufferedRandom)) and isinstance(raw, io.FileIO):
        if file.writable():
            file.flush()
        source = FileSource.from_descriptor(raw.fileno(), name)
    elif callable(getattr(file, "seek", None)) and callable(getattr(file, "read", None)):
        source = StreamSource(file, name)
    else:
        raise TypeError(
            "a checkpoint is a path, a list of paths, a binary file object with seek and read, or a mapping such as a "
            f"state dict, not {type(file).__name__}"
        )
    position = file.tell()
    if source.size == 0 or position >= source.size:
        source.close()
        problem = (
            f"stands at its end ({source.size:,} bytes): call seek(0) first" if source.size else "is empty (0 bytes)"
        )
        raise CorruptCheckpointError(f"{name} {problem}.", path=name, found="empty file")
    return source.slice(position, source.size - position) if position else source


def _absence(path: str, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return f"{path} is a symbolic link that leads back to itself."
    if error.errno == errno.ENAMETOOLONG:
        return f"{path[:80]}... is not a path: the name is too long."
    if path.startswith("file:"):
        return f"{path} is a URL; give the path itself: {urllib.parse.unquote(urllib.parse.urlsplit(path).path)}"
    if path.startswith(("http://", "https://", "s3://", "gs://", "hf://")):
        return f"{path} is a URL; download it first and give the path of the file."
    if os.path.islink(path):
        return f"{path} is a symbolic link to {os.readlink(path)}, which does not exist. {GET_IT_AGAIN}"
    if not path:
        return "The path is empty; it must name a file or a folder."
    hint = _hint(path)
    return f"{path} does not exist. {hint}".rstrip()


def _hint(path: str) -> str:
    if path.startswith("~"):
        return f"'~' is not expanded; did you mean {os.path.expanduser(path)}?"
    folder, name = os.path.split(path.rstrip("/" + os.sep))
    if not os.path.isdir(folder or os.curdir):
        existing = folder
        while existing and not os.path.isdir(existing) and existing != os.path.dirname(existing):
            existing = os.path.dirname(existing)
        if re.fullmatch(_HUB_ID, repository := re.sub(r"^hf[-_]hub:", "", path)):
            return (
                "If it is the id of a model on the Hugging Face hub, download it first and give the folder: "
                f"huggingface_hub.snapshot_download({repository!r})."
            )
        return f"The folder {folder} does not exist either; {existing or os.curdir} does."
    try:
        with os.scandir(folder or os.curdir) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MAX_LISTED))]
    except OSError:
        return ""
    unfinished = [found for found in names if found.startswith(name) and found.endswith(UNFINISHED_SUFFIXES)]
    if unfinished:
        return f"{printable(unfinished[0])} is there: its download has not finished."
    import difflib

    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(map(printable, near))}?"
    if not os.path.isabs(path):
        return f"The path is relative to {os.getcwd()}."
    return ""
