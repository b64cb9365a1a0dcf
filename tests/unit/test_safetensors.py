"""safetensors files as real writers make them."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file, save_model
from torch import nn

from tests.security._handmade import safetensors_bytes, tensor, write
from torchload.core.checkpoint import Checkpoint, OpaqueTensor, TensorEntry
from torchload.core.source import MemorySource
from torchload.errors import CorruptCheckpointError
from torchload.formats import open_checkpoint
from torchload.formats.files import safetensors as format_module

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def dense(entry: TensorEntry) -> torch.Tensor:
    """The tensor that an entry describes, put together byte by byte."""
    result = torch.zeros(entry.shape).to(entry.dtype)
    for box in entry.boxes:
        assert box.is_contiguous
        count = entry.dtype.itemsize
        for size in box.shape:
            count *= size
        data = bytearray(box.extent.source.read(box.extent.offset + box.start, count))
        region = tuple(slice(start, start + size) for start, size in zip(box.origin, box.shape))
        result[region] = torch.frombuffer(data, dtype=entry.dtype).reshape(box.shape)
    return result


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


def opened(data: bytes) -> Checkpoint:
    from torchload.formats.files import safetensors

    return safetensors.open(MemorySource(data, "handmade.safetensors"), "handmade.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_safetensors_writes_is_read_bit_for_bit(dtype: torch.dtype) -> None:
    expected = torch.randint(0, 2, (3, 40), dtype=torch.uint8).view(torch.uint8)
    expected = expected.view(dtype) if dtype != torch.bool else expected.to(torch.bool)
    checkpoint = opened(save({"weight": expected.contiguous()}))
    assert same_bits(dense(checkpoint.root["weight"]), expected)


def test_packed_four_bit_floats_have_torchs_shape() -> None:
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no 4-bit floats")
    packed = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(dtype)
    entry = opened(safetensors_bytes({"w": tensor("F4", [2, 8], 0, 8)}, bytes(range(8)))).root["w"]
    assert (entry.dtype, entry.shape, entry.nbytes) == (packed.dtype, (2, 4), 8)


@pytest.mark.parametrize("code", ["F6_E2M3", "F6_E3M2"])
def test_dtypes_that_torch_lacks_are_opaque(code: str) -> None:
    entry = opened(safetensors_bytes({"w": tensor(code, [4, 2], 0, 6)}, b"\0" * 6)).root["w"]
    assert isinstance(entry, OpaqueTensor)
    assert code in entry.reason
    assert entry.shape == (4, 2)


def test_the_dtype_table_agrees_with_torch() -> None:
    for code, (bits, name) in format_module.DTYPES.items():
        dtype = getattr(torch, name, None) if name else None
        if dtype is not None and bits >= 8:
            assert dtype.itemsize * 8 == bits, code


def test_names_keep_the_headers_order_and_data_is_located(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.arange(5), "empty": torch.empty(0, 7), "scalar": torch.tensor(3.5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "step": "12"})
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.metadata == {"format": "pt", "step": "12"}
        assert checkpoint.root.keys() == tensors.keys()
        assert not checkpoint.checksums
        for name, expected in tensors.items():
            assert same_bits(dense(checkpoint.root[name]), expected)
        assert checkpoint.root["empty"].boxes == ()


def test_names_dropped_by_save_model_come_back_as_the_same_entry(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    save_model(Tied(), str(tmp_path / "tied.safetensors"))
    with open_checkpoint(tmp_path / "tied.safetensors") as checkpoint:
        assert checkpoint.root["head.weight"] is checkpoint.root["embed.weight"]


def test_metadata_never_shadows_a_tensor() -> None:
    header = {"__metadata__": {"a": "b", "format": "a"}, "a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 1, 2)}
    root = opened(safetensors_bytes(header, b"xy")).root
    assert root.keys() == {"a", "b"}
    assert root["a"] is not root["b"]


def test_files_of_other_frameworks_are_noted() -> None:
    assert "flax" in opened(save({"w": torch.ones(1)}, {"format": "flax"})).notes[0]
    assert opened(save({"w": torch.ones(1)}, {"format": "pt"})).notes == ()


def test_a_file_without_tensors_is_valid() -> None:
    assert opened(safetensors_bytes({})).root == {}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=8,
    )
)
def test_law_what_safetensors_writes_is_what_is_read(layout: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {
        name: torch.randint(0, 2, shape).to(torch.uint8).to(torch.float32).to(dtype)
        for name, (dtype, shape) in layout.items()
    }
    root = opened(save(tensors)).root
    assert root.keys() == tensors.keys()
    assert all(same_bits(dense(root[name]), expected) for name, expected in tensors.items())


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 40, -1])
def test_truncation_says_how_much_is_there(tmp_path: Path, kept: int) -> None:
    data = save({"weight": torch.randn(16)})
    path = write(tmp_path / "model.safetensors", data[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        open_checkpoint(path)
    if kept == -1:
        assert isinstance(caught.value, CorruptCheckpointError)
        assert f"incomplete: {len(data) - 1:,} of {len(data):,} bytes" in str(caught.value)


def test_names_may_look_like_what_is_looked_for_in_the_text() -> None:
    names = ["a:b", "layer-0", "1" * 60, "x,[{", '"quoted"', "ü", "\\u0061"]
    checkpoint = opened(save({name: torch.full((2,), float(number)) for number, name in enumerate(names)}))
    assert {name: dense(entry).tolist() for name, entry in checkpoint.root.items()} == {
        name: [float(number)] * 2 for number, name in enumerate(names)
    }


@pytest.mark.parametrize("order", list(permutations(["a", "b", "c"])))
def test_a_chain_of_names_is_followed_whatever_its_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    following = {"a": "b", "b": "c", "c": "kept"}
    metadata = {"loop": "pool", "pool": "loop", "title": "net", **{name: following[name] for name in order}}
    save_file({"kept": torch.ones(2)}, tmp_path / "x.safetensors", metadata=metadata)
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert set(checkpoint.root) == {"a", "b", "c", "kept"}
        assert all(entry is checkpoint.root["kept"] for entry in checkpoint.root.values())
