"""Several loads at once, forked workers, and whatever mode the caller is in: nothing changes but the model."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.security._machine import ROOT, changed, descriptors, in_child, needs_proc, snapshot, tower
from tests.threads import python_threads
from torchload import inspect_checkpoint, read_state_dict, smart_load
from torchload.core.collector import collector_paused
from torchload.errors import TorchLoadError


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for value in range(1, 5):
        path = str(tmp_path / f"{value}.{'pth' if value % 2 else 'safetensors'}")
        state = tower(float(value)).state_dict()
        if value % 2:
            torch.save(state, path, _use_new_zipfile_serialization=value == 1)
        else:
            save_file(state, path)
        paths.append(path)
    return paths


def _value(path: str) -> float:
    return float(Path(path).stem)


@needs_proc
def test_many_threads_load_many_models(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(Path(files[0]).read_bytes()[:-100])
    before = descriptors()

    def work(number: int) -> None:
        path = files[number % len(files)]
        model = tower()
        smart_load(model, path, atomic=number % 3 == 0, verify=number % 2 == 0)
        assert {layer.bias[0].item() for layer in model} == {_value(path)}
        assert inspect_checkpoint(path)
        assert len(read_state_dict(path)) == 8
        with pytest.raises(TorchLoadError):
            smart_load(model, tmp_path / "broken.pth")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(64)))
    assert gc.isenabled()
    assert descriptors() == before


def test_one_file_object_serves_several_loads(files: list[str]) -> None:
    """One after the other, from its beginning each time: where it stands is shared by all who have it."""
    with open(files[0], "rb") as file:
        for model in (tower(), tower()):
            file.seek(0)
            smart_load(model, file)
            assert model[0].bias[0].item() == 1.0
            assert file.read() == b"", "it stands behind what was read"


# --- the collector, which all threads share ---


def test_pauses_of_several_threads_overlap() -> None:
    assert gc.isenabled()
    first, second = collector_paused(), collector_paused()
    with contextlib.ExitStack() as outer:
        with first:
            outer.enter_context(second)
            assert not gc.isenabled()
        assert not gc.isenabled()  # the second still goes on
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused(), collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_pause_that_is_never_ended_ends_with_its_object() -> None:
    # What an interrupt between two steps of a `with` statement leaves.
    pause = collector_paused()
    pause.__enter__()
    assert not gc.isenabled()
    del pause
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_amid_a_pause_of_another_thread() -> None:
    script = """
import gc, os, threading
from torchload.core.collector import collector_paused
inside, leave = threading.Event(), threading.Event()
def pause():
    with collector_paused():
        inside.set()
        leave.wait()
thread = threading.Thread(target=pause)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    ok = gc.isenabled()
    with collector_paused():
        ok = ok and not gc.isenabled()
    os._exit(0 if ok and gc.isenabled() else 1)
_, status = os.waitpid(child, 0)
leave.set()
thread.join()
print(os.WEXITSTATUS(status), gc.isenabled())
"""
    assert in_child(script) == "0 True\n"


# --- forked workers ---

FORK = """
import os, sys, torch
from torchload import smart_load, read_state_dict
path = sys.argv[1]
model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
if sys.argv[2] == "after a load":
    smart_load(model, path, verify=True)
    smart_load(model, path, dtype=torch.float16)
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            mine = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
            smart_load(mine, path, verify=True, atomic=True)
            smart_load(mine, path, mmap=True, dtype=torch.float32)
            status = 0 if mine[3].bias[0].item() == 1.0 and len(read_state_dict(path)) == 8 else 2
        finally:
            os._exit(status)
    children.append(child)
print([os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["before any load", "after a load"])
def test_forked_workers_load(files: list[str], when: str) -> None:
    assert in_child(FORK, files[0], when) == "[0, 0, 0, 0]\n"


# --- modes of the caller ---


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype float16": lambda: _default_dtype(torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "deterministic algorithms": _deterministic,
    "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor, lambda tensor: tensor
    ),
    "detect_anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
}
WAYS: dict[str, dict[str, Any]] = {
    "in place": {},
    "atomic": {"atomic": True},
    "cast": {"dtype": torch.float16},
    "mapped": {"dtype": torch.float32, "mmap": True, "atomic": True},
    "verified": {"verify": True},
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_mode_of_the_caller_changes_nothing(files: list[str], number: int, mode: str, way: str) -> None:
    expected, model = tower(), tower()
    smart_load(expected, files[number], **WAYS[way])
    parameters = list(model.parameters())
    with MODES[mode]():
        report = smart_load(model, files[number], **WAYS[way])
    assert report.tensors == 8
    assert not changed(model, snapshot(expected))
    for parameter, before in zip(model.parameters(), parameters, strict=True):
        assert parameter is before
        assert parameter.requires_grad
        assert not parameter.is_inference()
        assert parameter.device.type == "cpu"
    if way != "cast":  # and they can be trained
        model(torch.ones(2, 32)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()


def _process_state() -> dict[str, Any]:
    return {
        "threads of torch": torch.get_num_threads(),
        "threads between": torch.get_num_interop_threads(),
        "collector": gc.isenabled(),
        "thresholds": gc.get_threshold(),
        "frozen": gc.get_freeze_count(),
        "filters": list(warnings.filters),
        "switch interval": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "umask": (mask := os.umask(0o22), os.umask(mask))[0],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT)],
        "path": list(sys.path),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "running": python_threads(),
        "hook": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "random": random.getstate(),
    }


@pytest.mark.parametrize("way", WAYS)
def test_the_process_is_as_it_was(files: list[str], way: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(Path(files[0]).read_bytes()[:500])
    model = tower()
    before, noise = _process_state(), torch.get_rng_state()
    for path in files:
        smart_load(model, path, **WAYS[way])
        with pytest.raises(TorchLoadError):
            smart_load(model, broken, **WAYS[way])
    after = _process_state()
    assert {name for name in before if before[name] != after[name]} == set()
    assert torch.equal(torch.get_rng_state(), noise)
    assert ROOT.exists()
