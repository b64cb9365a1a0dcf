"""Whatever a file names, in whatever format, is not called, not imported and not looked up.

A child process listens to what the interpreter itself reports (`sys.addaudithook`) while it opens every combination of
a function, a way to call it, and a format. A file that a call would have left behind is looked for as well.
"""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import pytest

from tests.security._machine import in_child
from tests.security._payloads import CALLABLES, CONTAINERS, calls

WAYS = len(list(calls("os.system", "")))

LISTEN = """
import os, sys
from pathlib import Path
from tests.security._payloads import CALLABLES, CONTAINERS, calls
from torchload import inspect_checkpoint, smart_load
from torchload.errors import TorchLoadError
import torch

folder, marker = Path(sys.argv[1]), sys.argv[2]
model = torch.nn.Linear(3, 2)
WATCHED = tuple(
    "import exec compile pickle. os. subprocess. socket. ctypes.dlopen ctypes.call urllib. marshal. code.__new__ "
    "function.__new__ builtins.input webbrowser. shutil. tempfile. sys.settrace sys.setprofile gc. cpython.run pty. "
    "ftplib. http. smtplib. signal. winreg. msvcrt.".split()
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
HARMLESS = ("os.listdir", "os.scandir", "os.fwalk")
heard, listening, count = [], False, 0

def listen(event, arguments):
    if listening and event.startswith(WATCHED) and event not in HARMLESS:
        heard.append((event, repr(arguments)[:200]))
    if listening and event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        heard.append((event, repr(arguments)[:200]))

def attempt(path):
    for action in (lambda: inspect_checkpoint(path), lambda: smart_load(model, path)):
        try:
            action()
        except TorchLoadError:
            pass

def write(container, payload):
    content = CONTAINERS[container](payload)
    path = folder / (container.replace(" ", "_") + (".d" if isinstance(content, dict) else ".bin"))
    if isinstance(content, dict):
        for name, part in content.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(part)
    else:
        path.write_bytes(content)
    return path

sys.addaudithook(listen)
for container in CONTAINERS:
    for payload in calls(CALLABLES[0], "true"):  # torchload's own imports happen now
        attempt(write(container, payload))
modules = set(sys.modules)
for number, qualified in enumerate(CALLABLES):
    payloads = list(calls(qualified, f"touch {marker}"))
    for shift, container in enumerate(CONTAINERS):
        for payload in payloads if sys.argv[3] == "all" else [payloads[(number + shift) % len(payloads)]]:
            path = write(container, payload)
            listening = True
            attempt(path)
            listening = False
            count += 1
            if heard:
                print(qualified, container, payload, heard)
                raise SystemExit(1)
assert not os.path.exists(marker)
assert set(sys.modules) == modules, set(sys.modules) - modules
print(count)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("which", "ways"), [("some", 1), pytest.param("all", WAYS, marks=pytest.mark.slow)])
def test_nothing_is_called_imported_or_looked_up(which: str, ways: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "files").mkdir()
    count = in_child(LISTEN, str(tmp_path / "files"), str(marker), which, seconds=500)
    assert int(count) == len(CALLABLES) * ways * len(CONTAINERS)
    assert not marker.exists()


def test_the_payloads_work_where_they_are_believed(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    worked = 0
    for payload in calls("os.system", f"touch {tmp_path}/marker"):
        marker = tmp_path / "marker"
        marker.unlink(missing_ok=True)
        with contextlib.suppress(Exception):  # whatever becomes of it
            pickle.loads(payload)
        worked += marker.exists()
    assert worked >= 5
