"""Replace a file or a folder as a whole: readers see the old one or the new one, never half of either.

The new one is written under a temporary name beside the old one. Its writer holds a lock on it, so what a killed
process left behind is told from what another one is writing, and the next save to the same name removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from torchload.core.text import printable

__all__ = ["replacing", "replacing_folder"]

_NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_BUFFER_BYTES = 1 << 20
_STEM_BYTES = 200  # of the 255 that a name may have; the rest is for the token
_TOKEN_BYTES = 6
_MODE_BITS = 0o777
_IS_WINDOWS = os.name == "nt"


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A temporary file in the same folder, which takes the name of `path` once its data is on the disk.

    Whatever happens before that removes it, and leaves what was at `path` as it was. A symbolic link is followed: what
    it points at is replaced. What is replaced hands on its permissions; those of a new file are as the umask says.

    Yields:
        The file, open for writing and seeking.

    Raises:
        FileNotFoundError: The folder does not exist.
        IsADirectoryError: `path` is a folder.
        OSError: `path` is a device, a pipe or the like; or the disk is full, or the device failed: the message says
            that the old file is unchanged.

    Example:
        >>> with replacing("weights.bin") as file:
        ...     _ = file.write(b"all of it")
        >>> os.path.getsize("weights.bin")
        9
    """
    final = os.path.realpath(path)
    if os.path.isdir(final):
        raise IsADirectoryError(errno.EISDIR, "is a folder: give the name of the file to write", path)
    before = _status(final)
    if before is not None and not stat.S_ISREG(before.st_mode):  # a rename would take its place
        raise OSError(errno.EINVAL, "is not a regular file, so it can't be replaced by one", path)
    with _taking_the_place_of(final, path, lambda name: _create(name, before)) as (temporary, descriptor):
        with open(descriptor, "w+b", buffering=_BUFFER_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not _IS_WINDOWS:  # which renames only what is closed; elsewhere the lock has to last until then
                os.replace(temporary, final)
        if _IS_WINDOWS:
            os.replace(temporary, final)


@contextlib.contextmanager
def replacing_folder(path: str, may_replace: Callable[[str], bool]) -> Iterator[str]:
    """A temporary folder beside `path`, which takes its name once everything is in it.

    Yields:
        The path of the temporary folder. What is written into it has to be on the disk already.

    Raises:
        FileExistsError: `path` is no folder, or one that holds something else.
        FileNotFoundError: The folder around it does not exist.
        OSError: As for `replacing`.
    """
    final = os.path.realpath(path)
    before = _status(final)
    if before is not None:
        if not os.path.isdir(final):
            raise FileExistsError(errno.EEXIST, "is a file, where a folder is to be written", path)
        if foreign := sorted(name for name in os.listdir(final) if not may_replace(name)):
            raise FileExistsError(
                errno.EEXIST, f"holds something else ({foreign[0]}): give the name of a new folder", path
            )
    with _taking_the_place_of(final, path, lambda name: _create_folder(name, before)) as (temporary, descriptor):
        try:
            yield temporary
            _sync_folder(temporary)
            _put_in_place(temporary, final)
        finally:
            if descriptor is not None:
                os.close(descriptor)


# --- the temporary one ---


@contextlib.contextmanager
def _taking_the_place_of(final: str, path: str, create: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """A temporary path and its descriptor. What is there is removed if anything fails; a full disk is told in words."""
    if not os.path.isdir(folder := os.path.dirname(final)):
        message = f"the folder {printable(folder, None)} does not exist; create it first"
        raise FileNotFoundError(errno.ENOENT, message, path)
    _remove_abandoned(final)
    try:
        with contextlib.ExitStack() as undo:
            temporary, descriptor = _claim(final, create)
            undo.callback(_remove, temporary)
            yield temporary, descriptor
            undo.pop_all()
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        before = "What was there before is unchanged." if os.path.exists(final) else "Nothing was left behind."
        what = f"{os.strerror(error.errno or 0)}, so it was not saved. {before}"
        raise OSError(error.errno, what, path) from error
    _sync_folder(folder)


def _stem(final: str) -> str:
    """What the names of its temporary files begin with; a name of 255 bytes leaves no room for more."""
    name = os.path.basename(final)
    while len(os.fsencode(name)) > _STEM_BYTES:
        name = name[:-1]
    return f".{name}."


def _temporary_path(final: str) -> str:
    return os.path.join(os.path.dirname(final), f"{_stem(final)}{secrets.token_hex(_TOKEN_BYTES)}.tmp")


def _claim(final: str, create: Callable[[str], Any]) -> tuple[str, Any]:
    """Make something under a temporary name, and lock it."""
    while True:
        temporary = _temporary_path(final)
        descriptor = create(temporary)
        with contextlib.suppress(OSError):  # not every file system has locks; then nothing is ever removed
            _lock(descriptor)
        if os.path.exists(temporary):  # another process may have taken it for abandoned before it was locked
            return temporary, descriptor
        if descriptor is not None:
            os.close(descriptor)


def _create(name: str, before: os.stat_result | None) -> int:
    """A new file with the permissions and, where this process may, the owner of the one that it will replace."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(name, flags, 0o666 if before is None else before.st_mode & _MODE_BITS)
    if before is not None and hasattr(os, "fchown"):
        with contextlib.suppress(OSError):
            os.fchown(descriptor, before.st_uid, before.st_gid)
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, before.st_mode & _MODE_BITS)
    return descriptor


def _create_folder(name: str, before: os.stat_result | None) -> int | None:
    os.mkdir(name)
    if before is not None:
        with contextlib.suppress(OSError):
            os.chmod(name, before.st_mode & _MODE_BITS)
    return None if _IS_WINDOWS else os.open(name, os.O_RDONLY)


def _lock(descriptor: int | None) -> None:
    """Lock what is open, or raise `BlockingIOError` where another process has."""
    if not _IS_WINDOWS and descriptor is not None:
        import fcntl  # not on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(final: str) -> None:
    """Delete what earlier saves to the same name have left that were killed."""
    pattern = re.compile(re.escape(_stem(final)) + rf"[0-9a-f]{{{2 * _TOKEN_BYTES}}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(os.path.dirname(final)) as entries:
        for name in [entry.path for entry in entries if pattern.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                if _IS_WINDOWS:  # which does not delete what somebody has open
                    _remove(name)
                    continue
                descriptor = os.open(name, os.O_RDONLY if os.path.isdir(name) else os.O_RDWR)
                try:
                    _lock(descriptor)
                    _remove(name)
                finally:
                    os.close(descriptor)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


# --- its place ---


def _put_in_place(temporary: str, final: str) -> None:
    """Give a folder its name; one that was there is exchanged for it, then deleted."""
    if not os.path.isdir(final):
        os.rename(temporary, final)
        return
    if not _exchange(temporary, final):  # between these two, and only there, a reader finds nothing
        aside = _temporary_path(final)
        os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except OSError:
            os.rename(aside, final)
            raise
        temporary = aside
    _remove(temporary)


def _exchange(one: str, other: str) -> bool:
    """Let two folders swap their names in one step; false where the system or its file system can't."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28
    at_current_folder, exchange = -100, 2
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(at_current_folder, names[0], at_current_folder, names[1], exchange) == 0


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _sync_folder(folder: str) -> None:
    """Make new names last; not every system can, and the data itself is safe already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
