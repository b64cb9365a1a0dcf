"""Laws of reading together: however copies are dealt out, all of them are carried out once, and arrive everywhere."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_transfer_laws import _same_bits, copies
from torchload.core.copies import Copy
from torchload.transfer import cooperative, run

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def _elements(parts: list[Copy]) -> int:
    return sum(math.prod(copy.box.shape) for copy in parts)


@settings(max_examples=40)
@given(st.data(), st.integers(1, 7), st.integers(16, 40))
def test_shares_are_everything_once(data: st.DataObject, ranks: int, small: int) -> None:
    drawn = [data.draw(copies(index)) for index in range(data.draw(st.integers(0, 5)))]
    whole = [copy for copy, _ in drawn]
    with patch.object(cooperative, "_SMALL_BYTES", small), torch.inference_mode():
        parts = cooperative.shares(whole, ranks)
    assert len(parts) == ranks
    assert sum(map(_elements, parts)) == _elements(whole)
    sizes = [sum(map(cooperative._file_bytes, part)) for part in parts]
    assert max(sizes) <= -(-sum(sizes) // ranks) + max(small, 16)
    for part in parts:  # as each of the ranks would
        run(part)
    for copy, expected in drawn:
        assert _same_bits(copy.target, expected)


def zeroed(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the same form without a bit set; torch 2.4 can't fill float8."""
    result = torch.empty_like(tensor)
    cooperative._bits(result).zero_()
    return result


@settings(max_examples=40)
@given(st.data(), st.integers(16, 40), st.integers(1, 60))
def test_what_is_sent_is_what_arrives(data: st.DataObject, small: int, limit: int) -> None:
    drawn = [data.draw(copies(index)) for index in range(data.draw(st.integers(1, 4)))]
    whole = [copy for copy, _ in drawn]
    with patch.object(cooperative, "_SMALL_BYTES", small), torch.inference_mode():
        run(whole)
        there = [Copy(copy.name, copy.box, copy.dtype, zeroed(copy.target)) for copy in whole]
        batches = zip(*(list(cooperative._deal(side, cooperative._sent_bytes, limit)) for side in (whole, there)))
        for mine, others in batches:
            room = torch.zeros(limit + max(small, 16), dtype=torch.uint8)
            for copy, place in cooperative._places(mine, room):
                place.copy_(cooperative._bits(copy.target))
            for copy, place in cooperative._places(others, room):
                cooperative._bits(copy.target).copy_(place)
    for copy, (_, expected) in zip(there, drawn):
        assert _same_bits(copy.target, expected)
