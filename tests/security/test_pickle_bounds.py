"""No pickle takes time or memory out of proportion, overflows a stack, or crashes the interpreter."""

from __future__ import annotations

import random
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.security._hostile import PROTO, contained, named, text
from torchload.errors import CorruptCheckpointError, TorchLoadError
from torchload.formats.pickles.unpickle import read_pickle

MANY = 1 << 19
SYSTEM = named("os", "system")
ORDERED = named("collections", "OrderedDict")
PARAMETER = named("torch._utils", "_rebuild_parameter")


def _doubling(wrap: bytes, first: bytes = b")", levels: int = 60) -> bytes:
    """Each level holds the one before twice: 2⁶⁰ leaves by the count of a recursion."""
    return first + b"".join(b"q\x00h\x00" + wrap for _ in range(levels))


def _module(children: bytes) -> bytes:
    return named("m", "M") + b")R}(" + text("_parameters") + b"}" + text("_modules") + b"}(" + children + b"u" + b"ub"


BOMBS: dict[str, bytes] = {
    # more objects than bytes
    "empty dicts": PROTO + b"(" + b"}" * (8 * MANY) + b"l.",
    "empty lists": PROTO + b"(" + b"]" * (8 * MANY) + b"l.",
    "empty sets": b"\x80\x04(" + b"\x8f" * (8 * MANY) + b"l.",
    "dicts from marks": PROTO + b"(" + b"(d" * (2 * MANY) + b"l.",
    "frozensets from marks": b"\x80\x04(" + b"(\x91" * (2 * MANY) + b"l.",
    "lists from marks": PROTO + b"(" + b"(Nl" * (2 * MANY) + b"l.",
    "tuples": PROTO + b"(" + b"N\x85" * (4 * MANY) + b"l.",
    "marks": PROTO + b"(" * (8 * MANY) + b"t.",
    "memo entries": b"\x80\x04N" + b"\x94" * (8 * MANY) + b".",
    "duplicates": PROTO + b"(N" + b"2" * (8 * MANY) + b"l.",
    "records": PROTO + SYSTEM + b"q\x00(" + b"h\x00)R" * MANY + b"l.",
    "records by NEWOBJ": PROTO + SYSTEM + b"q\x00(" + b"h\x00)\x81" * MANY + b"l.",
    "ordered dicts": PROTO + ORDERED + b"q\x00(" + b"h\x00)R" * MANY + b"l.",
    "calls": PROTO + PARAMETER + b"q\x00(" + b"h\x00)R" * MANY + b"l.",
    "globals": b"".join(b"cm\nn%d\n0" % number for number in range(100_000)) + b"N.",
    # lengths and indices that aren't there
    "memo index": PROTO + b"Nr\xff\xff\xff\x0f.",
    "memo index in text": b"Np268435456\n.",
    "huge memo index in text": b"Np" + b"9" * 4000 + b"\n.",
    "negative memo index": b"Np-1\n.",
    "text length": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "bytes length": b"\x80\x04\x8e" + struct.pack("<Q", (1 << 64) - 1) + b"x.",
    "bytearray length": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "integer length": PROTO + b"\x8b" + struct.pack("<I", (1 << 31) - 1) + b"x.",
    "negative integer length": PROTO + b"\x8b" + struct.pack("<i", -1) + b"x.",
    "frame length": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "digits": b"I" + b"9" * MANY + b"\n.",
    "digits of a long": b"L" + b"9" * MANY + b"L\n.",
    # nesting
    "nested lists": PROTO + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested dicts": PROTO + b"}K\x00" * 100_000 + b"N" + b"s" * 100_000 + b".",
    "nested tuples": PROTO + b")" + b"\x85" * 300_000 + b".",
    "nested frozensets": b"\x80\x04" + b"(" * 100_000 + b"\x91" * 100_000 + b".",
    "nested records": PROTO + SYSTEM + b"q\x000N" + b"q\x010h\x00h\x01\x85R" * 100_000 + b".",
    "nested states": PROTO + SYSTEM + b"q\x000N" + b"q\x010h\x00)Rh\x01b" * 100_000 + b".",
    "nested parameters": PROTO + PARAMETER + b"q\x000N" + b"q\x010h\x00h\x01\x89N\x87R" * 100_000 + b".",
    "nested arguments of a known call": PROTO + b"N" + b"\x85" * 50_000 + b"q\x000" + PARAMETER + b"h\x00\x85R.",
    "nested tuple as a key": PROTO + b"}N" + b"\x85" * 300_000 + b"Ns.",
    "nested tuple in a set": b"\x80\x04\x8f(N" + b"\x85" * 300_000 + b"\x90.",
    # shared references that a recursion would expand
    "doubling lists": PROTO + b"]" + b"".join(b"q\x000](h\x00h\x00e" for _ in range(60)) + b".",
    "doubling tuples": PROTO + _doubling(b"\x86") + b".",
    "doubling records": PROTO + SYSTEM + b"q\x010)" + b"".join(b"q\x000h\x01h\x00h\x00\x86R" for _ in range(60)) + b".",
    "doubling key": PROTO + b"}" + _doubling(b"\x86") + b"Ns.",
    "doubling keys at once": PROTO + b"}(" + _doubling(b"\x86") + b"Nu.",
    "doubling key of a DICT": b"(" + _doubling(b"\x86") + b"Nd.",
    "doubling element": b"\x80\x04\x8f(" + _doubling(b"\x86") + b"\x90.",
    "doubling element of a FROZENSET": b"\x80\x04(" + _doubling(b"\x86") + b"\x91.",
    "doubling key of a record": PROTO + SYSTEM + b")R" + _doubling(b"\x86") + b"Ns.",
    "doubling shape": PROTO + _doubling(b"\x86") + b"q\x000" + named("torch", "Size") + b"h\x00\x85R.",
    "doubling pairs": PROTO + _doubling(b"\x86") + b"q\x000" + ORDERED + b"]h\x00ah\x00a\x85R.",
    # many references to one big thing that a call would copy
    "encodings of a long text": PROTO + text("a" * MANY) + b"q\x000" + text("latin1") + b"q\x010"
    + named("_codecs", "encode") + b"q\x020(" + b"h\x02h\x00h\x01\x86R" * 50_000 + b"l.",
    "shapes from a long tuple": PROTO + b"(" + b"N" * MANY + b"tq\x000" + named("torch", "Size") + b"q\x010("
    + b"h\x01h\x00\x85R" * 50_000 + b"l.",
    "dicts from a long list": PROTO + b"](" + b"N)\x86" * 300_000 + b"eq\x000" + ORDERED + b"q\x010("
    + b"h\x01h\x00\x85R" * 50_000 + b"l.",
    "sets from a long list": PROTO + b"](" + b"K\x01" * 300_000 + b"eq\x000" + named("builtins", "set") + b"q\x010("
    + b"h\x01h\x00\x85R" * 50_000 + b"l.",
    "calls with a long tuple": PROTO + b"(" + b"N" * MANY + b"tq\x000" + named("torch._tensor", "_rebuild_from_type_v2")
    + b"q\x010" + PARAMETER + b"q\x020(" + b"h\x01(h\x02Nh\x00NtR" * 50_000 + b"l.",
    "names from long texts": b"\x80\x04" + text("a" * MANY) + b"q\x000" + b"h\x00h\x00\x930" * 100_000 + b"N.",
    "a wide tuple in many places": PROTO + b"(" + b"K\x01" * MANY + b"tq\x000(" + b"h\x00" * MANY + b"l.",
    # hashes that collide
    "colliding integers": PROTO + b"}(" + b"".join(
        b"\x8a\x10" + (number * ((1 << 61) - 1)).to_bytes(16, "little") + b"N" for number in range(50_000)
    ) + b"u.",
    "colliding floats": PROTO + b"}(" + b"".join(
        b"G" + struct.pack(">d", float(number << 40)) + b"N" for number in range(50_000)
    ) + b"u.",
    # modules
    "doubling modules": PROTO + _module(b"") + b"q\x00" + b"".join(
        b"0" + _module(text("a") + b"h\x00" + text("b") + b"h\x00") + b"q\x00" for _ in range(40)
    ) + b".",
    "a module within itself": PROTO + named("m", "M") + b")Rq\x00}(" + text("_parameters") + b"}" + text("_modules")
    + b"}(" + text("a") + b"h\x00" + text("b") + b"h\x00uub.",
    "nested modules": PROTO + _module(b"") + b"q\x00" + b"".join(
        b"0" + _module(text("a") + b"h\x00") + b"q\x00" for _ in range(20_000)
    ) + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_bomb_is_read_or_refused_within_bounds(name: str) -> None:
    assert contained(lambda: read_pickle(BOMBS[name], name="bomb"))


