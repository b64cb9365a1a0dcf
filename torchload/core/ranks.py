"""Ranks that act together: what happens to one is known to all."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torchload.errors import TorchLoadError

__all__ = ["Ranks", "attempt"]

WRITER = 0
ResultT = TypeVar("ResultT")


class Ranks:
    """The ranks of a process group, or this process alone.

    Args:
        together: Whether all ranks take part, where there is a process group; otherwise this process acts alone.
        group: The process group; by default the one of all ranks.
    """

    def __init__(self, *, together: bool, group: Any = None) -> None:
        distributed: Any = torch.distributed if together and torch.distributed.is_available() else None
        self._distributed: Any = distributed if distributed is not None and distributed.is_initialized() else None
        self.group = group
        self.count: int = self._distributed.get_world_size(group) if self._distributed is not None else 1
        self.rank: int = self._distributed.get_rank(group) if self._distributed is not None else 0

    @property
    def is_writer(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == WRITER

    def global_rank(self, rank: int) -> int:
        """What a rank of this group is among all ranks: what its user knows it by."""
        return rank if self.group is None else int(self._distributed.get_global_rank(self.group, rank))

    def agree(self, error: BaseException | None, what: object) -> None:
        """Go on only if no rank has an `error`, and all mean the same by `what`, which is small.

        Raises:
            BaseException: `error`, or that of the first rank that has one.
            RuntimeError: The ranks mean different things.
        """
        answers = self.gather(error, what)
        if any(meant != answers[0] for meant in answers):
            raise RuntimeError(
                "The ranks hold different tensors, or save to different paths: one file can't hold them all. Save to a "
                "folder (a name without a suffix), or each rank's part under a name of its own with distributed=False. "
                "Nothing was saved."
            )

    def gather(self, error: BaseException | None, what: Any) -> list[Any]:
        """What every rank has to say, which is small, if none has an `error` that keeps it from going on.

        Raises:
            BaseException: `error`, or that of the first rank that has one.
            TorchLoadError: A rank isn't there any more.
        """
        answers: list[Any] = [(error, what)]
        if self.count > 1:
            answers *= self.count
            try:
                with torch.inference_mode(False):  # before torch 2.5, gloo can't write to inference tensors
                    self._distributed.all_gather_object(answers, (_portable(error), what), group=self.group)
            except RuntimeError as failure:  # gloo's and NCCL's
                if error is None:
                    error = _left_alone(failure)
        if error is not None:
            raise error
        for rank, (raised, _) in enumerate(answers):
            if raised is not None:
                raise _told_by(self.global_rank(rank), raised)
        return [said for _, said in answers]

    def exchange(self, everyones: list[torch.Tensor], mine: torch.Tensor) -> None:
        """Fill one tensor for each rank with what that rank sends.

        Raises:
            TorchLoadError: A rank isn't there any more.
        """
        try:
            self._distributed.all_gather(everyones, mine, group=self.group)
        except RuntimeError as failure:
            raise _left_alone(failure) from failure

    def share(self, error: BaseException | None, result: Any) -> Any:
        """What the writer has to say, on every rank.

        Raises:
            BaseException: The writer's `error`.
        """
        if self.count > 1:
            box = [(_portable(error), result)]
            with torch.inference_mode(False):
                self._distributed.broadcast_object_list(box, src=WRITER)
            if not self.is_writer:
                error, result = box[0]
        if error is not None:
            raise error
        return result


def attempt(work: Callable[[], ResultT]) -> tuple[BaseException | None, ResultT | None]:
    """What kept work from being done, which other ranks have to hear of before it is raised, and its result."""
    try:
        return None, work()
    except BaseException as error:  # noqa: BLE001 - the others wait, whatever happened
        return error, None


def _left_alone(failure: RuntimeError) -> TorchLoadError:
    error = TorchLoadError(
        "Another rank of the process group has ended, or did not come within the group's timeout: all of them must "
        f"make this call. What the group says: {failure}"
    )
    error.__cause__ = failure
    return error


def _told_by(rank: int, error: BaseException) -> BaseException:
    """Another rank's error, as one of this rank, where nothing was written."""
    where = f" (This happened on rank {rank}.)"
    if isinstance(error, TorchLoadError):
        error.message += where
    elif isinstance(error, OSError) and error.strerror:
        error.strerror += where
    else:
        error.args = (f"{error}{where}",)
    if hasattr(error, "written"):
        error.written = ()
    return error


def _portable(error: BaseException | None) -> BaseException | None:
    """An error that can be sent to another process, which may not know classes of somebody's own."""
    if error is None:
        return None
    if isinstance(error, TorchLoadError) or type(error).__module__ == OSError.__module__:
        known = isinstance(error, (OSError, TorchLoadError)) or type(error) in (TypeError, ValueError, RuntimeError)
        with contextlib.suppress(Exception):  # what it carries may be anything
            if known and pickle.dumps(error):
                return error
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return (OSError if isinstance(error, OSError) else RuntimeError)(text)
