"""The files of a set: opened one after the other, closed together, and told of as one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torchload.core.checkpoint import Checkpoint
from torchload.errors import TorchLoadError

__all__ = ["Members", "OpenMember", "naming"]

OpenMember = Callable[[str], Checkpoint]


class Members:
    """Files that are opened to be one checkpoint. As a context manager it closes them where that fails.

    Attributes:
        opened: Those that are open, in the order in which they were opened.
    """

    def __init__(self, open_member: OpenMember) -> None:
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


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors from inside that name no file are about this set."""
    try:
        yield
    except TorchLoadError as error:
        error._name(path)
        raise
