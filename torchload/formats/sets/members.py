"""The files of a set: opened one after the other, closed together, and told of as one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torchload.core.budget import Budget
from torchload.core.checkpoint import Checkpoint, TensorEntry
from torchload.errors import TorchLoadError

__all__ = ["Members", "OpenFile", "OpenMember", "may_be_same", "naming"]

OpenFile = Callable[[str], Checkpoint]


class OpenMember(Protocol):
    """Opens a file or a folder that is a part of a set.

    Attributes:
        budget: What the whole load may cost.
    """

    budget: Budget

    def __call__(self, path: str, /) -> Checkpoint: ...


class Members:
    """Files that are opened to be one checkpoint. As a context manager it closes them where that fails.

    Attributes:
        opened: Those that are open, in the order in which they were opened.
    """

    def __init__(self, open_member: OpenFile) -> None:
        self._open_member = open_member
        self.opened: list[Checkpoint] = []

    def __enter__(self) -> Members:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.close()

    def open(self, path: str) -> Checkpoint:
        """Open one more."""
        self.opened.append(self._open_member(path))
        return self.opened[-1]

    def close(self, first: int = 0) -> None:
        """Close them again, from the given one on."""
        for checkpoint in self.opened[first:]:
            checkpoint.close()
        del self.opened[first:]

    def joined(self, path: str, kind: str, root: Any, notes: Sequence[str] = ()) -> Checkpoint:
        """What they are together."""
        return Checkpoint(
            path,
            kind,
            root,
            tuple(source for checkpoint in self.opened for source in checkpoint.sources),
            checksums=all(checkpoint.checksums for checkpoint in self.opened),
            notes=(*dict.fromkeys(note for checkpoint in self.opened for note in checkpoint.notes), *notes),
        )


def may_be_same(one: Any, other: Any) -> bool:
    """Whether two files hold the same value, as far as can be told without data: by checksums where there are any."""
    if not (isinstance(one, TensorEntry) and isinstance(other, TensorEntry)):
        is_plain = isinstance(one, (str, int, float, bool, bytes, type(None)))
        return is_plain and type(one) is type(other) and bool(one == other)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for here, there in zip(one.boxes, other.boxes):
        sums = here.extent.crc32, there.extent.crc32
        if one.nbytes == here.extent.nbytes == there.extent.nbytes and None not in sums and sums[0] != sums[1]:
            return False
    return True


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors from inside that name no file are about this set."""
    try:
        yield
    except TorchLoadError as error:
        error._name(path)
        raise