def test_tuples_made_to_collide_are_refused_or_read_soon() -> None:
    # Equal hashes need not be found here: equal tuples of NaNs, which differ from one another, do as well.
    nan = struct.pack(">d", float("nan"))
    keys = b"".join(b"G" + nan + b"\x85N" for _ in range(20_000))
    assert contained(lambda: read_pickle(PROTO + b"}(" + keys + b"u.", name="bomb"))


@pytest.mark.parametrize("levels", [10, 100_000])
@pytest.mark.parametrize("kind", ["list", "dict", "record", "tuple"])
def test_deep_structures_are_released_without_a_crash(kind: str, levels: int) -> None:
    stream = {
        "list": b"]" * levels + b"a" * (levels - 1),
        "dict": b"}K\x00" * levels + b"N" + b"s" * levels,
        "record": SYSTEM + b"q\x000N" + b"q\x010h\x00h\x01\x85R" * levels,
        "tuple": b")" + b"\x85" * levels,
    }[kind]

    def read_and_show() -> None:
        tree = read_pickle(PROTO + stream + b".", name="deep")
        assert repr(tree)
        del tree

    assert contained(read_and_show)


def test_shared_references_stay_shared() -> None:
    tree = read_pickle(BOMBS["doubling lists"], name="shared")
    levels = 0
    while tree:
        assert tree[0] is tree[1]
        tree = tree[0]
        levels += 1
    assert levels == 60


