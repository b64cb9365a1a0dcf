"""Overflow is found exactly where a cast turns a finite number infinite, whatever else lies beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchload.transfer.overflow import out_of_range, overflows

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


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("result", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_whatever_precision_torch_multiplies_in(result: torch.dtype, precision: str) -> None:
    """From the largest value that fits on, one float32 after the other, and in the midst of others."""
    limit = torch.tensor(torch.finfo(result).max)
    steps = limit.view(torch.int32) + torch.arange(-2000, 2000, dtype=torch.int32) * (1 << (22 - 11))
    around_limit = steps.view(torch.float32)[steps.view(torch.float32).isfinite()]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for values in (around_limit.sort().values[::7], -around_limit[::7]):
            verdicts = [overflows(one := torch.cat([torch.zeros(20), value[None]]), one.to(result)) for value in values]
            lost = [bool(out_of_range(value[None], value[None].to(result))) for value in values]
            assert verdicts == lost
            assert {True, False} <= set(lost)
    finally:
        torch.set_float32_matmul_precision(before)
