"""Writes pickles that no pickler would, and reads what is hostile where it can do no harm."""

from __future__ import annotations

import gc
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import pytest

from torchload.errors import TorchLoadError

SECONDS = 5
"""CPU time, not the clock's: a machine that does other things meanwhile changes nothing."""
MEMORY_BYTES = 256 << 20
LONGEST_MESSAGE = 50_000  # characters of an error

_BACKSTOP_SECONDS = 600  # by the clock, for what waits forever
_BACKSTOP_BYTES = 2 << 30  # of address space, so that no test takes all of a machine's memory

PROTO = b"\x80\x02"
STOP = b"."


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


class Measured(NamedTuple):
    """What an action came to in a process of its own.

    Attributes:
        outcome: What `work` returned, cut to 4 KiB; empty if the process ended before.
        status: How the process ended, as ``os.wait4`` tells it.
        cpu_seconds: What it took of all cores together, user and system.
        peak_bytes: The most memory it had at any time beyond what it began with, pages of files included.
    """

    outcome: str
    status: int
    cpu_seconds: float
    peak_bytes: int

    @property
    def within_bounds(self) -> bool:
        return self.cpu_seconds <= SECONDS and self.peak_bytes <= MEMORY_BYTES


ACCOUNTS: list[Measured] = []
"""Of all that was contained so far."""


def measured(work: Callable[[], str]) -> Measured:
    """Do something in a process of its own, and let the kernel keep the account.

    A forked process begins with its parent's memory as its peak, and with no CPU time; the kernel notes the highest
    peak and all time until the very end, however that comes about.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            os.write(writer, struct.pack("<Q", _statm(1)))
            _set_backstops()
            gc.disable()  # as `open_checkpoint` does
            os.write(writer, work().encode(errors="replace")[:4096])
            status = 0
        except BaseException:  # noqa: BLE001 - a forked child must not run on
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reported = pipe.read()
    _, status, usage = os.wait4(child, 0)
    [before] = struct.unpack("<Q", reported[:8])
    seconds = usage.ru_utime + usage.ru_stime
    return Measured(reported[8:].decode(errors="replace"), status, seconds, (usage.ru_maxrss << 10) - before)


def contained(action: Callable[[], object]) -> str:
    """What an action comes to in a process of its own, within the promised bounds.

    Returns:
        ``"done"``, or the text of the `TorchLoadError` that it raised. Anything else fails the test: another exception,
        a crash, more than `MEMORY_BYTES` beyond what the process began with, more than `SECONDS` of CPU time.
    """
    if not hasattr(os, "fork") or not os.path.exists("/proc/self/statm"):
        pytest.skip("needs fork and /proc")

    def work() -> str:
        try:
            action()
        except TorchLoadError as error:
            if len(str(error)) > LONGEST_MESSAGE:
                raise AssertionError(f"a message of {len(str(error)):,} characters") from None
            return str(error)
        return "done"

    found = measured(work)
    account = f"{found.cpu_seconds:.1f} s of CPU time, {found.peak_bytes >> 20} MiB"
    if os.WIFSIGNALED(found.status):
        pytest.fail(f"ended by signal {signal.Signals(os.WTERMSIG(found.status)).name} after {account}")
    assert os.WEXITSTATUS(found.status) == 0, f"ended with an exception that is no TorchLoadError, after {account}"
    assert found.within_bounds, f"took {account}"
    ACCOUNTS.append(found)
    return found.outcome


def _statm(field: int) -> int:
    """A number of ``/proc/self/statm`` in bytes: 0 is all address space, 1 what is in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[field]) * resource.getpagesize()


def _set_backstops() -> None:
    """What has lost all bounds is stopped."""
    space = _statm(0) + _BACKSTOP_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_BACKSTOP_SECONDS)
