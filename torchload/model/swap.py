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
from functools import partial
from typing import Any

import torch

from torchload.model.shards import is_sharded
from torchload.model.target import Slot, settle

__all__ = ["remember", "show_again", "swap"]

PATIENCE_SECONDS = 2.0
"""How long old memory is kept for operators of other threads. Few run as long on the CPU, and what an unfinished
backward graph holds is held for longer."""
_PAUSE_SECONDS = 0.0005

Change = tuple[Slot, torch.Tensor]
Memory = tuple[Slot, torch.Tensor, torch.Tensor]
"""A slot, its tensor, what the tensor showed."""


def remember(changes: Sequence[Change]) -> list[Memory]:
    """What slots show that are about to be changed; nothing for those on the meta device, which have no memory."""
    return [(slot, tensor, _kept(tensor)) for slot, tensor in _tensors(changes)]


def swap(
    changes: Sequence[Change], *, before: Sequence[Memory] = (), guard: AbstractContextManager[object] | None = None
) -> BaseException | None:
    """Install new memory in slots of a model.

    Args:
        changes: (slot, what it shows from now on).
        before: What they show now, where the model may be in use: if one slot fails, all show it again, and this
            waits until operators that other threads began earlier are done with it.
        guard: What to hold meanwhile, such as a lock that forward passes take.

    Returns:
        An interrupt that came too late: the model is changed, and the caller has yet to raise it.
    """
    if not changes:
        return None
    if not before:
        _finish_kernels({tensor.device for _, tensor in _tensors(changes)})
    with guard if guard is not None else contextlib.nullcontext():
        interrupt = _uninterrupted(partial(_install, changes, before))
    return _outlast(before, {data.device for _, _, data in before}) or interrupt


def show_again(before: Sequence[Memory], guard: AbstractContextManager[object] | None = None) -> None:
    """Take a swap back; the memory that it showed must be kept until then."""
    devices = {tensor.device for _, tensor, _ in before}
    with guard if guard is not None else contextlib.nullcontext():
        interrupt = _uninterrupted(partial(_reinstall, before))
    if interrupt := _outlast(before, devices) or interrupt:
        raise interrupt


def _tensors(changes: Sequence[Change]) -> list[tuple[Slot, torch.Tensor]]:
    return [(slot, tensor) for slot, _ in changes for tensor in (slot.tensor, *slot.twins) if _has_memory(slot)]


def _has_memory(slot: Slot) -> bool:
    return slot.shape is not None and not slot.tensor.is_meta


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor, to be shown again; a copy of a `DTensor`'s, which is filled and not replaced."""
    return tensor.detach().clone() if is_sharded(tensor) else tensor.detach()


def _install(changes: Sequence[Change], before: Sequence[Memory]) -> None:
    try:
        with torch.no_grad():
            for slot, data in changes:
                slot.install(data)
            settle([slot for slot, _ in changes])
    except BaseException:
        _reinstall(before)
        raise


def _reinstall(before: Sequence[Memory]) -> None:
    with torch.no_grad():
        for slot, _, data in before:
            slot.install(data)
        settle([slot for slot, _, _ in before])


def _uninterrupted(action: Callable[[], object]) -> BaseException | None:
    """Do something that must not stop half-way.

    Returns:
        An interrupt that came meanwhile. One that comes before is raised, and nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        action()
        return None
    turn = [action]  # who takes it out decides: the helper, or an interrupt before it
    done = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            turn.pop()()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)
        finally:
            done.set()

    interrupt = _start(threading.Thread(target=work, name="torchload-swap", daemon=True), turn)
    while not done.is_set():
        try:
            done.wait()
        except BaseException as error:  # noqa: BLE001 - left to the caller
            interrupt = error
    try:
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # its traceback holds this frame
    return interrupt


def _start(helper: threading.Thread, turn: list[Callable[[], object]]) -> BaseException | None:
    """Start the helper.

    Returns:
        An interrupt that came too late to stop it.
    """
    try:
        helper.start()
    except BaseException as error:
        try:
            action = turn.pop()
        except IndexError:
            return error
        if not isinstance(error, RuntimeError):
            raise
        turn.append(action)  # no thread is to be had: do it here
        helper.run()
    return None


def _outlast(before: Sequence[Memory], devices: Iterable[torch.device]) -> BaseException | None:
    """Wait until operators that other threads began before now, and their kernels, are done with these tensors.

    An operator holds a reference to each tensor it was given. Once no one but Python does, none is left.

    Args:
        before: The tensors.
        devices: Where the memory is that they showed.

    Returns:
        An interrupt that ended the wait.
    """
    try:
        busy: list[Any] = [tensor for _, tensor, _ in before] if threading.active_count() > 1 else []
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
