"""Sums of words: a law, and the damage that a single sum would miss."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.threads import CHILD_IS_WAITED_FOR
from torchload.core.word_sums import WordSums

PAGE = 4096


def sums_of(data: bytes | bytearray) -> WordSums:
    sums = WordSums(len(data))
    sums.add(memoryview(bytearray(data)), 0)
    return sums


@given(st.integers(1, 3 * PAGE), st.integers(0, 20), st.lists(st.integers(0, 3 * PAGE), max_size=5), st.randoms())
def test_parts_add_up_wherever_data_is_cut(size: int, shift: int, cuts: list[int], random: object) -> None:
    """In any order, and wherever in memory the parts lie."""
    data = random.randbytes(size)  # type: ignore[attr-defined]
    ends = sorted({0, size, *(cut for cut in cuts if cut < size)})
    parts = list(pairwise(ends))
    random.shuffle(parts)  # type: ignore[attr-defined]
    found = WordSums(size)
    for start, end in parts:
        memory = memoryview(bytearray(shift) + data[start:end])
        found.add(memory[shift:], start)
    assert found.same_as(sums_of(data))


@given(st.binary(min_size=1, max_size=2 * PAGE), st.data())
def test_any_flipped_bit_shows(data: bytes, draw: st.DataObject) -> None:
    position, bit = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(0, 7))
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    assert not sums_of(changed).same_as(sums_of(data))


def signs_of_two(values: torch.Tensor) -> None:
    values[1], values[40_001] = -values[1], -values[40_001]


def signs_of_two_in_a_row(values: torch.Tensor) -> None:
    values[1], values[5] = -values[1], -values[5]


def a_stuck_bit(values: torch.Tensor) -> None:
    values.view(torch.int64).bitwise_or_(-(1 << 63))


def zeroed_pages(values: torch.Tensor) -> None:
    values.view(torch.uint8)[4 * PAGE : 12 * PAGE] = 0


def swapped_pages(values: torch.Tensor) -> None:
    pages = values.view(torch.uint8).view(-1, PAGE)
    pages[[3, 17]] = pages[[17, 3]]


def a_page_from_elsewhere(values: torch.Tensor) -> None:
    pages = values.view(torch.uint8).view(-1, PAGE)
    pages[5] = pages[20]


@pytest.mark.parametrize(
    "damage", [signs_of_two, signs_of_two_in_a_row, a_stuck_bit, zeroed_pages, swapped_pages, a_page_from_elsewhere]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_damage_that_cancels_in_a_single_sum_shows(dtype: torch.dtype, damage: Callable[[torch.Tensor], None]) -> None:
    values = torch.randn(100 * PAGE // dtype.itemsize, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert is_noticed(values, damage)


@pytest.mark.parametrize("value", [1.0, 2.0, 0.5, -1.0])
def test_zeroed_pages_of_one_value_show(value: float) -> None:
    """Nothing but high bits: a row of them adds up to a multiple of 2**64, which is 0."""
    assert is_noticed(torch.full((30 * PAGE,), value, dtype=torch.float64), zeroed_pages)


FORKED = """
import os, sys
import torch
from torchload.core.word_sums import WordSums

torch.ones(4_000_000).sum()  # starts OpenMP's threads, which a child has not
child = os.fork()
if not child:
    os._exit(7 if WordSums(1 << 30).same_as(WordSums(1 << 30)) else 8)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sums_of_much_need_no_threads() -> None:
    """They are made and compared in the thread that called, not by a worker that keeps to one thread."""
    command = [sys.executable, "-W", "ignore", "-c", FORKED + CHILD_IS_WAITED_FOR]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 7, done.stderr


def is_noticed(values: torch.Tensor, damage: Callable[[torch.Tensor], None]) -> bool:
    before = sums_of(values.view(torch.uint8).numpy().tobytes())
    damage(values)
    return not sums_of(values.view(torch.uint8).numpy().tobytes()).same_as(before)
