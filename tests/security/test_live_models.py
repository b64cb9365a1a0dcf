"""Reloading a model that other threads are using: no crash, no mixture under a lock, nothing left over."""

from __future__ import annotations

import signal
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.security._machine import anonymous_bytes, changed, descriptors, in_child, needs_proc, snapshot, tower
from tests.threads import python_threads
from torchload import smart_load
from torchload.model.swap import _finish_kernels
from torchload.model.target import Slot

RELOADS = 100
LAYERS = 4


@pytest.fixture
def versions(tmp_path: Path) -> list[str]:
    """Two checkpoints of one model, whose outputs tell which of them made it."""
    paths = [str(tmp_path / f"{value}.pth") for value in (1, 2)]
    for value, path in enumerate(paths, 1):
        torch.save(tower(float(value), LAYERS).state_dict(), path)
    return paths


class _Server:
    """A thread that runs forward passes, and keeps what came out."""

    def __init__(self, model: nn.Module, lock: threading.Lock | None = None) -> None:
        self.outputs: set[float] = set()
        self.passes = 0
        self._model, self._lock = model, lock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        inputs = torch.zeros(8, 32)
        while not self._stop.is_set():
            if self._lock is not None:
                with self._lock, torch.inference_mode():
                    outputs = self._model(inputs)
            else:
                with torch.inference_mode():
                    outputs = self._model(inputs)
            self.outputs.update(outputs.unique().tolist())
            self.passes += 1

    def __enter__(self) -> _Server:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def test_with_a_lock_each_pass_sees_one_version(versions: list[str]) -> None:
    model, lock = tower(1.0, LAYERS), threading.Lock()
    with _Server(model, lock) as server:
        for number in range(RELOADS):
            smart_load(model, versions[number % 2], atomic=lock)
    assert server.passes > 10
    assert server.outputs <= {1.0 * LAYERS, 2.0 * LAYERS}
    assert not lock.locked()


def test_without_a_lock_each_tensor_is_of_one_version(versions: list[str]) -> None:
    # Between its layers a pass may change over from one version to the other; within a tensor it may not.
    model = tower(1.0, LAYERS)
    possible = {float(ones + 2 * (LAYERS - ones)) for ones in range(LAYERS + 1)}
    with _Server(model) as server:
        for number in range(RELOADS):
            smart_load(model, versions[number % 2], atomic=True)
    assert server.passes > 10
    assert server.outputs <= possible


def test_the_lock_is_held_for_the_swap_alone(versions: list[str]) -> None:
    model = tower(1.0, LAYERS)
    before = snapshot(model)
    held: list[str] = []

    class Lock:
        def __enter__(self) -> None:
            held.append("taken" if not changed(model, before) else "too late")

        def __exit__(self, *exc: object) -> None:
            held.append("released" if len(changed(model, before)) == LAYERS else "too early")

    smart_load(model, versions[1], atomic=Lock(), progress=lambda done, total: held.append("read"))
    assert held[-2:] == ["taken", "released"]
    assert set(held[:-2]) == {"read"}


def test_atomic_is_a_bool_or_a_lock(versions: list[str]) -> None:
    with pytest.raises(TypeError, match="atomic is a bool or a lock"):
        smart_load(tower(), versions[0], atomic="yes")  # type: ignore[arg-type]


BUSY = """
import sys, threading, torch, torchload.model.swap
from torchload import smart_load

class Big(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4 << 20), requires_grad=False)

torchload.model.swap.PATIENCE_SECONDS = float(sys.argv[2])
torch.set_num_threads(1)
model, stop = Big(), threading.Event()
torch.save(model.state_dict(), sys.argv[1])

def serve():
    while not stop.is_set():
        torch.exp(model.weight)  # releases the GIL for milliseconds, and owns no storage

threads = [threading.Thread(target=serve) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    smart_load(model, sys.argv[1], atomic=True)
stop.set()
for thread in threads:
    thread.join()
print("survived")
"""


def test_an_operator_that_runs_keeps_the_memory_it_reads(tmp_path: Path) -> None:
    # Two seconds as a rule; here as many operators as run within a fifth of one.
    assert in_child(BUSY, str(tmp_path / "big.pth"), "0.2") == "survived\n"


@needs_proc
def test_nothing_grows_with_reloads(versions: list[str]) -> None:
    model = tower(1.0, LAYERS, 32)
    for number in range(20):
        smart_load(model, versions[number % 2], atomic=True)
    open_before, memory_before, threads_before = descriptors(), anonymous_bytes(), python_threads()
    for number in range(RELOADS):
        smart_load(model, versions[number % 2], atomic=True)
    assert descriptors() == open_before
    assert python_threads() == threads_before
    assert anonymous_bytes() - memory_before < 8 << 20


