"""Let a model show new memory, all of it, while other threads may be using it.

Three things must not happen. Half of a model: an interrupt (Ctrl-C) reaches the main thread only, so the swap runs in
another one, to its end. A crash: an operator that another thread has begun reads the old memory without owning it, for
torch keeps the *tensor* that it was given, not what the tensor showed then; so old memory is kept until it is done, and
until kernels are that were queued on any stream of a device: torch hands it out again as soon as nobody holds it. A
forward pass that sees some layers old and some new: only a lock that forward passes take as well can prevent that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torchload.core.threads import Helper
from torchload.model.target import Slot, settle

__all__ = ["Exchange"]

PATIENCE_SECONDS = 2.0
"""How long old memory is kept for operators of other threads. Few run as long on the CPU, and what an unfinished
backward graph holds is held for longer."""
_PAUSE_SECONDS = 0.0005

Change = tuple[Slot, torch.Tensor]


class Exchange:
    """New memory for slots of a model, and the way back.

    Attributes:
        shown: The slots that show their new memory, or may, at this moment.
    """

    def __init__(
        self,
        changes: Sequence[Change],
        *,
        keeps_old: bool = False,
        guard: AbstractContextManager[object] | None = None,
    ) -> None:
        """Nothing is changed yet.

        Args:
            changes: (slot, what it shows from now on).
            keeps_old: Whether the model may be in use, and what it shows now is kept: if one slot fails, all show it
                again, and operators that other threads began earlier are waited for.
            guard: What to hold meanwhile, such as a lock that forward passes take.
        """
        self.shown: list[Slot] = []
        self._changes = changes
        self._before = [
            (slot, tensor, _kept(slot, tensor, data)) for slot, tensor, data in _tensors(changes, keeps_old)
        ]
        self._keeps_old = keeps_old
        self._guard = guard if guard is not None else contextlib.nullcontext()

    def make(self) -> BaseException | None:
        """Let all slots show their new memory.

        Returns:
            An interrupt that came meanwhile, which the caller has yet to raise. One that comes before is raised, and
            all is as it was.
        """
        if not self._changes:
            return None
        if not self._keeps_old:
            _finish_kernels({tensor.device for _, tensor, _ in _tensors(self._changes, True)})
        return self._guarded(self._install)

    def take_back(self) -> None:
        """Let all slots show what they showed before, if that was kept; does nothing where they do."""
        if not (self.shown and self._keeps_old):
            return
        try:
            interrupt = self._guarded(self._reinstall)
        except BaseException:
            if self.shown:  # the guard failed, which is left out from now on
                self._guarded(self._reinstall)
            raise
        if interrupt is not None:
            raise interrupt

    def _guarded(self, action: Callable[[], object]) -> BaseException | None:
        devices = {tensor.device for _, tensor, _ in self._before}
        interrupt: BaseException | None = None
        failure: BaseException | None = KeyboardInterrupt()  # until it is done, whatever a guard makes of errors
        guard, self._guard = self._guard, contextlib.nullcontext()
        with guard:  # itself, with nothing around it in which an interrupt would leave it held
            try:
                interrupt, failure = _uninterrupted(action), None
            except BaseException as error:  # noqa: BLE001 - raised below
                failure = error
        self._guard = guard  # one that fails may be held for ever, and isn't asked for again
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # its traceback holds this frame
        return _outlast([tensor for _, tensor, _ in self._before], devices) or interrupt

    def _install(self) -> None:
        try:
            with torch.no_grad():
                for slot, data in self._changes:
                    self.shown.append(slot)
                    slot.install(data)
                settle([slot for slot, _ in self._changes])
        except BaseException:
            if self._keeps_old:
                self._reinstall()
            raise

    def _reinstall(self) -> None:
        with torch.no_grad():
            for slot, _, data in self._before:
                slot.install(data)
            settle([slot for slot, _, _ in self._before])
        self.shown.clear()


def _tensors(changes: Sequence[Change], wanted: bool) -> list[tuple[Slot, torch.Tensor, torch.Tensor]]:
    """Each tensor object that is about to show other memory, with its slot and that memory."""
    if not wanted:
        return []
    return [(slot, tensor, data) for slot, data in changes for tensor in (slot.tensor, *slot.twins)]


def _kept(slot: Slot, tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """What a tensor shows, to be shown again; a copy where its memory is filled and not replaced."""
    if is_lazy(tensor):
        lazy: Any = type(tensor)
        return lazy(device=tensor.device, dtype=tensor.dtype)  # type: ignore[no-any-return]
    return tensor.detach().clone() if slot.is_filled_by(data) else tensor.detach()


def _uninterrupted(action: Callable[[], object]) -> BaseException | None:
    """Do something that must not stop half-way.

    Returns:
        An interrupt that came meanwhile. One that comes before is raised, and nothing is done.
    """
    if threading.get_ident() != threading.main_thread().ident:
        action()
        return None
    turn = [action]  # who takes it out decides: the helper, or what came before it
    errors: list[BaseException] = []

    def work() -> None:
        try:
            turn.pop()()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    helper = Helper(work)
    interrupt: BaseException | None = None
    try:
        helper.start()
        helper.join()
    except BaseException as error:  # noqa: BLE001 - left to the caller
        try:
            taken = turn.pop()
        except IndexError:  # it has begun
            interrupt = error
        else:
            if not isinstance(error, RuntimeError):
                raise
            turn.append(taken)  # no thread is to be had: do it here
            work()
    is_over = False
    while not is_over:
        try:
            helper.join()
            is_over = True
        except BaseException as error:  # noqa: BLE001 - left to the caller
            interrupt = error
    try:
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # its traceback holds this frame
    return interrupt


def _outlast(before: Iterable[torch.Tensor], devices: Iterable[torch.device]) -> BaseException | None:
    """Wait until operators that other threads began before now, and their kernels, are done with these tensors.

    An operator holds a reference to each tensor it was given. Once no one but Python does, none is left.

    Returns:
        An interrupt that ended the wait.
    """
    try:
        busy: list[Any] = [tensor for tensor in before if not is_lazy(tensor)] if threading.active_count() > 1 else []
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (busy := [tensor for tensor in busy if tensor._use_count() > 1]) and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
        _finish_kernels(devices)
    except BaseException as error:  # noqa: BLE001 - left to the caller
        return error
    return None


def _finish_kernels(devices: Iterable[torch.device]) -> None:
    """Wait for devices whose memory is to be given up: microseconds, where nothing is queued."""
    for device in devices:
        synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
        if synchronize is not None:
            synchronize(*[] if device.type == "mps" else [device])  # of which there is one