def test_cycles_close() -> None:
    items = read_pickle(PROTO + b"]q\x00h\x00a.", name="cycle")
    assert items[0] is items
    mapping = read_pickle(PROTO + b"}q\x00" + text("a") + b"h\x00s.", name="cycle")
    assert mapping["a"] is mapping
    record = read_pickle(PROTO + SYSTEM + b")Rq\x00}" + text("a") + b"h\x00sb.", name="cycle")
    assert record.state["a"] is record


def test_a_run_of_opcodes_may_be_of_any_length() -> None:
    for length in (1023, 1024, 1025, 5000):
        assert read_pickle(PROTO + b"(" + b"K\x07" * length + b"l.", name="run") == [7] * length


@given(st.binary(max_size=60))
def test_no_bytes_at_all_raise_anything_else(noise: bytes) -> None:
    for prefix in (b"", PROTO, b"\x80\x04", PROTO + SYSTEM, PROTO + ORDERED + b")R", PROTO + b"]q\x00"):
        with suppress(TorchLoadError):
            read_pickle(prefix + noise + b".", name="noise")


OPCODES = [
    *(bytes([code]) for code in b"(012NRbaesutl]oQ)}d\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"),
    *(b"K\x00", b"K\x01", b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x00"),
    *(text("a"), text("_metadata"), text("storage"), text("cpu"), SYSTEM, ORDERED, PARAMETER),
    *(named("torch", "Size"), named("torch", "float32"), named("torch", "FloatStorage"), named("builtins", "getattr")),
    *(named("torch._utils", "_rebuild_tensor_v2"), named("numpy.core.multiarray", "_reconstruct")),
    *(named("numpy", "ndarray"), named("numpy", "dtype"), named("numpy.core.multiarray", "scalar"), text("f4")),
    *(named("copyreg", "_reconstructor"), named("builtins", "set"), text("_modules"), text("_parameters")),
]


def test_random_programs_raise_nothing_else() -> None:
    chooser = random.Random(0)
    loaded = 0
    for _ in range(20_000):
        program = b"".join(chooser.choices(OPCODES, k=chooser.randint(1, 14)))
        try:
            read_pickle(b"\x80\x04)NN(" + program + b".", name="random")
            loaded += 1
        except TorchLoadError:
            pass
    assert loaded > 100


def test_every_truncation_is_found() -> None:
    import pickle

    whole = pickle.dumps({"a": [1, 2.5, None, b"x" * 5000], "b": ("text", {1, 2})}, protocol=4)
    for length in range(len(whole)):
        with pytest.raises(CorruptCheckpointError):
            read_pickle(whole[:length], name="truncated")


@pytest.mark.parametrize(
    "code", sorted(set(range(256)) - set(b"(.012FGIJKLMNPQRSTUVXabcdeghijlopqrstu]})B C".replace(b" ", b"")))
)
def test_opcodes_that_need_more_or_do_not_exist_are_refused(code: int) -> None:
    try:
        read_pickle(bytes([code]) + b".", name="opcode")
    except CorruptCheckpointError:
        return
    assert code in (0x88, 0x89, 0x8F)  # True, False, an empty set