@needs_proc
def test_old_memory_is_freed(tmp_path: Path) -> None:
    model = nn.Linear(4096, 2048)  # 32 MiB: ten copies would show
    path = tmp_path / "large.pth"
    torch.save(model.state_dict(), path)
    smart_load(model, path, atomic=True)
    before = anonymous_bytes()
    for _ in range(10):
        smart_load(model, path, atomic=True)
    assert anonymous_bytes() - before < 64 << 20


def test_a_graph_that_holds_the_parameters_does_not_stop_a_reload(versions: list[str]) -> None:
    model = tower(1.0, LAYERS)
    held = model(torch.zeros(2, 32))  # its graph refers to every weight
    smart_load(model, versions[1], atomic=True)
    assert model(torch.zeros(2, 32)).unique().tolist() == [2.0 * LAYERS]
    assert held.unique().tolist() == [1.0 * LAYERS]


class _InstallsThenStops:
    """Lets some installs happen, and then something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, event: object) -> None:
        self.left = after
        install = Slot.install

        def installing(slot: Slot, data: torch.Tensor) -> None:
            self.left -= 1
            if self.left == 0:
                event()  # type: ignore[operator]
            install(slot, data)

        monkeypatch.setattr(Slot, "install", installing)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="POSIX signals")
@pytest.mark.parametrize("after", range(1, 2 * LAYERS + 1))
def test_an_interrupt_during_the_swap_waits_for_its_end(
    versions: list[str], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tower(1.0, LAYERS)
    main = threading.main_thread().ident
    assert main is not None
    _InstallsThenStops(monkeypatch, after, lambda: signal.pthread_kill(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        smart_load(model, versions[1], atomic=True)
    assert model(torch.zeros(1, 32)).unique().tolist() == [2.0 * LAYERS]
    assert set(caught.value.written) == set(model.state_dict())  # type: ignore[attr-defined]


@pytest.mark.parametrize("after", range(1, 2 * LAYERS + 1))
def test_a_swap_that_fails_is_taken_back(versions: list[str], after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower(1.0, LAYERS)
    before, addresses = snapshot(model), [parameter.data_ptr() for parameter in model.parameters()]

    def fail() -> None:
        raise MemoryError("no memory for it")

    _InstallsThenStops(monkeypatch, after, fail)
    with pytest.raises(MemoryError, match="no memory for it"):
        smart_load(model, versions[1], atomic=True)
    assert not changed(model, before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


@pytest.mark.parametrize("atomic", [False, True])
def test_a_device_is_waited_for_before_memory_on_it_goes(
    versions: list[str], monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    """As long as a model shows its memory, kernels that read it may be queued; that ends with the swap."""
    model = tower(0.0, LAYERS)
    weight = next(model.parameters())
    address, memory = weight.data_ptr(), weakref.ref(weight.untyped_storage())
    seen: list[tuple[torch.device, bool, bool]] = []

    def synchronize(device: torch.device) -> None:
        seen.append((device, weight.data_ptr() != address, memory() is not None))

    monkeypatch.setattr(torch.cpu, "synchronize", synchronize)
    smart_load(model, versions[0], dtype=None if atomic else torch.float64, atomic=atomic)
    assert seen == [(torch.device("cpu"), atomic, True)]
    assert memory() is None


def test_a_device_of_which_there_is_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(torch._C, "_mps_deviceSynchronize", lambda: waits.append("mps"), raising=False)
    _finish_kernels([torch.device("mps:0"), torch.device("meta"), torch.device("vulkan")])
    assert waits == ["mps"]


def test_an_interrupt_before_the_swap_leaves_the_model(versions: list[str]) -> None:
    class Impatient:
        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *exc: object) -> None: ...

    model = tower(1.0, LAYERS)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        smart_load(model, versions[1], atomic=Impatient())
    assert not changed(model, before)


def test_where_no_thread_is_to_be_had_the_swap_is_done_here(
    versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    model = tower(1.0, LAYERS)
    monkeypatch.setattr("_thread.start_new_thread", refuse)
    smart_load(model, versions[1], atomic=True)
    assert model(torch.zeros(1, 32)).unique().tolist() == [2.0 * LAYERS]


def test_a_reload_from_another_thread(versions: list[str]) -> None:
    model = tower(1.0, LAYERS)
    thread = threading.Thread(target=smart_load, args=(model, versions[1]), kwargs={"atomic": True})
    thread.start()
    thread.join()
    assert model(torch.zeros(1, 32)).unique().tolist() == [2.0 * LAYERS]
