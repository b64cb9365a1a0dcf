"""Disks that fail, files that change, and interrupts: what is released, and what a failed load leaves behind."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.security._machine import anonymous_bytes, changed, descriptors, in_child, needs_proc, snapshot, tower
from tests.threads import python_threads
from torchload import errors, smart_load, smart_resume, smart_save
from torchload.core import source as source_module
from torchload.core.source import FileSource
from torchload.errors import CheckpointFormatError, CorruptCheckpointError, TorchLoadError
from torchload.transfer.direct import DirectFile
from torchload.transfer.reader import Reader

pytestmark = needs_proc

ReadAt = Callable[[int, memoryview, int], int]


class Model(nn.Module):
    """Two matrices that several threads share, and small tensors that one read fills."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1024, 1536)
        self.second = nn.Linear(1536, 1024)
        self.norms = nn.Sequential(*(nn.BatchNorm1d(64) for _ in range(4)))


@pytest.fixture(params=["pth", "safetensors", "legacy"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return _write(tmp_path, request.param)


def _write(folder: Path, kind: str) -> str:
    path = str(folder / f"model.{kind}")
    state = Model().state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
    return path


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    before, threads = descriptors(), python_threads()
    yield
    assert descriptors() == before
    assert python_threads() == threads


def _intercept(monkeypatch: pytest.MonkeyPatch, event: Callable[[int], None], *, large: int = 4096) -> list[int]:
    """Let something happen before each read of tensor data (told by its size), given how many went before."""
    read_at = source_module.read_at
    count: list[int] = []

    def reading(descriptor: int, buffer: memoryview, position: int) -> int:
        if len(buffer) >= large and buffer.obj is None:  # memory of a tensor, no Python object's
            count.append(position)
            event(len(count) - 1)
        return read_at(descriptor, buffer, position)

    monkeypatch.setattr(source_module, "read_at", reading)
    monkeypatch.setattr(Reader, "scatter", lambda *_: False)
    monkeypatch.setattr(Reader, "pages", lambda *_: None)  # nor is anything read without a call
    return count


def _reads(path: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """How many reads of data a load makes."""
    with monkeypatch.context() as patch:
        count = _intercept(patch, lambda number: None)
        smart_load(Model(), path, **options)
    return len(count)


# --- devices that fail ---


def _fail_at(number: int) -> Callable[[int], None]:
    def event(count: int) -> None:
        if count >= number:
            raise OSError(errno.EIO, "Input/output error")

    return event


WAYS: dict[str, dict[str, Any]] = {
    "in place": {},
    "in place, with a cast": {"half": True},
    "atomic": {"atomic": True},
    "atomic, with a cast": {"atomic": True, "half": True},
    "into another dtype": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_the_device_names_what_was_written(path: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(WAYS[way])
    half = options.pop("half", False)
    total = _reads(path, monkeypatch)
    assert total >= 3
    for number in range(total):
        model = Model().half() if half else Model()
        before, addresses = snapshot(model), [tensor.data_ptr() for tensor in model.state_dict().values()]
        with monkeypatch.context() as patch:
            _intercept(patch, _fail_at(number))
            with pytest.raises(OSError, match="Input/output error") as caught:
                smart_load(model, path, **options)
        difference = changed(model, before)
        written = set(caught.value.written)  # type: ignore[attr-defined]
        assert difference <= written <= set(before)
        assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses
        if way.startswith("in place"):
            assert number == 0 or written
        else:
            assert not written


def test_what_an_earlier_step_wrote_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors that are cast in place come first, those that are copied as they are later.
    path = str(tmp_path / "mixed.pth")
    model = Model()
    state = model.state_dict()
    state["first.weight"] = state["first.weight"].double()
    torch.save(state, path)
    target = Model()
    before = snapshot(target)
    position: list[int] = []

    def fail_in_the_last_phase(count: int) -> None:
        if changed(target, before) >= {"first.weight"} and torch.equal(target.first.weight, model.first.weight):
            position.append(count)
            raise OSError(errno.EIO, "Input/output error")

    _intercept(monkeypatch, fail_in_the_last_phase)
    with pytest.raises(OSError, match="Input/output error") as caught:
        smart_load(target, path)
    assert position
    assert changed(target, before) <= set(caught.value.written)  # type: ignore[attr-defined]
    assert "first.weight" in caught.value.written  # type: ignore[attr-defined]


@pytest.mark.parametrize("atomic", [False, True])
def test_progress_that_raises_at_the_end(path: str, atomic: bool) -> None:
    model = Model()
    before = snapshot(model)

    def progress(done_bytes: int, total_bytes: int) -> None:
        if done_bytes == total_bytes:
            raise RuntimeError("stop it")

    with pytest.raises(RuntimeError, match="stop it") as caught:
        smart_load(model, path, atomic=atomic, progress=progress)
    written = set(caught.value.written)  # type: ignore[attr-defined]
    assert changed(model, before) <= written
    assert bool(written) is not atomic


def test_memory_of_a_failed_load_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, "pth")
    model = Model()
    with monkeypatch.context() as patch:
        _intercept(patch, _fail_at(1))
        for attempt in range(12):
            if attempt == 2:
                before = anonymous_bytes()
            with pytest.raises(OSError, match="Input/output"):
                smart_load(model, path, atomic=True)
    assert anonymous_bytes() - before < 40 << 20  # ten loads would be 120 MiB


def test_short_reads_are_continued(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Model()
    smart_load(whole, path)
    read_at = source_module.read_at
    chooser = random.Random(0)
    monkeypatch.setattr(Reader, "scatter", lambda *_: False)

    def short(descriptor: int, buffer: memoryview, position: int) -> int:
        return read_at(descriptor, buffer[: chooser.randint(1, max(len(buffer) // 3, 1))], position)

    monkeypatch.setattr(source_module, "read_at", short)
    model = Model()
    smart_load(model, path, verify=True)
    assert not changed(model, snapshot(whole))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")
def test_signals_that_interrupt_reads(path: str) -> None:
    whole, model = Model(), Model()
    smart_load(whole, path)
    rung: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(5):
            smart_load(model, path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert rung
    assert not changed(model, snapshot(whole))


# --- what fails once the model shows the new values ---


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_that_fails_at_the_very_end(path: str, way: str) -> None:
    options = dict(WAYS[way])
    model = Model().half() if options.pop("half", False) else Model()
    before, addresses = snapshot(model), [tensor.data_ptr() for tensor in model.state_dict().values()]

    def refuse(module: nn.Module, keys: object) -> None:
        assert changed(model, before) or model.first.weight.dtype is torch.bfloat16  # it came last
        raise RuntimeError("not like this")

    model.second.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match="not like this") as caught:
        smart_load(model, path, **options)
    written = set(caught.value.written if hasattr(caught.value, "written") else ())
    if way.startswith("atomic"):
        assert not written
        assert not changed(model, before)
        assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses
        model.second._load_state_dict_post_hooks.clear()
        smart_load(model, path, **options)
        assert changed(model, before)
    else:
        assert written == set(before)


# --- interrupts ---


def _start() -> Model:
    torch.manual_seed(5)
    return Model()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="POSIX signals")
@pytest.mark.parametrize("atomic", [False, True])
def test_an_interrupt_at_any_read(path: str, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    main = threading.main_thread().ident
    assert main is not None
    loaded, start = Model(), _start()
    smart_load(loaded, path)
    everything = changed(loaded, snapshot(start))
    for number in range(_reads(path, monkeypatch)):
        model = _start()
        before = snapshot(model)

        def interrupt(count: int, number: int = number) -> None:
            if count == number:
                signal.pthread_kill(main, signal.SIGINT)

        with monkeypatch.context() as patch:
            _intercept(patch, interrupt)
            with pytest.raises(KeyboardInterrupt) as caught:
                smart_load(model, path, atomic=atomic)
        difference = changed(model, before)
        assert difference <= set(caught.value.written)  # type: ignore[attr-defined]
        if atomic:  # one or the other, wholly (an interrupt may also come too late)
            assert difference in (set(), everything)


# What is asked for → dtype in the file, and what has to give something for the test to be of that.
ROUTES = {
    "through the page cache": ("float32", "None"),
    "past the page cache": ("float32", "torchload.transfer.direct.DirectFile.read"),
    "with a cast": ("float16", "None"),
}

STORM = """
import pkgutil, random, signal, sys, os
import torch
from tests.threads import python_threads
from torchload import smart_load

model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6)))
versions = []
for value in (1.0, 2.0):
    dtype = getattr(torch, sys.argv[2])
    state = {name: torch.full_like(tensor, value, dtype=dtype) for name, tensor in model.state_dict().items()}
    torch.save(state, sys.argv[1] + str(value))
    versions.append(value)
if sys.argv[3] != "None":
    owner, _, name = sys.argv[3].rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original, used = getattr(owner, name), []
    setattr(owner, name, lambda *arguments: used.append(original(*arguments)) or used[-1])
smart_load(model, sys.argv[1] + "1.0", atomic=True)
if sys.argv[3] != "None":
    setattr(owner, name, original)
    if not any(used):
        print(-1)
        raise SystemExit
current, stopped = 1.0, 0
descriptors = len(os.listdir("/proc/self/fd"))
chooser = random.Random(0)
for attempt in range(150):
    wanted = 3.0 - current
    try:
        signal.setitimer(signal.ITIMER_REAL, chooser.uniform(0.0001, 0.012))
        try:
            smart_load(model, sys.argv[1] + str(wanted), atomic=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        stopped += 1
    values = {tensor.min().item() for tensor in model.state_dict().values()}
    values |= {tensor.max().item() for tensor in model.state_dict().values()}
    assert values in ({1.0}, {2.0}), values
    [current] = values
assert stopped > 5, stopped
assert python_threads() == 1
import gc; gc.collect()
assert len(os.listdir("/proc/self/fd")) == descriptors, os.listdir("/proc/self/fd")
assert gc.isenabled()
print(stopped)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")
@pytest.mark.parametrize("route", ROUTES)
def test_interrupts_at_any_moment(tmp_path: Path, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, used = ROUTES[route]
    monkeypatch.setenv("TORCHLOAD_DIRECT_IO", "1" if route == "past the page cache" else "0")
    script = "import signal\nsignal.signal(signal.SIGALRM, signal.default_int_handler)\n" + STORM
    stopped = int(in_child(script, str(tmp_path / "model"), dtype, used))
    if stopped < 0:
        pytest.skip("this system has no such way to read a file")
    assert stopped > 5


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="takes what Linux has")
@pytest.mark.parametrize("what", ["a file", "its copy", "past the page cache"])
def test_nothing_is_lost_between_opening_and_holding(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt right after each line of what opens a descriptor, or after each call that it makes."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    monkeypatch.setenv("TORCHLOAD_DIRECT_IO", "1")
    source = FileSource(str(path))
    opening: dict[str, Callable[[], Any]] = {
        "a file": lambda: FileSource(str(path)),
        "its copy": lambda: FileSource.from_descriptor(source.fd or 0, "copy"),
        "past the page cache": lambda: DirectFile.open(source.fd or 0),
    }
    if opening[what]() is None:
        pytest.skip("this system has no such way to read a file")
    before = descriptors()
    interrupted = 0
    for moment in range(1000):
        if not _interrupted(opening[what], moment):
            break
        interrupted += 1
        assert descriptors() == before, f"at moment {moment}"
    assert 3 < interrupted < 1000
    source.close()


def _interrupted(action: Callable[[], Any], moment: int) -> bool:
    """Whether an action was stopped by an interrupt at its `moment`-th line or return from a call into C."""
    passed = 0

    def step(frame: Any, event: str, argument: object) -> Any:
        nonlocal passed
        if "torchload" in frame.f_code.co_filename and event in ("line", "c_return"):
            passed += 1
            if passed > moment:
                sys.settrace(None)
                sys.setprofile(None)
                raise KeyboardInterrupt
        return step

    sys.settrace(step)
    sys.setprofile(step)
    try:
        held = action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    del held  # now that nothing interrupts
    return False


# --- files that change ---


@pytest.mark.parametrize("atomic", [False, True])
def test_a_file_that_is_truncated_while_it_is_read(path: str, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    before = snapshot(model)
    _intercept(monkeypatch, lambda count: os.truncate(path, 5000) if count == 1 else None)
    with pytest.raises(CorruptCheckpointError, match=r"became shorter|was changed") as caught:
        smart_load(model, path, atomic=atomic)
    assert changed(model, before) <= set(caught.value.written)
    assert not (atomic and changed(model, before))


@pytest.mark.parametrize("atomic", [False, True])
def test_a_file_that_is_written_to_while_it_is_read(path: str, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    before = snapshot(model)

    def write(count: int) -> None:
        if count == 1:
            with open(path, "r+b") as file:
                file.seek(-5000, os.SEEK_END)
                file.write(b"\0")
            os.utime(path, ns=(1, 1))  # some file systems keep time too coarsely to tell

    _intercept(monkeypatch, write)
    with pytest.raises(CorruptCheckpointError, match="was changed since it was opened") as caught:
        smart_load(model, path, atomic=atomic)
    assert changed(model, before) <= set(caught.value.written)
    assert not (atomic and changed(model, before))


def test_a_file_that_is_replaced_while_it_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As savers do that rename: what was opened is read to its end.
    old, model = Model(), Model()
    smart_load(old, path)
    _intercept(monkeypatch, lambda count: os.replace(_write_beside(path), path) if count == 1 else None)
    smart_load(model, path)
    assert not changed(model, snapshot(old))


def _write_beside(path: str) -> str:
    torch.save(Model().state_dict(), path + ".new")
    return path + ".new"


def test_a_file_that_is_removed_while_it_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, model = Model(), Model()
    smart_load(old, path)
    _intercept(monkeypatch, lambda count: os.remove(path) if count == 1 else None)
    smart_load(model, path)
    assert not changed(model, snapshot(old))


# --- file objects ---


def test_a_closed_file(path: str) -> None:
    model = Model()
    before = snapshot(model)
    file = open(path, "rb")  # noqa: SIM115
    file.close()
    with pytest.raises((ValueError, OSError)):
        smart_load(model, file)
    buffer = io.BytesIO(b"x")
    buffer.close()
    with pytest.raises((ValueError, OSError)):
        smart_load(model, buffer)
    assert not changed(model, before)


def test_a_file_that_its_owner_closes_while_it_is_read(path: str) -> None:
    model, whole = Model(), Model()
    smart_load(whole, path)
    with open(path, "rb") as file:
        smart_load(model, file, progress=lambda done, total: file.close())
    assert not changed(model, snapshot(whole))


class _Failing(io.BytesIO):
    """A remote file whose connection breaks."""

    def __init__(self, data: bytes, good_bytes: int) -> None:
        super().__init__(data)
        self.good_bytes = good_bytes

    def fileno(self) -> int:
        raise io.UnsupportedOperation

    def getbuffer(self) -> memoryview:
        raise io.UnsupportedOperation

    def getvalue(self) -> bytes:
        raise io.UnsupportedOperation

    def read(self, size: int | None = -1) -> bytes:
        self.good_bytes -= size or 0
        if self.good_bytes < 0:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return super().read(size)


class _Stream:
    """The same, as an object of no known class."""

    def __init__(self, data: bytes, good_bytes: int) -> None:
        self._file = _Failing(data, good_bytes)
        self.name = "remote"

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()


@pytest.mark.parametrize("atomic", [False, True])
def test_a_stream_that_breaks(path: str, atomic: bool) -> None:
    data = Path(path).read_bytes()
    for share in (0.1, 0.5, 0.9):
        model = Model()
        before = snapshot(model)
        with pytest.raises(ConnectionResetError) as caught:
            smart_load(model, _Stream(data, int(len(data) * share)), atomic=atomic)
        written = set(getattr(caught.value, "written", ()))
        assert changed(model, before) <= written
        assert not (atomic and written)


def test_a_pipe_is_no_checkpoint() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "wb"), pytest.raises((CheckpointFormatError, OSError, TypeError)):
        smart_load(tower(), pipe)


@pytest.mark.parametrize("special", ["fifo", "/dev/null", "/dev/zero", "/proc/self/maps", "/proc/self/mem", "socket"])
def test_special_files_are_refused_at_once(special: str, tmp_path: Path) -> None:
    import socket

    path = special
    if special == "fifo":
        path = str(tmp_path / "fifo")
        os.mkfifo(path)
    if special == "socket":
        path = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
    with pytest.raises((TorchLoadError, OSError)):
        smart_load(tower(), path)


def test_a_sparse_giant_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "giant.pth"
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(1 << 40)
    with pytest.raises(TorchLoadError):
        smart_load(tower(), path)


# --- saving ---

FULL = """
import resource, signal, sys, os
import torch
from torchload import smart_save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # as a disk that is full after 64 KiB
try:
    smart_save(torch.nn.Linear(1000, 100), sys.argv[1])
except OSError as error:
    print(error.strerror)
print(sorted(os.listdir(os.path.dirname(sys.argv[1]))))
"""


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_no_room_for_what_is_saved(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    path = tmp_path / f"model.{suffix}"
    smart_save(tower(), path)
    content = path.read_bytes()
    told = in_child(FULL, str(path))
    assert "What was there before is unchanged" in told
    assert told.endswith(f"['{path.name}']\n")
    assert path.read_bytes() == content


def test_special_files_are_not_replaced_by_a_save(tmp_path: Path) -> None:
    # A save ends in a rename, which would put a file where the device was.
    path = tmp_path / "fifo.pth"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        smart_save(tower(), path)
    assert path.is_fifo()
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_errors_with_an_account_of_what_was_written_survive_pickling() -> None:
    import pickle

    error = errors.CorruptCheckpointError("damaged", path="model.pth", written=["a", "b"])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.written, copy.path, str(copy)) == (("a", "b"), "model.pth", "damaged")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "the device failed")])
def test_a_failure_to_read_is_never_a_note(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchload.training import random_states

    def fail(*arguments: object, **options: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(random_states, "map_entry", fail)
    model = nn.Linear(3, 2)
    path = tmp_path / "training.pth"
    torch.save({"model": model.state_dict(), "rng_state": torch.get_rng_state()}, path)
    with pytest.raises(type(error)):
        smart_resume(model, path)


def test_a_folder_on_a_failing_device_is_not_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "model.pth")

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "the device failed")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr("torchload.core.source.read_at", fail)
    with pytest.raises(OSError, match="the device failed"):
        smart_load(nn.Linear(3, 2), tmp_path)
