"""Overflow is found exactly where a cast turns a finite number infinite, whatever else lies beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchload.transfer.overflow import overflows

NARROW = [torch.float16, torch.bfloat16, torch.float32]
PATTERNS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)


def truth(source: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Element by element."""
    return source.isfinite() & ~result.isfinite()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("through", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("result", NARROW)
def test_every_bit_pattern_of_two_bytes(stored: torch.dtype, through: torch.dtype, result: torch.dtype) -> None:
    source = PATTERNS.view(stored).to(through)
    lost = truth(source, source.to(result))
    assert overflows(source, source.to(result)) == bool(lost.any())
    kept = source[~lost]  # infinities, NaNs and subnormals among them
    assert not overflows(kept, kept.to(result))
    for one in source[lost][::97]:
        beside = torch.cat([kept[:33], one[None], kept[33:40]])
        assert overflows(beside, beside.to(result))


around = st.one_of(
    st.floats(width=64),
    *(st.floats(limit * 0.99, limit * 1.01) for limit in (65504.0, 65520.0)),
    *(st.floats(-limit * 1.01, -limit * 0.99) for limit in (65504.0, 65520.0)),
    st.sampled_from([3.3895e38, 3.3953e38, 3.4028235e38, 3.4028236e38, 1e39, -3.3953e38, -1e39, 1e-45, 0.0, -0.0]),
    st.sampled_from([float("inf"), float("-inf"), float("nan")]),
)


@given(
    st.lists(around, min_size=1, max_size=70),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(NARROW),
    st.integers(0, 3),
    st.integers(0, 4000),
)
def test_as_element_by_element(
    values: list[float], dtype: torch.dtype, narrow: torch.dtype, start: int, ordinary: int
) -> None:
    """Also where vectors end in the middle, and where a tensor begins anywhere."""
    memory = torch.cat([torch.tensor(values, dtype=torch.float64).to(dtype), torch.full((ordinary,), 0.5, dtype=dtype)])
    source = memory[min(start, len(memory) - 1) :]
    result = torch.empty(len(source) + start, dtype=narrow)[start:]
    result.copy_(source)
    assert overflows(source, result) == bool(truth(source, result).any())
