"""Replace a file as a whole: readers see the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["replacing"]

_NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_BUFFER_BYTES = 1 << 20


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A temporary file in the same folder, which takes the name of `path` once its data is on the disk.

    Whatever happens before that removes it, and leaves what was at `path` as it was. A symbolic link is followed: what
    it points at is replaced. Permissions are those of any new file, as the umask says.

    Args:
        path: The name that the file will have. Its folder must exist.

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
    folder, name = os.path.split(final)
    if os.path.isdir(final):
        raise IsADirectoryError(errno.EISDIR, "is a folder: give the name of the file to write", path)
    if os.path.exists(final) and not os.path.isfile(final):  # a rename would take its place
        raise OSError(errno.EINVAL, "is not a regular file, so it can't be replaced by one", path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, f"the folder {folder} does not exist; create it first", path)
    temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "x+b", buffering=_BUFFER_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise _no_room(error, path, exists=os.path.exists(final)) from error
        raise
    _sync_folder(folder)


def _no_room(error: OSError, path: str, *, exists: bool) -> OSError:
    before = "The file that was there is unchanged." if exists else "Nothing was left behind."
    return OSError(error.errno, f"{os.strerror(error.errno or 0)}, so the file was not saved. {before}", path)


def _sync_folder(folder: str) -> None:
    """Make the new name last; not every system can, and the data itself is safe already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
