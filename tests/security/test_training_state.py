"""States of optimizers and of random number generators, and quantized tensors, that nobody honest wrote."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.security._hostile import contained
from torchload import inspect_checkpoint, read_state_dict, smart_load, smart_resume
from torchload.errors import IncompatibleCheckpointError


def _saved(folder: Path, **more: Any) -> str:
    path = str(folder / "training.pth")
    layer = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}  # drawing none of the numbers that are looked at
    torch.save({"state_dict": layer, **more}, path)
    return path


def _torch_state(left: int, following: int) -> torch.Tensor:
    """Torch's Mersenne twister with so many words left before it makes new ones, and this one next."""
    state = torch.Generator().get_state()
    state[8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
    state[16:20] = torch.tensor([following], dtype=torch.int32).view(torch.uint8)
    return state


WORDS = np.zeros(624, np.uint32)
RANDOM_STATES: dict[str, dict[str, Any]] = {
    # torch accepts both numbers, one by one, and would draw what lies in memory behind its words.
    "torch: words beyond the last": {"torch": _torch_state(624, 624)},
    "torch: two beyond the last": {"torch": _torch_state(3, 624)},
    "torch: too short": {"torch": torch.zeros(10, dtype=torch.uint8)},
    "torch: one byte a trillion times": {"torch": torch.zeros(1, dtype=torch.uint8).expand(1 << 40)},
    "numpy: a position beyond the words": {"numpy": ("MT19937", WORDS, 625, 0, 0.0)},
    "numpy: a negative position": {"numpy": ("MT19937", WORDS, -1, 0, 0.0)},
    "numpy: another generator": {"numpy": ("PCG64", WORDS, 0, 0, 0.0)},
    "numpy: too few words": {"numpy": ("MT19937", WORDS[:600], 0, 0, 0.0)},
    "python: a next number that is text": {"python": (3, (0,) * 624 + (624,), "text")},
    "python: a position beyond the words": {"python": (3, (0,) * 624 + (625,), None)},
    "python: too few words": {"python": (3, (0,) * 600, None)},
}


@pytest.mark.parametrize("name", RANDOM_STATES)
def test_a_random_state_that_leads_beyond_its_words_is_left_aside(name: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    report = smart_resume(model, _saved(tmp_path, rng_state=RANDOM_STATES[name]))
    assert any("was not restored" in note for note in report.notes)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[2]) == before[1:]


@pytest.mark.parametrize("drawn", [0, 1, 311, 623, 624, 625, 1000])
def test_every_state_of_torch_itself_is_taken(drawn: int, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    torch.manual_seed(3)
    if drawn:
        torch.randint(0, 9, (drawn,), dtype=torch.int32)
    path = _saved(tmp_path, rng_state={"torch": torch.get_rng_state()})
    expected = torch.rand(700)
    smart_resume(model, path)
    assert torch.equal(torch.rand(700), expected)


NUMBERS = {
    "nan": float("nan"),
    "infinite": float("inf"),
    "large": 10**400,
    "negative": -(10**400),
    "huge": 1 << 100_000,
}


@pytest.mark.parametrize("number", list(NUMBERS.values()), ids=list(NUMBERS))
def test_a_number_that_is_none_is_no_epoch(number: float, tmp_path: Path) -> None:
    path = _saved(tmp_path, epoch=number, global_step=number)
    report = smart_resume(torch.nn.Linear(3, 2), path)
    assert (report.epoch, report.step) == (None, None)
    assert str(report)
    assert str(smart_load(torch.nn.Linear(3, 2), path))
    assert str(inspect_checkpoint(path))


@pytest.mark.parametrize("part", ["scheduler", "optimizer"])
def test_an_expanded_tensor_is_not_filled_out(part: str, tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(1 << 40)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    states["optimizer"]["state"] = {0: {"step": torch.tensor(1.0), "other": huge}} if part == "optimizer" else {}
    states["scheduler"]["other"] = huge if part == "scheduler" else 1
    path = _saved(tmp_path, **states)
    with pytest.raises(IncompatibleCheckpointError, match="more elements than the file has room for"):
        smart_resume(model, path, optimizer, scheduler)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_an_expanded_quantized_tensor_is_not_filled_out(tmp_path: Path) -> None:
    path = str(tmp_path / "quantized.pth")
    one = torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)
    torch.save({"w": one.as_strided((1 << 40,), (0,))}, path)
    assert str(inspect_checkpoint(path))
    with pytest.raises(IncompatibleCheckpointError, match="a quantized tensor"):
        read_state_dict(path)


def test_parts_of_zero_that_overlap_are_not_multiplied(tmp_path: Path) -> None:
    # Each of many parameters said to be all of a vector in many parts: their product, in boxes.
    import argparse

    part = torch.zeros(6)
    shapes = {f"p{number}": torch.Size([6 * 3000]) for number in range(3000)}
    whole = argparse.Namespace(start=0, numel=6 * 3000)
    folder = tmp_path / "global_step1"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step1")
    module = {name: torch.zeros(1) for name in shapes}
    torch.save({"module": module, "param_shapes": [shapes]}, folder / "mp_rank_00_model_states.pt")
    state = {
        "single_partition_of_fp32_groups": [[part] * 3000],
        "base_optimizer_state": {"state": {}, "param_groups": []},
        "param_slice_mappings": [dict.fromkeys(shapes, whole)],
        "partition_count": 1,
    }
    torch.save({"optimizer_state_dict": state}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert contained(lambda: inspect_checkpoint(tmp_path))
