"""Four times the tensors may cost four times the work, and no more: steps are counted, time is not looked at.

A step is a line of Python run, or a call from Python into C (so that a comprehension over all names inside a loop over
all names is seen, whichever way it is written).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from torchload import smart_load
from torchload.match.names import align, tree_of

FEW, MANY = 120, 480
SLACK = 1.15  # constants may shrink relative to the rest, and tables be resized; a square would give a factor of 4


def count_steps(work: Callable[[], object]) -> int:
    """Lines run and C functions called."""
    steps = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        return line

    def call(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal steps
        steps += event == "c_call"

    tracer, profiler = sys.gettrace(), sys.getprofile()
    sys.settrace(line)
    sys.setprofile(call)
    try:
        work()
    finally:
        sys.setprofile(profiler)
        sys.settrace(tracer)
    return steps


def assert_linear(work: Callable[[int], Callable[[], object]]) -> None:
    """`work` sets up for a size, and returns what is to be counted."""
    work(2)()  # imports and caches
    few, many = count_steps(work(FEW)), count_steps(work(MANY))
    assert few > FEW
    assert many / few < MANY / FEW * SLACK, f"{few} steps for {FEW}, {many} for {MANY}"


def flat(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))


def nested(count: int) -> nn.Module:
    layers = list(flat(count))
    return nn.Sequential(*(nn.Sequential(*layers[first : first + 10]) for first in range(0, count, 10)))


def deep(count: int) -> nn.Module:
    """Wrapped again and again: the names grow, so that the depth stays what it is."""
    model = nn.Sequential(*(nn.DataParallel(nn.Linear(2, 2)) for _ in range(count)))
    return nn.DataParallel(model)


def save_pth(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"state_dict": state, "epoch": 3}, path)


def save_safetensors(state: dict[str, torch.Tensor], path: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file(state, path)


@pytest.mark.parametrize("save", [save_pth, save_safetensors])
@pytest.mark.parametrize(("saved", "filled"), [(flat, flat), (nested, nested), (deep, flat), (flat, deep)])
def test_a_load_takes_steps_in_proportion(saved: Any, filled: Any, save: Any, tmp_path: Path) -> None:
    def work(count: int) -> Callable[[], object]:
        path = tmp_path / f"{count}.ckpt"
        save(saved(count).state_dict(), path)
        model = filled(count)
        return lambda: smart_load(model, path)

    assert_linear(work)


@pytest.mark.parametrize("built", [flat, nested])
def test_a_refusal_takes_steps_in_proportion(built: Any, tmp_path: Path) -> None:
    def work(count: int) -> Callable[[], object]:
        path = tmp_path / f"{count}.ckpt"
        state = built(count).state_dict()
        torch.save({name.replace("weight", "kernel"): tensor for name, tensor in state.items()}, path)
        model = built(count)

        def refuse() -> None:
            with pytest.raises(RuntimeError):
                smart_load(model, path)

        return refuse

    assert_linear(work)


@pytest.mark.parametrize("wrap", ["{}", "module.{}", "module._orig_mod.{}", "backbone.{}"])
def test_matching_takes_steps_in_proportion(wrap: str) -> None:
    def work(count: int) -> Callable[[], object]:
        names = [f"layers.{layer}.{part}" for layer in range(count) for part in ("weight", "bias")]
        wrapped = [wrap.format(name) for name in names]
        return lambda: align(tree_of(wrapped), tree_of(names))

    assert_linear(work)


def test_the_counter_sees_a_square() -> None:
    def work(count: int) -> Callable[[], object]:
        names = [str(number) for number in range(count)]
        return lambda: [[other for other in names if other.startswith(name)] for name in names]

    with pytest.raises(AssertionError, match="steps for"):
        assert_linear(work)
