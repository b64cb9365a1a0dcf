"""Threads: helpers under a storm of interrupts, each of which runs to its end or never begins; and forked children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security._machine import in_child
from tests.threads import CHILD_IS_WAITED_FOR

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")

STORM = """
import random, signal, time
from tests.threads import python_threads
from torchload.core.threads import Helper
from torchload.model.swap import _uninterrupted

signal.signal(signal.SIGALRM, signal.default_int_handler)
chooser = random.Random(0)
running = python_threads()
before = after = 0

def interrupted(action, microseconds):
    try:
        signal.setitimer(signal.ITIMER_REAL, chooser.uniform(20, microseconds) / 1e6)
        try:
            return action()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return "interrupted"

for _ in range(4000):
    steps = []

    def work():
        steps.append(1)
        time.sleep(0.0001)
        steps.append(2)
"""

HELPERS = """
    helper = Helper(work)
    def run():
        helper.start()
        helper.join()
    before += interrupted(run, 400) == "interrupted"
    helper.join()
    assert steps in ([], [1, 2]), steps
assert before > 20, before
assert python_threads() == running
"""

SWAPS = """
    outcome = interrupted(lambda: _uninterrupted(work), 600)
    before += outcome == "interrupted"
    after += isinstance(outcome, KeyboardInterrupt)
    assert steps in ([], [1, 2]), steps
assert after > 20, after
"""


def test_a_helper_is_over_once_it_was_waited_for() -> None:
    in_child(STORM + HELPERS)


def test_what_must_not_stop_half_way_is_done_or_not_begun() -> None:
    in_child(STORM + SWAPS)


FORKED = """
import os, sys
import torch
from torchload import smart_load
from torchload.errors import CastOverflowError

path, options = sys.argv[1], sys.argv[2]
weight = torch.randn(1024, 1024)
weight[-1, -1] = 1e9 if "overflows" in options else 0
torch.save({"weight": weight}, path)
if "several" in options:
    torch.set_num_threads(2)  # from then on MKL has a number of its own
torch.ones(4_000_000).sum()  # starts OpenMP's threads, which a child has not
child = os.fork()
if not child:
    model = torch.nn.Linear(1024, 1024, bias=False)
    try:
        smart_load(model, path, **eval(options))
    except CastOverflowError:
        os._exit(7 if "overflows" in options else 1)
    os._exit(1 if "overflows" in options else 7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "options",
    [
        "{}",
        "{'verify': True}",
        "{'dtype': torch.float16}",
        "{'dtype': torch.float16}  # several",
        "{'dtype': torch.float16}  # overflows",
        "{'dtype': torch.float16}  # several, overflows",
    ],
)
def test_a_forked_child_does_not_wait_for_threads_that_it_lacks(tmp_path: Path, options: str) -> None:
    """A single worker's operators must not want several threads either."""
    command = [sys.executable, "-W", "ignore", "-c", FORKED + CHILD_IS_WAITED_FOR, str(tmp_path / "x.pth"), options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 7, done.stderr
