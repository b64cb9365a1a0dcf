from __future__ import annotations

import argparse
import collections
import copy
import datetime as dt
import enum
import functools
import io
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.unit.entries import assert_holds, read_entry
from tests.versions import can_pickle
from torchload.core.checkpoint import Container, Extent, OpaqueTensor, Record, TensorEntry, record_fields
from torchload.core.source import MemorySource
from torchload.errors import CheckpointFormatError, CorruptCheckpointError, TorchLoadError
from torchload.formats.files import archives
from torchload.formats.pickles.unpickle import read_pickle, unpickle


def reopened(value: Any, **options: Any) -> Any:
    """The tree that a zip checkpoint of `value` becomes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return archives.open(MemorySource(file.getvalue()), "test.pt").root


# ------------------------------------------------------------------------------------------------------- plain values

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
)
keys = st.one_of(st.text(), st.integers(-(2**63), 2**63), st.booleans(), st.tuples(st.text(), st.integers(0, 9)))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(keys, inner, max_size=5),
        st.tuples(inner, inner),
        st.sets(st.integers() | st.text(), max_size=4),
        st.frozensets(st.integers() | st.text(), max_size=4),
    ),
    max_leaves=20,
)


@given(values, st.integers(0, 5))
def test_plain_values_come_back_as_they_were(value: Any, protocol: int) -> None:
    tree = read_pickle(pickle.dumps(value, protocol=protocol), name="test")
    assert tree == value
    assert repr(tree) == repr(value) or isinstance(value, (dict, list, tuple, set, frozenset))


@given(values)
def test_the_python_pickler_writes_the_same(value: Any) -> None:
    file = io.BytesIO()
    pickle._Pickler(file, protocol=4).dump(value)  # memoizes and frames otherwise than the one in C
    assert read_pickle(file.getvalue(), name="test") == value


def test_every_mapping_is_a_container() -> None:
    value = {
        "dict": {1: 2},
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
    }
    for protocol in range(6):
        tree = read_pickle(pickle.dumps(value, protocol=protocol), name="test")
        assert tree == value
        assert all(type(mapping) is Container for mapping in [tree, *tree.values()])
        assert list(tree["ordered"]) == ["b", "a"]
        assert tree.origin is None
        assert tree.metadata is None


def test_python_2_wrote_ordered_dicts_as_lists_of_pairs() -> None:
    stream = b"ccollections\nOrderedDict\np0\n((lp1\n(lp2\nS'b'\np3\naI1\naa(lp4\nS'a'\np5\naI2\naatp6\nRp7\n."
    assert list(read_pickle(stream, name="test").items()) == [("b", 1), ("a", 2)]


def test_several_streams_in_a_row() -> None:
    data = pickle.dumps(1) + pickle.dumps({"a": b"x" * 6000}) + pickle.dumps([3]) + b"raw data"
    position, found = 0, []
    while len(found) < 3:
        stream = unpickle(data, position, name="test")
        position = stream.end
        found.append(stream.finish())
    assert found == [1, {"a": b"x" * 6000}, [3]]
    assert data[position:] == b"raw data"


def test_objects_are_shared_as_they_were() -> None:
    inner: dict[str, Any] = {"a": 1}
    ring: list[Any] = [inner, inner, (inner, [inner])]
    ring.append(ring)
    tree = read_pickle(pickle.dumps(ring), name="test")
    assert tree[0] is tree[1] is tree[2][0] is tree[2][1][0]
    assert tree[3] is tree


# ----------------------------------------------------------------------------------------------------------- records


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class Slotted:
    __slots__ = ("a", "b")


class Colour(enum.Enum):
    RED = 1


class Names(list):
    pass


class Config(dict):
    pass


class Outer:
    class Inner:
        pass


@pytest.mark.parametrize("protocol", range(6))
def test_an_object_is_a_record_of_its_attributes(protocol: int) -> None:
    record = read_pickle(pickle.dumps(Point(7), protocol=protocol), name="test")
    assert type(record) is Record
    assert record.name == f"{__name__}.Point"
    assert record_fields(record) == {"x": 7}
    assert repr(record) == f"<{__name__}.Point>"


def test_slots_are_fields_too() -> None:
    thing = Slotted()
    thing.a, thing.b = 1, [2]
    assert record_fields(read_pickle(pickle.dumps(thing), name="test")) == {"a": 1, "b": [2]}


def test_items_and_entries_are_kept() -> None:
    names, config = Names(["a", "b"]), Config(lr=0.1)
    names.extra = 1  # type: ignore[attr-defined]
    tree = read_pickle(pickle.dumps([names, config]), name="test")
    assert tree[0].items == ["a", "b"]
    assert record_fields(tree[0]) == {"extra": 1}
    assert tree[1].entries == {"lr": 0.1}
    assert type(tree[1].entries) is Container


@pytest.mark.parametrize("protocol", range(6))
def test_what_people_put_beside_weights(protocol: int) -> None:
    value = {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "path": pathlib.PurePosixPath("a/b"),
        "time": dt.datetime(2020, 1, 2),  # noqa: DTZ001
        "colour": Colour.RED,
        "class": Point,
        "function": functools.partial(print, 1),
        "nested": Outer.Inner() if protocol >= 4 else None,
        "complex": 1 + 2j,
        "range": range(3),
    }
    tree = read_pickle(pickle.dumps(value, protocol=protocol), name="test")
    assert record_fields(tree["args"]) == {"lr": 0.1, "layers": [1, 2]}
    assert tree["class"].name == f"{__name__}.Point"
    assert tree["colour"].args == (1,)
    assert tree["complex"] == 1 + 2j


def test_a_nested_class_of_an_old_protocol_is_still_a_class() -> None:
    stream = b"\x80\x02c__builtin__\ngetattr\nc" + __name__.encode() + b"\nOuter\nX\x05\x00\x00\x00Inner\x86R)\x81."
    assert read_pickle(stream, name="test").name == f"{__name__}.Outer.Inner"


def test_keyword_arguments_of_a_constructor_are_entries() -> None:
    record = read_pickle(b"\x80\x04cm\nC\nK\x07\x85}\x8c\x01aK\x01s\x92.", name="test")
    assert record.args == (7,)
    assert record.entries == {"a": 1}


def test_calling_the_result_of_a_call_is_recorded() -> None:
    tree = read_pickle(b"\x80\x02cm\nf\n)RK\x01\x85R.", name="test")
    assert tree.name == "m.f"
    assert tree.args[1] == 1


# ------------------------------------------------------------------------------------------------------------- torch

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(getattr(torch, name) for name in ("uint16", "uint32", "uint64", "complex32") if hasattr(torch, name)),
    *(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu") if hasattr(torch, name)),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    if not can_pickle(dtype):
        pytest.skip("this torch can't save it")
    raw = torch.arange(3 * 5 * dtype.itemsize, dtype=torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    value = {"tensor": raw.view(dtype).reshape(3, 5), "dtype": dtype}
    tree = reopened(value)
    assert_holds(tree["tensor"], value["tensor"])
    assert tree["dtype"] is dtype


def test_views_strides_and_zero_sizes() -> None:
    base = torch.arange(60.0)
    value = {
        "base": base,
        "view": base[7:31].view(4, 6),
        "transposed": base.view(6, 10).t(),
        "stepped": base[3::7],
        "expanded": base[5].expand(3, 4),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "none": torch.empty(0),
        "overlapping": base.as_strided((3, 3), (1, 1), 2),
        "channels": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    tree = reopened(value)
    assert_holds(tree, value)
    extents = {id(tree[name].boxes[0].extent) for name in ("base", "view", "transposed", "expanded")}
    assert len(extents) == 1
    assert tree["channels"].boxes[0].strides == value["channels"].stride()


def test_parameters_are_told_from_buffers_and_ties_are_one_entry() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    state = {"weight": weight, "again": weight, "buffer": torch.zeros(2), "data": weight.data}
    tree = reopened(state)
    assert tree["weight"].is_parameter
    assert tree["again"] is tree["weight"]
    assert not tree["buffer"].is_parameter
    assert tree["data"].location == tree["weight"].location


class Marked(torch.Tensor):
    pass


def test_tensors_with_attributes_and_of_subclasses() -> None:
    tensor = torch.arange(4.0)
    tensor.note = "kept"  # type: ignore[attr-defined]
    parameter = nn.Parameter(torch.ones(3))
    parameter.note = 1  # type: ignore[attr-defined]
    value = {"attribute": tensor, "subclass": torch.arange(3.0).as_subclass(Marked), "parameter": parameter}
    if hasattr(nn, "Buffer"):
        value["buffer"] = nn.Buffer(torch.ones(2))
    tree = reopened(value)
    for name, expected in value.items():
        assert_holds(tree[name], expected.as_subclass(torch.Tensor))
    assert tree["parameter"].is_parameter


def test_a_state_dict_keeps_its_metadata() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    tree = reopened({"state_dict": model.state_dict()})
    assert_holds(tree["state_dict"], model.state_dict())
    assert tree["state_dict"].metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert tree["state_dict"].metadata["1"]["version"] == 2


def test_sizes_and_devices_are_plain() -> None:
    value = {"size": torch.Size((2, 3)), "device": torch.device("cuda:1"), "cpu": torch.device("cpu")}
    assert reopened(value) == {"size": (2, 3), "device": "cuda:1", "cpu": "cpu"}


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_say_what_they_are() -> None:
    values = torch.eye(3)
    value = {
        "coo": values.to_sparse(),
        "csr": values.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
        "meta": torch.empty(2, 5, device="meta"),
        "negated": torch._neg_view(torch.zeros(2, dtype=torch.bool)),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "lazy": nn.UninitializedParameter(),
    }
    tree = reopened(value)
    assert all(type(tensor) is OpaqueTensor for tensor in tree.values()), tree
    assert tree["coo"].shape == tree["csr"].shape == tree["quantized"].shape == (3, 3)
    assert tree["meta"].shape == (2, 5)
    assert "COO" in tree["coo"].reason
    assert "CSR" in tree["csr"].reason


def test_a_storage_by_itself_is_a_vector() -> None:
    tree = reopened(
        {"typed": torch.arange(4.0).storage(), "untyped": torch.arange(3, dtype=torch.uint8).untyped_storage()}
    )
    assert_holds(tree["typed"], torch.arange(4.0))
    assert_holds(tree["untyped"], torch.arange(3, dtype=torch.uint8))


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_that_were_pickled_without_torch_save(protocol: int) -> None:
    base = torch.arange(12.0)
    value = {
        "small": base.view(3, 4),
        "view": base[5:],
        "parameter": nn.Parameter(torch.ones(2)),
        "large": torch.rand(3000),
        "half": torch.ones(3).half(),
        "unsigned": torch.arange(5).to(torch.uint8),
        "empty": torch.empty(0, 2),
    }
    data = pickle.dumps(value, protocol=protocol)
    tree = read_pickle(data, name="test", source=MemorySource(data))
    assert_holds(tree, value)
    assert tree["parameter"].is_parameter


@pytest.mark.parametrize("nested", [b"", b"N.", pickle.dumps(1) * 5, pickle.dumps(torch.ones(2)), b"PK\x03\x04"])
def test_nested_streams_that_hold_no_storage_are_refused(nested: bytes) -> None:
    stream = (
        b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\nB"
        + len(nested).to_bytes(4, "little") + nested + b"\x85RK\x00K\x01\x85K\x01\x85\x89NtR."
    )  # fmt: skip
    with pytest.raises(TorchLoadError):
        read_pickle(stream, name="test")


def test_an_optimizer_beside_the_weights() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    value = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    assert_holds(reopened(value), value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_torch(protocol: int) -> None:
    value = {"a": torch.arange(6.0).view(2, 3), "b": [nn.Parameter(torch.ones(2))], "c": argparse.Namespace(x=1)}
    tree = reopened(value, pickle_protocol=protocol)
    assert_holds(tree["a"], value["a"])
    assert tree["b"][0].is_parameter
    assert record_fields(tree["c"]) == {"x": 1}


# --------------------------------------------------------------------------------------------- damage and late storages


def declared(
    numel: int,
    offset: Any,
    shape: Any,
    strides: Any,
    storage: str = "FloatStorage",
    sound: tuple[int, ...] | None = None,
) -> bytes:
    """A pickle of one tensor, as torch writes it, whatever it says; perhaps after a vector of shape `sound`."""

    class Written:
        def __init__(self, *arguments: Any) -> None:
            self.arguments = arguments

        def __reduce__(self) -> Any:
            return (torch._utils._rebuild_tensor_v2, (REFERENCE, *self.arguments, False, None))

    class Pickler(pickle._Pickler):  # the one in C may be asked as well
        def persistent_id(self, value: Any) -> Any:
            return ("storage", getattr(torch, storage), "0", "cpu", numel) if value is REFERENCE else None

    file = io.BytesIO()
    before = {} if sound is None else {"sound": Written(0, sound, (1,))}
    Pickler(file, protocol=2).dump({**before, "name.of.tensor": Written(offset, shape, strides)})
    return file.getvalue()


REFERENCE = object()


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides"),
    [
        (6, 1, (2, 3), (3, 1)),
        (6, 0, (2, 3), (4, 1)),
        (6, 0, (7,), (1,)),
        (6, 7, (1,), (1,)),
        (6, -1, (1,), (1,)),
        (6, 0, (-1,), (1,)),
        (6, 0, (2,), (-1,)),
        (6, 0, (2, 3), (1,)),
        (6, 0, (1 << 62, 1 << 62), (0, 0)),
        (6, 0, (1 << 64,), (0,)),
        (6, 0, (2,), (1 << 70,)),
        (6, 1 << 70, (1,), (1,)),
        (6, 0, (1,) * 65, (1,) * 65),
        (6, 0, (True,), (1,)),
        (6, 0.0, (1,), (1,)),
        (6, 0, (1.0,), (1,)),
        (6, 0, "12", "12"),
        (6, 0, None, None),
        (-1, 0, (1,), (1,)),
        (1 << 63, 0, (1,), (1,)),
        (True, 0, (1,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused_by_name(numel: Any, offset: Any, shape: Any, strides: Any) -> None:
    asked: list[str] = []

    def extent_of(storage: Any) -> Extent:
        asked.append(storage.key)
        return Extent(MemorySource(bytes(24)), 0, 24)

    with pytest.raises(CorruptCheckpointError) as caught:
        read_pickle(declared(numel, offset, shape, strides), extent_of, name="test")
    assert asked == []
    assert "name.of.tensor" in str(caught.value) or "storage" in str(caught.value)


def test_the_same_tensor_inside_its_storage_is_not() -> None:
    stream = unpickle(declared(6, 1, (2, 2), (3, 1)), name="test")
    assert {key: (storage.dtype, storage.nbytes) for key, storage in stream.storages.items()} == {
        "0": (torch.float32, 24)
    }
    # A format that learns only now where the storages are can still say so.
    data = torch.arange(6.0)
    tree = stream.finish(lambda storage: Extent(MemorySource(data.numpy().tobytes()), 0, storage.nbytes))
    assert_holds(tree, {"name.of.tensor": data.as_strided((2, 2), (3, 1), 1)})


def test_a_tensor_needs_somewhere_to_lie() -> None:
    with pytest.raises(CheckpointFormatError, match="test is a pickle whose tensors have their data elsewhere"):
        read_pickle(declared(6, 0, (2,), (1,)), name="test")


@pytest.mark.parametrize("shape", [(True,), (1.0,)])
def test_a_sound_layout_excuses_none_that_is_equal_to_it(shape: Any) -> None:
    source = MemorySource(bytes(24))
    data = declared(6, 0, shape, (1,), sound=(1,))
    with pytest.raises(CorruptCheckpointError, match="'name.of.tensor' has an impossible shape"):
        read_pickle(data, lambda storage: Extent(source, 0, storage.nbytes), name="test")


def test_a_storage_may_be_declared_twice_but_not_without_end() -> None:
    once = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ0"
    stream = b"\x80\x02" + once.replace(b"%c", b"\x04") + once.replace(b"%c", b"\x04") + b"N."
    assert len(unpickle(stream, name="test").storages) == 1
    many = b"".join(once.replace(b"%c", bytes([number])) for number in range(1, 40))
    with pytest.raises(CorruptCheckpointError, match="declared"):
        unpickle(b"\x80\x02" + many + b"N.", name="test")


# ------------------------------------------------------------------------------------------------------------- numpy

ARRAYS = [
    np.arange(12, dtype=code).reshape(3, 4)
    for code in (
        "<f4",
        ">f4",
        "<f8",
        ">f8",
        "<f2",
        ">f2",
        "i1",
        "<i2",
        "<i4",
        ">i8",
        "u1",
        "<u2",
        "<u4",
        "<u8",
        "c8",
        "c16",
        ">c16",
    )
] + [
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.array([True, False]),
    np.array(2.5),
    np.zeros((0, 3), dtype="f4"),
    np.arange(24.0)[::2],
    np.arange(5000, dtype="f4"),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("number", range(len(ARRAYS)))
def test_arrays_of_numbers_are_tensors(number: int, protocol: int) -> None:
    array = ARRAYS[number]
    data = pickle.dumps({"array": array}, protocol=protocol)
    for source in (None, MemorySource(data)):
        entry = read_pickle(data, name="test", source=source)["array"]
        native = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("=")).reshape(array.shape)
        assert_holds(entry, torch.from_numpy(native))


def test_a_large_array_stays_in_the_file() -> None:
    array = np.arange(5000, dtype="f4")
    data = pickle.dumps(array, protocol=4)
    source = MemorySource(data)
    extent = read_pickle(data, name="test", source=source).boxes[0].extent
    assert extent.source is source
    assert data[extent.offset : extent.offset + extent.nbytes] == array.tobytes()


@pytest.mark.parametrize("protocol", range(6))
def test_scalars_are_numbers(protocol: int) -> None:
    value = [
        *(np.float64(0.5), np.float32(0.25), np.float16(2), np.int64(-7), np.uint8(200)),
        *(np.bool_(True), np.complex64(1 + 2j), np.int64(2**40)),
    ]
    tree = read_pickle(pickle.dumps(value, protocol=protocol), name="test")
    assert tree == [0.5, 0.25, 2.0, -7, 200, True, 1 + 2j, 2**40]
    assert [type(number) for number in tree] == [float, float, float, int, int, bool, complex, int]


def test_scalars_as_keys_become_numbers_too() -> None:
    tree = read_pickle(pickle.dumps({np.int64(3): "a", "b": 1}), name="test")
    assert tree == {3: "a", "b": 1}
    assert list(tree) == [3, "b"]


def test_other_arrays_stay_records() -> None:
    value = [np.array(["a", "b"]), np.array([{}], dtype=object), np.array("2020-01-01", dtype="M8[D]")]
    tree = read_pickle(pickle.dumps(value), name="test")
    assert all(type(item) is Record for item in tree)


def test_python_2_wrote_bytes_as_text() -> None:
    array = np.array([1.5, -2.25, 1e300])
    raw = array.tobytes()
    stream = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\n"
        b"U\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(raw)])
        + raw
        + b"tb."
    )
    assert_holds(read_pickle(stream, name="test"), torch.from_numpy(array))


@pytest.mark.parametrize("shape", [(4,), (2,), (-3,), (1 << 62, 4)])
def test_an_array_of_another_size_than_its_data_is_refused(shape: tuple[int, ...]) -> None:
    data = pickle.dumps(np.arange(3.0), protocol=2)
    assert data.count(b"K\x03\x85") == 1
    changed = data.replace(
        b"K\x03\x85",
        b"".join(pickle.dumps(size, protocol=2)[2:-1] for size in shape) + (b"\x85" if len(shape) == 1 else b"\x86"),
    )
    with pytest.raises(CorruptCheckpointError):
        read_pickle(changed, name="test")


def test_numpy_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    stream = pickle.dumps(np.arange(3.0))
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "from torchload.formats.pickles.unpickle import read_pickle\n"
        f"print(read_pickle({stream!r}, name='test').shape)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(3,)"


def test_bytes_are_bytes_in_every_protocol() -> None:
    for value in (b"", b"\x00\xff", b"long" * 3000, bytearray(b"abc"), bytearray(b"x" * 9000)):
        for protocol in range(6):
            assert read_pickle(pickle.dumps([value, value], protocol=protocol), name="test") == [value, value]


def test_reading_changes_nothing_about_the_next_reading() -> None:
    data = pickle.dumps({"a": collections.OrderedDict(x=1), "b": Point(3), "c": torch.Size((2,))})
    first, second = (read_pickle(data, name="test") for _ in range(2))
    first["a"]["y"] = 2
    assert list(second["a"]) == ["x"]
    assert record_fields(second["b"]) == {"x": 3}
    assert copy.deepcopy(second["c"]) == (2,)


def test_the_pickler_in_python_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no C unpickler, the one in Python is used; the stand-ins must not rely on the other."""
    from torchload.formats.pickles import unpickle as module

    reader = type("Reader", (pickle._Unpickler,), {  # type: ignore[misc]
        name: vars(module._Reader)[name]
        for name in ("find_class", "new_class", "attribute", "persistent_load", "storage")
    })  # fmt: skip

    def construct(self: Any, stream: Any, name: str, outside: Any = None) -> None:
        pickle._Unpickler.__init__(self, module._File(stream.code), encoding="utf-8", errors="surrogateescape")  # type: ignore[attr-defined]
        self.name, self.blobs, self.classes, self.outside = name, stream.blobs, {}, outside
        self.storages, self.variants = {}, {}

    reader.__init__ = construct  # type: ignore[method-assign]
    value = {"a": [1, (2, {3})], "b": argparse.Namespace(x=1), "c": np.arange(3.0), "d": b"y" * 9000}
    for protocol in range(6):
        data = pickle.dumps(value, protocol=protocol)
        expected = read_pickle(data, name="test")
        with monkeypatch.context() as patch:
            patch.setattr(module, "_Reader", reader)
            tree = read_pickle(data, name="test")
        assert tree["a"] == expected["a"]
        assert tree["d"] == expected["d"]
        assert record_fields(tree["b"]) == {"x": 1}
        assert torch.equal(read_entry(tree["c"]), read_entry(expected["c"]))
        assert type(tree["c"]) is TensorEntry
