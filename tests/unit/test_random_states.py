"""Random numbers go on where they stopped, wherever a file holds the states of their generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.test_resume import Refusing  # an object that does not accept its state
from torchload import errors, smart_resume
from torchload.formats import open_checkpoint
from torchload.training.random_states import plan_random_states


@pytest.fixture(autouse=True)
def _as_before():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def draw() -> tuple[float, ...]:
    """A number of each generator."""
    return random.random(), float(np.random.rand()), torch.rand(1).item(), random.gauss(0, 1), float(np.random.randn())


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class Run:
    """Training that draws numbers everywhere: dropout, shuffling by python, noise by numpy."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            inputs = torch.eye(6)[random.sample(range(6), 4)] + float(np.random.randn())
            self.optimizer.zero_grad()
            loss = self.model(inputs).square().mean()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": 1}


PYTHON, NUMPY, TORCH = random.getstate, np.random.get_state, torch.get_rng_state
LAYOUTS = {
    "plain": lambda: {
        "python_rng_state": PYTHON(), "numpy_rng_state": NUMPY(), "torch_rng_state": TORCH(), "cuda_rng_state": None
    },
    "one by another name": lambda: {"random_state": PYTHON(), "np_rng_state": NUMPY(), "rng_state": TORCH()},
    "grouped": lambda: {"rng_states": {"python": PYTHON(), "numpy": NUMPY(), "torch": TORCH()}},
    "numpy's newer form": lambda: {
        "rng": {"python": PYTHON(), "numpy": np.random.get_state(legacy=False), "cpu": TORCH()}
    },
    "Megatron": lambda: {
        "rng_state": [
            {"random_rng_state": PYTHON(), "np_rng_state": NUMPY(), "torch_rng_state": TORCH(), "cuda_rng_state": None}
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_with_the_same_numbers(tmp_path, layout):
    seed(1)
    run = Run()
    run.train(3)
    torch.save({**run.state(), **LAYOUTS[layout]()}, tmp_path / "x.pth")
    straight = run.train(4)
    seed(99)
    again = Run()
    report = smart_resume(again.model, tmp_path / "x.pth", again.optimizer)
    assert again.train(4) == straight
    assert "random numbers of python, numpy, torch" in str(report)
    assert (
        not {"random_state", "rng_state", "rng_states", "rng", "python_rng_state", "torch_rng_state"}
        & report.values.keys()
    )


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("rng_state.pth", lambda: {"python": PYTHON(), "numpy": NUMPY(), "cpu": TORCH()}),  # transformers' Trainer
        (
            "random_states_0.pkl",  # accelerate
            lambda: {
                "step": 3, "random_state": PYTHON(), "numpy_random_seed": NUMPY(), "torch_manual_seed": TORCH()
            },
        ),
    ],
)  # fmt: skip
def test_files_beside_the_weights(tmp_path, name, states):
    seed(1)
    run = Run()
    run.train(3)
    torch.save(run.model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(run.optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(states(), tmp_path / name)
    straight = run.train(4)
    seed(99)
    again = Run()
    report = smart_resume(again.model, tmp_path, again.optimizer)
    assert again.train(4) == straight
    assert "random numbers of python, numpy, torch from 'random'" in str(report)


def test_accelerates_own_folder(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    seed(1)
    accelerator = accelerate.Accelerator(cpu=True)
    run = Run()
    run.model, run.optimizer = accelerator.prepare(run.model, run.optimizer)
    run.train(3)
    accelerator.save_state(str(tmp_path / "state"), safe_serialization=False)
    straight = run.train(4)
    again = Run()
    smart_resume(again.model, tmp_path / "state", again.optimizer)
    assert again.train(4) == straight


def test_not_if_it_is_not_wanted(tmp_path):
    run = Run()
    seed(1)
    torch.save({**run.state(), **LAYOUTS["grouped"]()}, tmp_path / "x.pth")
    seed(2)
    want = draw()
    seed(2)
    report = smart_resume(run.model, tmp_path / "x.pth", run.optimizer, rng=False)
    assert draw() == want
    assert "random numbers" not in str(report)


def test_a_failure_leaves_the_numbers_as_they_were(tmp_path):
    run = Run()
    seed(1)
    torch.save({**run.state(), **LAYOUTS["grouped"](), "scheduler": {"a": 1}}, tmp_path / "x.pth")
    seed(2)
    want = draw()
    seed(2)
    with pytest.raises(errors.IncompatibleCheckpointError):
        smart_resume(run.model, tmp_path / "x.pth", run.optimizer, Refusing())
    assert draw() == want


SEEDS = {"random_state": 42, "rng_state": 7, "numpy_rng_state": "MT19937", "rng": None, "random": [1, 2]}
ODD = {
    "position": {"numpy_rng_state": ("MT19937", np.zeros(624, np.uint32), 10**6, 0, 0.0)},
    "negative position": {"numpy_rng_state": ("MT19937", np.zeros(624, np.uint32), -1, 0, 0.0)},
    "words": {"numpy_rng_state": ("MT19937", np.zeros(3, np.uint32), 0, 0, 0.0)},
    "generator": {"numpy_rng_state": ("PCG64", np.zeros(624, np.uint32), 0, 0, 0.0)},
    "python": {"python_rng_state": (3, (1, 2, 3), None)},
    "python's version": {"python_rng_state": (9, tuple(range(625)), None)},
    "python's position": {"python_rng_state": (3, (*range(624), 10**9), None)},
    "torch": {"torch_rng_state": torch.zeros(7, dtype=torch.uint8)},
    "torch's own words": {"torch_rng_state": torch.full((5056,), 255, dtype=torch.uint8)},
    "cuda": {"cuda_rng_state_all": [torch.zeros(3, dtype=torch.uint8)] * 99},
}


def test_seeds_are_values_like_any_others(tmp_path):
    run = Run()
    torch.save({**run.state(), **SEEDS}, tmp_path / "x.pth")
    report = smart_resume(run.model, tmp_path / "x.pth", run.optimizer)
    assert {name: report.values[name] for name in SEEDS} == SEEDS
    assert "random numbers" not in str(report)


@pytest.mark.parametrize("kind", ODD)
def test_what_no_generator_would_take_is_left_aside_with_a_note(tmp_path, kind):
    run = Run()
    torch.save({**run.state(), **ODD[kind]}, tmp_path / "x.pth")
    seed(2)
    want = draw()
    seed(2)
    report = smart_resume(run.model, tmp_path / "x.pth", run.optimizer)
    assert draw() == want
    assert any(next(iter(ODD[kind])) in note and "not restored" in note for note in report.notes)


def test_each_process_takes_its_own(tmp_path):
    states = []
    for rank in range(2):
        seed(rank)
        states.append({"python": PYTHON(), "torch": TORCH()})
    torch.save({"rng": states, "torch_rng_state": TORCH()}, tmp_path / "x.pth")
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        for rank in range(2):
            found, notes = plan_random_states(checkpoint.root, rank, 2)
            assert [state.kind for state in found] == ["python", "torch"]
            assert torch.equal(found[1].state, states[rank]["torch"])
            assert notes == []
    torch.save({"torch_rng_state": TORCH()}, tmp_path / "one.pth")
    with open_checkpoint(tmp_path / "one.pth") as checkpoint:
        assert len(plan_random_states(checkpoint.root, 0, 1)[0]) == 1
        found, notes = plan_random_states(checkpoint.root, 0, 2)
        assert found == []
        assert "which of the processes" in notes[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["cuda_rng_state", "cuda_rng_state_all"])
def test_cuda(tmp_path, name):
    run = Run()
    torch.cuda.manual_seed_all(5)
    value = torch.cuda.get_rng_state() if name == "cuda_rng_state" else torch.cuda.get_rng_state_all()
    torch.save({**run.state(), name: value}, tmp_path / "x.pth")
    want = torch.rand(3, device="cuda")
    report = smart_resume(run.model, tmp_path / "x.pth", run.optimizer)
    assert torch.equal(torch.rand(3, device="cuda"), want)
    assert "random numbers of cuda" in str(report)
