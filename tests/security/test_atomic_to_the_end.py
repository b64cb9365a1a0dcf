"""With `atomic` the model is wholly the old one or wholly the new one, whatever fails, and the error says which."""

from __future__ import annotations

import _thread
import linecache
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from operator import methodcaller
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import torchload
from tests.law import snapshot
from torchload import errors, smart_load, smart_resume

PACKAGE = str(Path(torchload.__file__).parent)


class Stateful(nn.Linear):
    """Has extra state."""

    state = 0

    def get_extra_state(self) -> int:
        return self.state

    def set_extra_state(self, state: int) -> None:
        self.state = state


class Taking(nn.Linear):
    """Loads itself."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.weight.data.copy_(state_dict[prefix + "weight"])
        self.bias.data.copy_(state_dict[prefix + "bias"])


def net(value: float) -> nn.ModuleDict:
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "own": Taking(2, 2), "extra": Stateful(2, 2)})
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(value)
    model["extra"].state = int(value)  # type: ignore[assignment]
    return model


@pytest.fixture
def path(tmp_path: Path) -> str:
    torch.save(net(2.0).state_dict(), tmp_path / "new.pth")
    return str(tmp_path / "new.pth")


def version(model: nn.ModuleDict) -> set[float]:
    """1 for old, 2 for new: one of them, if the model is of one piece."""
    values = {value for tensor in model.parameters() for value in tensor.unique().tolist()}
    return values | {float(model["extra"].state)}  # type: ignore[arg-type]


def assert_of_one_piece(model: nn.ModuleDict, error: BaseException) -> None:
    written = error.written  # type: ignore[attr-defined]
    assert version(model) == ({2.0} if written else {1.0})
    assert set(written) in (set(), set(model.state_dict()))


class _Guard:
    def __init__(self, enter: BaseException | None = None, leave: BaseException | None = None) -> None:
        self.failures = {"enter": enter, "leave": leave}
        self.is_held = False

    def __enter__(self) -> None:
        assert not self.is_held, "taken twice: a lock would wait for ever"
        if self.failures["enter"] is not None:
            raise self.failures["enter"]
        self.is_held = True

    def __exit__(self, *exc: object) -> None:
        if self.failures["leave"] is not None:
            raise self.failures["leave"]
        self.is_held = False


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("when", ["enter", "leave"])
def test_a_guard_that_fails(path: str, when: str, failure: BaseException) -> None:
    model = net(1.0)
    with pytest.raises(type(failure)) as caught:
        smart_load(model, path, atomic=_Guard(**{when: failure}))
    assert_of_one_piece(model, caught.value)
    assert not caught.value.written


def test_control_c_when_the_guard_has_just_been_taken_leaves_it_free(path: str) -> None:
    lock = threading.Lock()
    # Nothing of this is Python, so that the signal is seen only when the guard is held.
    steps = [lock.acquire, _thread.interrupt_main]

    class Guard:
        __enter__ = staticmethod(partial(list, map(methodcaller("__call__"), steps)))

        def __exit__(self, *exc: object) -> None:
            lock.release()

    model = net(1.0)
    with pytest.raises(KeyboardInterrupt) as caught:
        smart_load(model, path, atomic=Guard())
    assert not lock.locked()
    assert_of_one_piece(model, caught.value)


def test_warnings_as_errors_refuse_before_anything_is_changed(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((2, 2), 2.0)}, tmp_path / "part.pth")
    for atomic in (False, True):
        model = nn.Linear(2, 2)
        before = snapshot(model)
        with pytest.raises(UserWarning, match="bias") as caught:  # as everywhere in these tests
            smart_load(model, tmp_path / "part.pth", strict=False, atomic=atomic)
        assert torch.equal(model.weight, before["weight"])
        assert caught.value.written == ()


@pytest.fixture(params=["handler", "filter"])
def _raising_log(request: pytest.FixtureRequest) -> Iterator[None]:
    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("the log is full")

    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("the log is full")

    log = logging.getLogger("torchload")
    level, handler = log.level, Handler()
    log.setLevel(logging.INFO)
    if request.param == "handler":
        log.addHandler(handler)
    else:
        log.addFilter(refuse)
    yield
    log.removeHandler(handler)
    log.removeFilter(refuse)
    log.setLevel(level)


@pytest.mark.usefixtures("_raising_log")
def test_a_log_that_raises_does_not_fail_a_load(path: str) -> None:
    model = net(1.0)
    assert smart_load(model, path, atomic=True).tensors == 6
    assert version(model) == {2.0}
    model = net(1.0)
    smart_resume(model, path)
    assert version(model) == {2.0}


@pytest.mark.parametrize("atomic", [False, True])
def test_a_post_hook_that_raises(path: str, atomic: bool) -> None:
    def refuse(module: nn.Module, keys: Any) -> None:
        raise RuntimeError("not today")

    model = net(1.0)
    model.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match="not today") as caught:
        smart_load(model, path, atomic=atomic)
    if atomic:
        assert_of_one_piece(model, caught.value)
        assert version(model) == {1.0}
    else:  # what can be taken back is; the rest is named
        changed = {name for name, tensor in model.named_parameters() if tensor.unique().tolist() == [2.0]}
        assert set(caught.value.written) == changed
        assert model["extra"].state == 1


def test_a_way_back_that_fails_is_told(path: str) -> None:
    class Stubborn(Stateful):
        def set_extra_state(self, state: int) -> None:
            if state < self.state:
                raise ValueError("never back")
            self.state = state

    def refuse(module: nn.Module, keys: Any) -> None:
        raise RuntimeError("not today")

    model = net(1.0)
    model["extra"] = Stubborn(2, 2)
    model.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match="not today") as caught:
        smart_load(model, path, atomic=True)
    assert model["extra"].state == 2
    assert "extra._extra_state" in caught.value.written


@pytest.mark.parametrize("kind", ["meta", "lazy"])
def test_models_without_memory_are_without_again(tmp_path: Path, kind: str) -> None:
    def refuse(module: nn.Module, keys: Any) -> None:
        raise RuntimeError("not today")

    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "x.pth")
    model = nn.LazyLinear(2) if kind == "lazy" else nn.Linear(3, 2, device="meta")
    objects = [model.weight, model.bias]
    model.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match="not today") as caught:
        smart_load(model, tmp_path / "x.pth", atomic=True)
    assert caught.value.written == ()
    assert all(one is other for one, other in zip(objects, [model.weight, model.bias]))
    if kind == "lazy":
        assert model.has_uninitialized_params()
    else:
        assert model.weight.is_meta
    model._load_state_dict_post_hooks.clear()
    smart_load(model, tmp_path / "x.pth", atomic=True)
    assert model(torch.ones(1, 3)).shape == (1, 2)


# --- Ctrl-C at any line ---


_INLINES = sys.version_info >= (3, 12)
"""What a trace function raises in an inlined comprehension passes by the handlers around it; a signal does not."""


def _is_comprehension(frame: FrameType) -> bool:
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
    return re.search(r"\bfor\b.*\bin\b", line.removeprefix("for ")) is not None


class _InterruptAt:
    """Raises KeyboardInterrupt at the nth line that is executed of some of our functions, as a signal may."""

    def __init__(self, functions: set[str], count: int) -> None:
        self.functions, self.left, self.where = functions, count, ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and code.co_name in self.functions:
            return self._line
        return None

    def _line(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        if event == "line" and not (_INLINES and _is_comprehension(frame)):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def _interrupted_loads(path: str, functions: set[str], **options: Any) -> Iterator[tuple[nn.ModuleDict, BaseException]]:
    """One load for each line that is executed, interrupted there."""
    count, found = 0, sys.gettrace()
    while True:
        count += 1
        model, interrupt = net(1.0), _InterruptAt(functions, count)
        try:
            sys.settrace(interrupt)
            smart_load(model, path, **options)
        except KeyboardInterrupt as error:
            if count > 3:  # before the first lines nobody has taken the load in hand
                yield model, error
        else:
            assert not interrupt.where, "an interrupt was lost"
            return
        finally:
            sys.settrace(found)


AROUND_THE_SWAP = {"carry_out", "smart_load", "make", "_guarded", "_uninterrupted", "ask", "report_of", "_notes"}


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"dtype": torch.float64}], ids=str)
def test_control_c_at_any_line_around_the_swap(path: str, options: dict[str, Any]) -> None:
    seen = 0
    for model, error in _interrupted_loads(path, AROUND_THE_SWAP, atomic=True, **options):
        assert_of_one_piece(model, error)
        seen += 1
    assert seen > 50


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}], ids=str)
def test_without_atomic_written_names_at_least_what_was_changed(path: str, options: dict[str, Any]) -> None:
    for model, error in _interrupted_loads(path, AROUND_THE_SWAP | {"_move", "_run"}, **options):
        changed = {name for name, tensor in model.named_parameters() if tensor.unique().tolist() != [1.0]}
        assert changed <= set(error.written)  # type: ignore[attr-defined]


def test_errors_before_anything_is_written_say_so(path: str, tmp_path: Path) -> None:
    model = net(1.0)
    for call in (
        lambda: smart_load(model, tmp_path / "absent.pth"),
        lambda: smart_load(model, path, dtype="no"),  # type: ignore[arg-type]
        lambda: smart_load(model, path, "cuda:77"),
        lambda: smart_load(nn.Linear(3, 3), path),
    ):
        with pytest.raises((errors.TorchLoadError, TypeError)) as caught:
            call()
        assert caught.value.written == ()
