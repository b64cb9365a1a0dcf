"""safetensors files that break the format's rules, or are made to do harm."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from tests.security._handmade import safetensors_bytes, tensor, write
from torchload.core.checkpoint import TensorEntry
from torchload.core.source import MemorySource
from torchload.errors import CorruptCheckpointError, TorchLoadError
from torchload.formats import open_checkpoint
from torchload.formats.files import safetensors


def refused(data: bytes) -> str:
    with pytest.raises(CorruptCheckpointError) as caught:
        safetensors.open(MemorySource(data, "hostile"), "hostile")
    assert len(str(caught.value)) < 2000
    return str(caught.value)


GOOD = tensor("U8", [4], 0, 4)

BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "not an object": ("U8", "instead of an object"),
    "null": (None, "instead of an object"),
    "a list": ([1, 2], "instead of an object"),
    "no fields": ({}, "data_offsets and dtype and shape missing"),
    "no dtype": ({"shape": [4], "data_offsets": [0, 4]}, "dtype missing"),
    "unknown dtype": (tensor("F128", [4], 0, 4), "unknown dtype 'F128'"),
    "dtype of the wrong case": (tensor("u8", [4], 0, 4), "unknown dtype"),
    "dtype is a number": (tensor(8, [4], 0, 4), "unknown dtype"),
    "dtype is a list": (tensor(["U8"], [4], 0, 4), "unknown dtype"),
    "shape is a number": (tensor("U8", 4, 0, 4), "its shape 4 holds"),
    "shape is text": (tensor("U8", "4", 0, 4), "shape"),
    "shape is an object": (tensor("U8", {"4": 4}, 0, 4), "shape"),
    "negative size": (tensor("U8", [-4], 0, 4), "something other than sizes"),
    "two negative sizes": (tensor("U8", [-2, -2], 0, 4), "something other than sizes"),
    "fractional size": (tensor("U8", [4.0], 0, 4), "something other than sizes"),
    "boolean size": (tensor("U8", [4, True], 0, 4), "something other than sizes"),
    "nested size": (tensor("U8", [[4]], 0, 4), "its shape a nested list holds"),
    "size overflows 64 bits to 4": (tensor("U8", [2**62 + 1, 4], 0, 4), "larger than any tensor"),
    "product overflows to 0": (tensor("U8", [2**32, 2**32], 0, 0), "larger than any tensor"),
    "huge but empty": (tensor("U8", [2**62, 2**62, 0], 0, 0), "larger than any tensor"),
    "too many dimensions": (tensor("U8", [1] * 65, 0, 1), "at most 64 sizes"),
    "a million dimensions": (tensor("U8", [1] * 100_000, 0, 1), "at most 64 sizes"),
    "offsets reversed": (tensor("U8", [4], 4, 0), "ordered positions"),
    "negative offset": (tensor("U8", [4], -4, 0), "ordered positions"),
    "fractional offset": (tensor("U8", [4], 0, 4.0), "ordered positions"),
    "boolean offset": (tensor("U8", [1], False, True), "ordered positions"),
    "three offsets": ({**GOOD, "data_offsets": [0, 2, 4]}, "two positions"),
    "offsets are text": ({**GOOD, "data_offsets": "04"}, "ordered positions"),
    "too short for its shape": (tensor("F32", [4], 0, 4), "takes 16 bytes, not 4"),
    "too long for its shape": (tensor("U8", [3], 0, 4), "takes 3 bytes, not 4"),
    "half a byte": (tensor("F4", [1], 0, 1), "whole bytes"),
    "scalar without data": (tensor("F32", [], 0, 0), "takes 4 bytes, not 0"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_is_refused_by_name(case: str) -> None:
    entry, expected = BAD_ENTRIES[case]
    message = refused(safetensors_bytes({"the.weight": entry}, b"data"))
    assert "the.weight" in message
    assert expected in message


def test_equal_looking_shapes_of_other_types_are_refused_also_after_good_ones() -> None:
    for good, bad in (([1], [True]), ([1], [1.0]), ([], ""), ([], {})):
        header = {"good": tensor("U8", good, 0, 1), "bad": tensor("U8", bad, 1, 2)}
        assert "'bad'" in refused(safetensors_bytes(header, b"xy"))


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        ({"a": tensor("U8", [4], 4, 8)}, 8, "leave a hole"),
        ({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [2], 6, 8)}, 8, "leave a hole"),
        ({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 2, 6)}, 6, "overlap"),
        ({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 0, 4)}, 4, "overlap"),
        ({"a": tensor("U8", [8], 0, 8), "b": tensor("U8", [2], 2, 4)}, 8, "overlap"),
        ({"a": tensor("U8", [4], 0, 4)}, 5, "1 bytes after the end"),
        ({}, 1, "1 bytes after the end"),
        ({"a": tensor("U8", [4], 0, 4)}, 3, "incomplete"),
        ({"a": tensor("U8", [2**62], 0, 2**62)}, 4, "incomplete"),
    ],
)
def test_tensors_must_cover_the_data_exactly(header: dict[str, Any], size: int, expected: str) -> None:
    assert expected in refused(safetensors_bytes(header, b"x" * size))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
         "'a' twice"),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', "'dtype' twice"),
        (b'{"__metadata__":{"x":"1","x":"2"}}', "'x' twice"),
        (b'{"__metadata__":{},"__metadata__":{}}', "'__metadata__' twice"),
        (b'{"__metadata__":{"x":1}}', "text to text"),
        (b'{"__metadata__":{"x":null}}', "text to text"),
        (b'{"__metadata__":["x"]}', "text to text"),
        (b'{"\xff":{}}', "not UTF-8"),
        (b'{"\\ud800":{}}', "surrogate"),
        ('{"a":{}}'.encode("utf-16-le"), "valid JSON"),
        (b'{"a":', "valid JSON"),
        (b"{}{}", "valid JSON"),
        (b"{}\0\0", "valid JSON"),
        (b"{'a': 1}", "valid JSON"),
        (b' {"a": 1}', "begin with"),
        (b"[]", "begin with"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b'{"a":{"dtype":"U8","shape":[1' + b"0" * 100_000 + b'],"data_offsets":[0,1]}}', "JSON"),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', "NaN"),
        (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', "-0"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}', "-0"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1,":":2}', "'a' twice"),
        (b'{"__metadata__":{"x:y":"1","z":"2","z":"3"}}', "'z' twice"),
        (b'{"a":{"b":{"c":1,"c":2}}}', "'c' twice"),
        (b'{"layer-0":1,"layer-0":2}', "'layer-0' twice"),
        (b'{"__metadata__":Infinity}', "Infinity"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', "sizes"),
    ],
)  # fmt: skip
def test_the_header_must_be_strict_json(header: bytes, expected: str) -> None:
    assert expected in refused(safetensors_bytes(header, b"x"))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**62, 2**32, 100_000_001, 100_000_000, 1000])
def test_a_header_length_beyond_the_file_or_the_bound_allocates_nothing(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "huge.safetensors", safetensors_bytes({"a": GOOD}, b"data", length=length))
    with pytest.raises(CorruptCheckpointError, match="header"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1])
def test_a_header_too_short_to_be_one_is_refused(length: int) -> None:
    refused(safetensors_bytes(b"{}", length=length))


@pytest.mark.parametrize(
    "unit",
    [b"[],", b"{},", b"1,", b"[[[[[]]]]],"],
)
def test_a_small_header_cannot_take_much_memory(unit: bytes) -> None:
    count = 30_000_000 // len(unit)
    header = b'{"a":[' + unit * count + b"1]}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "values" in refused(safetensors_bytes(header))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


def test_a_header_of_nothing_but_names_cannot_take_much_memory() -> None:
    header = b'{"__metadata__":{' + b",".join(b'"%x":"b"' % number for number in range(1_000_000)) + b"}}"
    assert "names" in refused(safetensors_bytes(header))


def test_a_sparse_giant_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "giant.safetensors"
    with path.open("wb") as file:
        file.write(safetensors_bytes({"a": GOOD}, b"data"))
        file.truncate(2**40)
    with pytest.raises(CorruptCheckpointError, match="bytes after the end"):
        open_checkpoint(path)


@given(st.data())
def test_law_any_damage_ends_in_a_torchload_error_or_within_the_file(data: st.DataObject) -> None:
    original = save({"a": torch.arange(6, dtype=torch.int32), "b": torch.zeros(2, 2)}, {"format": "pt"})
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(original) - 40))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged
    source = MemorySource(bytes(damaged), "damaged")
    try:
        root = safetensors.open(source, "damaged").root
    except TorchLoadError:
        return
    for entry in root.values():
        if isinstance(entry, TensorEntry):
            for box in entry.boxes:
                assert box.extent.offset + box.start + entry.nbytes <= source.size


def test_every_truncation_is_found() -> None:
    original = save({"a": torch.arange(6, dtype=torch.int32), "b": torch.zeros(2, 2)})
    for kept in range(len(original)):
        refused(original[:kept])


def test_a_flipped_bit_of_the_header_is_found_or_changes_only_a_name_or_a_type_of_equal_size() -> None:
    original = save({"a": torch.arange(6, dtype=torch.int32)})
    (length,) = struct.unpack("<Q", original[:8])
    intact = json.loads(original[8 : 8 + length])
    for position in range((8 + length) * 8):
        damaged = bytearray(original)
        damaged[position // 8] ^= 1 << position % 8
        try:
            root = safetensors.open(MemorySource(bytes(damaged), "damaged"), "damaged").root
        except TorchLoadError:
            continue
        assert json.loads(damaged[8 : 8 + length]) != intact
        (entry,) = root.values()
        assert entry.nbytes == 24
