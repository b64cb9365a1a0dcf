"""One rank works while the others wait, and what happens to one is known to all."""

from __future__ import annotations

from typing import Any

import torch

from torchload.errors import TorchLoadError

__all__ = ["Ranks"]

WRITER = 0


class Ranks:
    """The ranks of the default process group, or this process alone.

    Args:
        together: Whether all ranks take part, where there is a process group; otherwise this process acts alone.
    """

    def __init__(self, *, together: bool) -> None:
        distributed: Any = torch.distributed if together and torch.distributed.is_available() else None
        self._group: Any = distributed if distributed is not None and distributed.is_initialized() else None
        self.count: int = self._group.get_world_size() if self._group is not None else 1
        self.rank: int = self._group.get_rank() if self._group is not None else 0

    @property
    def is_writer(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == WRITER

    def agree(self, error: BaseException | None, what: object) -> None:
        """Go on only if every rank can, and means the same.

        Args:
            error: What keeps this rank from going on.
            what: What this rank is about to do; small, with equality.

        Raises:
            BaseException: `error`, or that of the first rank that has one.
            RuntimeError: The ranks mean different things.
        """
        if self.count == 1:
            if error is not None:
                raise error
            return
        answers: list[Any] = [None] * self.count
        self._group.all_gather_object(answers, (_portable(error), what))
        if error is not None:
            raise error
        for rank, (theirs, _) in enumerate(answers):
            if theirs is not None:
                if hasattr(theirs, "add_note"):  # Python 3.11
                    theirs.add_note(f"(on rank {rank})")
                raise theirs
        if any(meant != answers[0][1] for _, meant in answers):
            raise RuntimeError(
                "The ranks hold different tensors, or save to different paths: one file can't hold them all. Save each "
                "rank's part under a name of its own, with distributed=False. Nothing was saved."
            )

    def share(self, error: BaseException | None, result: Any) -> Any:
        """What the writer has to say, on every rank.

        Returns:
            The writer's `result`.

        Raises:
            BaseException: The writer's `error`.
        """
        if self.count > 1:
            box = [(_portable(error), result)]
            self._group.broadcast_object_list(box, src=WRITER)
            if not self.is_writer:
                error, result = box[0]
        if error is not None:
            raise error
        return result


def _portable(error: BaseException | None) -> BaseException | None:
    """An error that can be sent to another process."""
    if error is None or isinstance(error, (OSError, TorchLoadError)):
        return error
    if type(error) in (TypeError, ValueError, RuntimeError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
