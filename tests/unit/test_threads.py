"""Helpers under a storm of interrupts: each has run to its end, or never begins."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.threads import python_threads
from torchload.core.threads import Helper
from torchload.model.swap import _uninterrupted

STORM_SECONDS = 1.5

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_helper_is_over_once_it_was_waited_for() -> None:
    chooser = random.Random(0)
    stopped = 0
    running = python_threads()
    deadline = time.monotonic() + STORM_SECONDS
    while time.monotonic() < deadline:
        begun: list[bool] = []
        ended: list[bool] = []

        def work(begun: list[bool] = begun, ended: list[bool] = ended) -> None:
            begun.append(True)
            time.sleep(0.0001)
            ended.append(True)

        helper = Helper(work)
        try:
            signal.setitimer(signal.ITIMER_REAL, chooser.uniform(0.00002, 0.0004))
            try:
                helper.start()
                helper.join()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            stopped += 1
        helper.join()
        assert begun == ended
    assert stopped > 20
    assert python_threads() == running


def test_what_must_not_stop_half_way_is_done_or_not_begun() -> None:
    chooser = random.Random(0)
    before = after = 0
    deadline = time.monotonic() + STORM_SECONDS
    while time.monotonic() < deadline:
        steps: list[int] = []

        def action(steps: list[int] = steps) -> None:
            steps.append(1)
            time.sleep(0.0001)
            steps.append(2)

        try:
            signal.setitimer(signal.ITIMER_REAL, chooser.uniform(0.00002, 0.0006))
            try:
                after += _uninterrupted(action) is not None
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            before += 1
        assert steps in ([], [1, 2])
    assert before > 5
    assert after > 20
