"""Files that a reader who trusts them would never finish, or could not hold.

Bombs of opcodes are in `test_pickle_bounds`. These are sound pickles, archives and headers: what explodes is what comes
after, the search for weights, the matching of names, what an error wants to list. Each is written as it is asked for.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tests.security._handmade import safetensors_bytes, tensor, write
from tests.security._hostile import PROTO, STOP, named, text
from tests.security._payloads import _zip

__all__ = ["BOMBS", "Bomb", "checkpoint", "training"]

Bomb = Callable[[Path], str]
"""Writes itself into a folder; returns what is to be loaded."""

BOMBS: dict[str, Bomb] = {}

# --- trees: two tensors, 'weight' and 'bias' of a small layer, that everything refers to ---

WEIGHT, BIAS, STORAGE, REBUILD, STRIDES, SHAPE = (b"h" + bytes([number]) for number in range(6))
_PUT = [b"q" + bytes([number]) for number in range(6)]
_ARGUMENTS = b"\x89N" + named("collections", "OrderedDict") + b")R\x86"


def _tensor(shape: bytes, strides: bytes) -> bytes:
    return REBUILD + b"(" + STORAGE + b"K\x00" + shape + strides + b"\x89" + _ORDERED + b"tR"


_ORDERED = named("collections", "OrderedDict") + b")R"
_PRELUDE = (
    named("torch._utils", "_rebuild_tensor_v2") + _PUT[3] + b"0"
    + b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x06tQ" + _PUT[2] + b"0"
    + b"K\x03K\x01\x86" + _PUT[4] + b"0" + b"K\x02K\x03\x86" + _PUT[5] + b"0"
    + _tensor(SHAPE, STRIDES) + _PUT[0] + b"0"
    + _tensor(b"K\x02\x85", b"K\x01\x85") + _PUT[1] + b"0"
)  # fmt: skip
FIRST = 16  # memo index that a bomb may use


def checkpoint(body: bytes) -> bytes:
    """A zip checkpoint of what `body` leaves on the stack."""
    return _zip(
        {
            "archive/data.pkl": PROTO + _PRELUDE + body + STOP,
            "archive/byteorder": b"little",
            "archive/data/0": np.arange(6, dtype="f4").tobytes(),
            "archive/version": b"3\n",
        }
    )


def mapping(entries: Iterable[bytes]) -> bytes:
    return b"}(" + b"".join(entries) + b"u"


def fresh_tensor() -> bytes:
    """Another tensor over the same data, of no other identity in the file."""
    return _tensor(SHAPE, STRIDES)


def put(number: int) -> bytes:
    return b"r" + struct.pack("<I", FIRST + number)


def get(number: int) -> bytes:
    return b"j" + struct.pack("<I", FIRST + number)


MODEL = text("weight") + WEIGHT + text("bias") + BIAS
NEW_MODEL = text("weight") + fresh_tensor() + text("bias") + BIAS


def _tree(name: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """A bomb whose body a function makes."""

    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        BOMBS[name] = lambda folder: write(folder / "bomb.pth", checkpoint(make()))
        return make

    return register


@_tree("a million names of one tensor")
def _() -> bytes:
    return mapping(text(f"layer{number}.w") + WEIGHT for number in range(1_000_000))


@_tree("many names of tensors of their own")
def _() -> bytes:
    return mapping(text(f"layer{number}.w") + fresh_tensor() for number in range(150_000))


@_tree("the names of a model a million times, each a part deeper")
def _() -> bytes:
    return mapping(text(f"part{number}.{name}") + WEIGHT for number in range(400_000) for name in ("weight", "bias"))


@_tree("a million entries that are no tensors")
def _() -> bytes:
    return mapping([MODEL, *(text(f"k{number}") + b"K\x01" for number in range(1_000_000))])


@_tree("a hundred thousand containers, each a model")
def _() -> bytes:
    return mapping(text(f"m{number}") + mapping([NEW_MODEL]) for number in range(100_000))


@_tree("a hundred thousand containers of one model's tensors")
def _() -> bytes:
    return mapping(text(f"m{number}") + mapping([MODEL]) for number in range(100_000))


@_tree("a list of a hundred thousand models")
def _() -> bytes:
    return b"](" + b"".join(mapping([MODEL]) for _ in range(100_000)) + b"e"


@_tree("a hundred thousand containers, each nearly a model")
def _() -> bytes:
    return mapping(
        text(f"m{number}") + mapping([text("weight") + BIAS + text("bias") + BIAS]) for number in range(100_000)
    )


@_tree("a chain of containers above many tensors")
def _() -> bytes:
    body = mapping(text(f"t{number}") + WEIGHT for number in range(100_000))
    for _ in range(63):
        body = mapping([text("a") + body])
    return body


@_tree("a long chain of containers, each with a tensor")
def _() -> bytes:
    body = mapping([MODEL])
    for _ in range(900):
        body = mapping([MODEL, text("a") + body])
    return body


@_tree("a container in many places")
def _() -> bytes:
    inner = mapping(text(f"t{number}") + WEIGHT for number in range(1000))
    return inner + put(0) + b"0" + mapping(text(f"c{number}") + get(0) for number in range(5000))


@_tree("containers that double")
def _() -> bytes:
    body = mapping([MODEL])
    for number in range(60):
        body += put(number) + b"0" + mapping([text("a") + get(number), text("b") + get(number)])
    return body


@_tree("containers that hold each other")
def _() -> bytes:
    body = b"".join(b"}" + put(number) + b"0" for number in range(200))
    for number in range(200):
        inner = b"".join(text(f"c{other}") + get(other) for other in range(200))
        body += get(number) + b"(" + MODEL + inner + b"u0"
    return body + get(0)


@_tree("a long key above many tensors")
def _() -> bytes:
    return mapping([text("k" * 1_000_000) + mapping(text(f"t{number}") + WEIGHT for number in range(20_000))])


@_tree("a key just short enough above many tensors")
def _() -> bytes:
    return mapping([text("k" * 4000) + mapping(text(f"t{number}") + WEIGHT for number in range(100_000))])


@_tree("many long names")
def _() -> bytes:
    return mapping(text("k" * 4000 + str(number)) + WEIGHT for number in range(10_000))


@_tree("names of thousands of parts")
def _() -> bytes:
    return mapping(text("a." * 2040 + f"w{number}") + WEIGHT for number in range(1000))


@_tree("names of a hundred parts")
def _() -> bytes:
    return mapping(text("a." * 100 + f"w{number}") + WEIGHT for number in range(40_000))


@_tree("names of nothing but wrappers")
def _() -> bytes:
    wrappers = "module._orig_mod._fsdp_wrapped_module.model.ema_model."
    return mapping(text(wrappers * 75 + f"w{number}") + WEIGHT for number in range(1000))


@_tree("a wrapper a hundred thousand times in one name")
def _() -> bytes:
    return mapping([text("module." * 100_000 + "weight") + WEIGHT, text("module." * 100_000 + "bias") + BIAS])


@_tree("every prefix a model")
def _() -> bytes:
    return mapping(text("a." * depth + name) + WEIGHT for depth in range(1, 2000) for name in ("weight", "bias"))


@_tree("a model below each of many prefixes, wrapped")
def _() -> bytes:
    names = ("weight", "bias")
    return mapping(text(f"p{n}.module.{name}") + WEIGHT for n in range(100_000) for name in names)


@_tree("a model below each of many prefixes")
def _() -> bytes:
    return mapping(text(f"p{n}.{name}") + WEIGHT for n in range(45_000) for name in ("weight", "bias"))


@_tree("keys made to collide, between others")
def _() -> bytes:
    # (x, 0) and (x + p, 0) have one hash; as many with hashes of their own come first.
    p = (1 << 61) - 1
    sound = (b"J" + struct.pack("<i", n) + b"K\x00\x86N" for n in range(32_000))
    same = (b"\x8a\x0a" + (n * p).to_bytes(10, "little") + b"K\x00\x86N" for n in range(32_000))
    return mapping([MODEL, text("args") + mapping([*sound, *same])])


@_tree("names that nearly fit")
def _() -> bytes:
    return mapping(text(f"{'weight'[: n % 7]}{n}") + WEIGHT for n in range(300_000))


@_tree("names beyond the basic plane")
def _() -> bytes:
    return mapping(text("\U0001f4a3" * 1000 + str(n)) + WEIGHT for n in range(5000))


@_tree("names that print as something else")
def _() -> bytes:
    tricks = (
        "weight\0",
        "\u202eweight",
        "wei\u200bght",
        "weight\r\nbias",
        "\x1b[2Jweight",
        "\udcffweight".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
        "ｗeight",
        "weıght",
    )
    return mapping(text(trick) + WEIGHT for trick in tricks)


@_tree("keys of every kind")
def _() -> bytes:
    keys = [
        b"N",
        b"\x88",
        b"K\x01",
        b"G" + struct.pack(">d", float("nan")),
        b"G" + struct.pack(">d", 1.0),
        b")",
        b"K\x01\x85",
        b"C\x03abc",
        b"\x8a\x80" + b"\x7f" * 128,
    ]
    return mapping(key + WEIGHT for key in keys)


@_tree("a frozenset that doubles as a key")
def _() -> bytes:
    # Each level holds the one before as an element and inside a tuple.
    body = b"(K\x01\x91" + put(0) + b"0"
    for number in range(60):
        body += b"(" + get(number) + get(number) + b"\x85\x91" + put(number + 1) + b"0"
    return mapping([MODEL, get(60) + WEIGHT])


@_tree("a tuple of frozensets that double as a key")
def _() -> bytes:
    body = b"(K\x01\x91" + put(0) + b"0"
    for number in range(60):
        body += b"(" + get(number) + get(number) + b"\x85\x91" + put(number + 1) + b"0"
    return body + mapping([MODEL, get(60) + b"K\x01\x86" + mapping([MODEL])])


@_tree("long bytes as a key, over and over")
def _() -> bytes:
    return (
        b"B"
        + struct.pack("<I", 1 << 22)
        + bytes(1 << 22)
        + put(0)
        + b"0"
        + mapping(text(f"m{n}") + mapping([get(0) + WEIGHT]) for n in range(2000))
    )


@_tree("a huge number as a key, over and over")
def _() -> bytes:
    number = b"\x8a\xff" + b"\x7f" * 255 + put(0) + b"0"
    return number + mapping(text(f"m{n}") + mapping([get(0) + WEIGHT]) for n in range(20_000))


@_tree("a number of ten million digits")
def _() -> bytes:
    return mapping([MODEL, text("epoch") + b"\x8b" + struct.pack("<I", 4_000_000) + b"\x7f" * 4_000_000])


@_tree("numbers that are none")
def _() -> bytes:
    nan, infinite = (b"G" + struct.pack(">d", value) for value in (float("nan"), float("inf")))
    return mapping([text("state_dict") + mapping([MODEL]), text("epoch") + nan, text("global_step") + infinite])


@_tree("values that double beside the weights")
def _() -> bytes:
    body = b"]" + put(0) + b"0"
    for number in range(60):
        body += b"](" + get(number) + get(number) + b"e" + put(number + 1) + b"0"
    return body + mapping([text("state_dict") + mapping([MODEL]), text("args") + get(60)])


@_tree("a long text beside the weights, over and over")
def _() -> bytes:
    return (
        text("x" * (1 << 20))
        + put(0)
        + b"0"
        + mapping([text("state_dict") + mapping([MODEL]), *(text(f"note{n}") + get(0) for n in range(50_000))])
    )


@_tree("a huge tensor that is one number")
def _() -> bytes:
    shape, strides = b"\x8a\x05" + (1 << 36).to_bytes(5, "little") + b"K\x03\x86", b"K\x00K\x01\x86"
    return mapping([text("weight") + _tensor(shape, strides), text("bias") + BIAS])


@_tree("many huge tensors that are one number")
def _() -> bytes:
    shape = b"J" + struct.pack("<i", 1 << 30) + b"\x85" + put(0) + b"0"
    return shape + mapping(text(f"t{n}") + _tensor(get(0), b"K\x00\x85") for n in range(1000))


@_tree("overlapping windows of one tensor")
def _() -> bytes:
    shape = b"K\x02" * 60
    strides = b"K\x00" * 60
    return mapping([text("weight") + _tensor(b"(" + shape + b"t", b"(" + strides + b"t"), text("bias") + BIAS])


@_tree("a module within a module, many times over")
def _() -> bytes:
    parameters = text("_parameters") + mapping([MODEL])
    body = named("m", "M") + put(999) + b")R}(" + parameters + text("_modules") + b"}ub" + put(0) + b"0"
    for number in range(40):
        children = text("_modules") + mapping([text("a") + get(number), text("b") + get(number)])
        body += get(999) + b")R}(" + parameters + children + b"ub" + put(number + 1) + b"0"
    return body + get(40)


@_tree("metadata for a million modules")
def _() -> bytes:
    versions = mapping(text(f"m{n}") + b"}" for n in range(300_000))
    return named("collections", "OrderedDict") + b")R(" + MODEL + b"u}(" + text("_metadata") + versions + b"ub"


@_tree("attributes of many objects")
def _() -> bytes:
    return (
        named("argparse", "Namespace")
        + put(0)
        + b"0"
        + mapping([MODEL, *(text(f"args{n}") + get(0) + b")R" + mapping([MODEL]) + b"b" for n in range(60_000))])
    )


# --- training state ---


def training(optimizer: bytes, more: bytes = b"") -> bytes:
    """A training checkpoint with this state of an optimizer."""
    return checkpoint(mapping([text("state_dict") + mapping([MODEL]), text("optimizer") + optimizer, more]))


def _groups(params: bytes, more: bytes = b"") -> bytes:
    return b"](" + mapping([text("params") + params, text("lr") + b"K\x01", more]) + b"e"


def _training(name: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        BOMBS[f"training: {name}"] = lambda folder: write(folder / "bomb.pth", make())
        return make

    return register


@_training("an option that doubles")
def _() -> bytes:
    body = b"]" + put(0) + b"0"
    for number in range(60):
        body += b"](" + get(number) + get(number) + b"e" + put(number + 1) + b"0"
    groups = _groups(b"](K\x00K\x01e", text("betas") + get(60))
    return training(body + mapping([text("state") + b"}", text("param_groups") + groups]))


@_training("an option that holds itself")
def _() -> bytes:
    groups = _groups(b"](K\x00K\x01e", text("betas") + b"]" + put(0) + get(0) + b"a")
    return training(mapping([text("state") + b"}", text("param_groups") + groups]))


@_training("a state of one huge number")
def _() -> bytes:
    shape = b"\x8a\x05" + (1 << 36).to_bytes(5, "little") + b"\x85"
    state = mapping([b"K\x00" + mapping([text("row_norms") + _tensor(shape, b"K\x00\x85")])])
    return training(mapping([text("state") + state, text("param_groups") + _groups(b"](K\x00K\x01e")]))


@_training("a state that is large, over and over")
def _() -> bytes:
    shape = b"J" + struct.pack("<i", 1 << 24) + b"\x85" + put(0) + b"0"
    values = mapping(text(f"v{n}") + _tensor(get(0), b"K\x00\x85") for n in range(50))
    return training(
        shape
        + mapping([text("state") + mapping([b"K\x00" + values]), text("param_groups") + _groups(b"](K\x00K\x01e")])
    )


@_training("a million parameters")
def _() -> bytes:
    params = b"](" + b"".join(b"J" + struct.pack("<i", n) for n in range(1_000_000)) + b"e"
    return training(mapping([text("state") + b"}", text("param_groups") + _groups(params)]))


@_training("a million groups")
def _() -> bytes:
    group = mapping([text("params") + b"]"]) + put(0) + b"0"
    return training(group + mapping([text("state") + b"}", text("param_groups") + b"](" + get(0) * 1_000_000 + b"e"]))


@_training("flat names with values that double")
def _() -> bytes:
    body = b"".join(b"]" + put(at) + b"0" for at in (0, 100))
    for at in (0, 100):
        for number in range(60):
            body += b"](" + get(at + number) + get(at + number) + b"e" + put(at + number + 1) + b"0"
    settings = {"param_groups.weight.lr": get(60), "param_groups.bias.lr": get(160)}
    return training(body + mapping(text(name) + value for name, value in settings.items()))


for _what, _value in {
    "a number": b"K\x05",
    "text": text("params"),
    "nothing": b"N",
    "lists": b"](]]e",
    "a mapping": b"}",
    "a tensor": WEIGHT,
    "an object": named("m", "M") + b")R",
    "nan": b"G" + struct.pack(">d", float("nan")),
}.items():
    for _where in ("params", "groups", "state", "entry", "scheduler", "scaler", "epoch", "ema"):

        def _make(where: str = _where, value: bytes = _value) -> bytes:
            numbers = b"](K\x00K\x01e"
            groups = value if where == "groups" else _groups(value if where == "params" else numbers)
            state = value if where == "state" else mapping([b"K\x00" + value]) if where == "entry" else b"}"
            optimizer = mapping([text("state") + state, text("param_groups") + groups])
            names = {"scheduler": "lr_scheduler", "scaler": "scaler", "epoch": "epoch", "ema": "ema_state_dict"}
            return training(optimizer, text(names[where]) + value if where in names else b"")

        _training(f"{_what} as {_where}")(_make)


# --- random states ---


def _random(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """A checkpoint with random states as pickle writes them; numpy arrays may be among them."""

    def register(make: Callable[[], object]) -> Callable[[], object]:
        def bomb(folder: Path) -> str:
            import torch

            layer = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
            torch.save({"state_dict": layer, "rng_state": make()}, folder / "bomb.pth")
            return str(folder / "bomb.pth")

        BOMBS[f"random state: {name}"] = bomb
        return make

    return register


@_random("a position beyond the words of numpy")
def _() -> object:
    return {"numpy": ("MT19937", np.zeros(624, np.uint32), 1 << 30, 0, 0.0)}


@_random("words that are text")
def _() -> object:
    return {"numpy": ("MT19937", ["9" * 1_000_000] * 624, 0, 0, 0.0), "python": (3, ("9",) * 625, None)}


@_random("huge words")
def _() -> object:
    return {"python": (3, (1 << 100_000,) * 624 + (624,), None), "torch": np.zeros(3)}


@_random("a next number that is none")
def _() -> object:
    return {"python": (3, (0,) * 624 + (624,), "text"), "numpy": ("MT19937", np.zeros(624, np.uint32), 0, 1, "x")}


@_random("a long state")
def _() -> object:
    import torch

    return {
        "torch": torch.zeros(1).to(torch.uint8).expand(1 << 40),
        "cuda": [torch.zeros(1, dtype=torch.uint8)] * 100_000,
    }


@_random("names of numpy as deep lists")
def _() -> object:
    deep: list[object] = []
    for _ in range(300):
        deep = [deep, deep]
    return {"numpy": ("MT19937", deep, 0, 0, 0.0), "python": (3, deep, deep)}


# --- archives ---


def _file(name: str, suffix: str = ".pth") -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        BOMBS[name] = lambda folder: write(folder / f"bomb{suffix}", make())
        return make

    return register


def zip_of_empty(count: int, first: dict[str, bytes]) -> bytes:
    """An archive with `count` empty records (fast: zipfile itself would take minutes)."""
    body, directory = bytearray(), bytearray()
    entries = [*first.items(), *((f"a/data/{n:x}", b"") for n in range(count))]
    for name, content in entries:
        import zlib

        raw, crc = name.encode(), zlib.crc32(content)
        common = struct.pack("<HHHHHLLLHH", 20, 0, 0, 0, 0x21, crc, len(content), len(content), len(raw), 0)
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHLL", 0, 0, 0, 0, len(body)) + raw
        body += b"PK\x03\x04" + common + raw + content
    start = len(body)
    total = len(entries)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, total, total, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(directory), 1)
    many = min(total, 0xFFFF)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, many, many, min(len(directory), 0xFFFFFFFF), start, 0)
    return bytes(body + directory + end64 + locator + end)


@_file("zip: a million records")
def _() -> bytes:
    return zip_of_empty(1_000_000, {"a/data.pkl": b"\x80\x02}.", "a/version": b"3\n"})


@_file("zip: a hundred thousand pickles")
def _() -> bytes:
    return zip_of_empty(0, {f"a{n}/data.pkl": b"\x80\x02}." for n in range(100_000)})


@_file("zip: a hundred thousand checkpoints", ".zip")
def _() -> bytes:
    return zip_of_empty(0, {f"m{n}.pth": b"\x80\x02}." for n in range(100_000)})


@_file("zip: archives within archives", ".zip")
def _() -> bytes:
    inner = checkpoint(mapping([MODEL]))
    for _ in range(40):
        inner = _zip({"policy.pth": inner})
    return inner


@_file("zip: two archives in each, many levels deep", ".zip")
def _() -> bytes:
    inner = checkpoint(mapping([MODEL]))
    for level in range(12):
        inner = _zip({f"a{level}.pth": inner, f"b{level}.pth": inner})
    return inner


@_file("npz: a hundred thousand arrays", ".npz")
def _() -> bytes:
    array = io.BytesIO()
    np.save(array, np.zeros(1, "f4"))
    return zip_of_empty(0, {f"t{n}.npy": array.getvalue() for n in range(100_000)})


def npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + data


for _number, (_name, _header) in enumerate(
    {
        "a long header": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 5_000_000 + b"), }",
        "a deep header": b"{'descr': " + b"(" * 100_000 + b")" * 100_000 + b", 'fortran_order': False, 'shape': (), }",
        "a deep sum": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"-" * 100_000 + b"1,), }",
        "a power": b"{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9**9,), }",
        "digits": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 1_000_000 + b",), }",
        "fields in fields": b"{'descr': "
        + b"[('a', " * 2000
        + b"'<f4'"
        + b")]" * 2000
        + b", 'fortran_order': False, 'shape': (1,), }",
        "a huge shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
        "text in place of an order": b"{'descr': '<f4', 'fortran_order': 'x' * 10**9, 'shape': (1,), }",
    }.items()
):
    _file(f"npy: {_name}", ".npy")(lambda header=_header: npy(header, bytes(64)))
    _file(f"npz: {_name}", ".npz")(lambda header=_header: _zip({"t.npy": npy(header, bytes(64))}))


@_file("tar: a hundred thousand members", ".tar")
def _() -> bytes:
    member = tarfile.TarInfo("x")
    return b"".join(member.tobuf() for _ in range(100_000)) + bytes(1024)


@_file("tar: a long extended header", ".tar")
def _() -> bytes:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 25
    return member.tobuf() + (b"30 path=" + b"y" * 21 + b"\n") * ((1 << 25) // 30 + 1)


def torch_tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@_file("tar: half a million storages, each a pickle", ".tar")
def _() -> bytes:
    declared = (
        PROTO + b"(" + text(str(n)) + text("cpu") + named("torch", "FloatStorage") + b"t." for n in range(500_000)
    )
    storages = pickle.dumps(500_000, 2) + b"".join(one + bytes(8) for one in declared) + pickle.dumps([], 2)
    return torch_tar({"storages": storages, "tensors": pickle.dumps(0, 2), "pickle": PROTO + b"}."})


@_file("tar: a size of its own choosing", ".tar")
def _() -> bytes:
    member = bytearray(tarfile.TarInfo("pickle").tobuf())
    member[124:136] = b"\x80" + b"\xff" * 11
    return bytes(member) + bytes(4096)


# --- text ---


def _header(name: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    return _file(f"safetensors: {name}", ".safetensors")


LONGEST = 100_000_000


@_header("a header of 100 MB of blanks")
def _() -> bytes:
    return safetensors_bytes(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(LONGEST))


@_header("a header of 100 MB of digits")
def _() -> bytes:
    return safetensors_bytes(b'{"a":' + b"9" * (LONGEST - 6) + b"}")


@_header("a header of 100 MB of text")
def _() -> bytes:
    return safetensors_bytes(b'{"__metadata__":{"a":"' + b"x" * (LONGEST - 25) + b'"}}')


@_header("a header of 100 MB of escapes")
def _() -> bytes:
    return safetensors_bytes(b'{"__metadata__":{"a":"' + b"\\u0041" * ((LONGEST - 30) // 6) + b'"}}')


@_header("a header of 100 MB of wide text")
def _() -> bytes:
    return safetensors_bytes(b'{"__metadata__":{"a":"' + b"x" * (LONGEST - 40) + b'\\ud83d\\udca3"}}')


@_header("a header of 100 MB of brackets")
def _() -> bytes:
    return safetensors_bytes(b'{"a":' + b"[" * (LONGEST - 6) + b"}")


@_header("a header of 100 MB of commas")
def _() -> bytes:
    return safetensors_bytes(b'{"a":[' + b"0," * ((LONGEST - 10) // 2) + b"0]}")


@_header("a header of minus signs")
def _() -> bytes:
    return safetensors_bytes(b'{"a":' + b"-" * 10_000_000 + b"1}")


@_header("a long exponent")
def _() -> bytes:
    return safetensors_bytes(b'{"a":{"dtype":"U8","shape":[1e' + b"9" * 10_000_000 + b'],"data_offsets":[0,0]}}')


@_header("many tensors")
def _() -> bytes:
    return safetensors_bytes({f"t{n}": tensor("U8", [0], 0, 0) for n in range(200_000)})


@_header("as many tensors as are read")
def _() -> bytes:
    return safetensors_bytes({f"{n:x}": tensor("U8", [0], 0, 0) for n in range(212_000)})


@_header("tied names in a circle")
def _() -> bytes:
    header = {"__metadata__": {f"t{n}": f"t{(n + 1) % 100_000}" for n in range(100_000)}, "w": tensor("U8", [0], 0, 0)}
    return safetensors_bytes(header)


@_header("a name of thousands of parts, many times")
def _() -> bytes:
    return safetensors_bytes({"a." * 2040 + str(n): tensor("U8", [0], 0, 0) for n in range(1000)})


def _index(name: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        def bomb(folder: Path) -> str:
            weights = safetensors_bytes(
                {"weight": tensor("F32", [2, 3], 0, 24), "bias": tensor("F32", [2], 24, 32)}, bytes(32)
            )
            write(folder / "a.safetensors", weights)
            return write(folder / "model.safetensors.index.json", make())

        BOMBS[f"index: {name}"] = bomb
        return make

    return register


@_index("a million names")
def _() -> bytes:
    return json.dumps({"weight_map": {f"t{n}": "a.safetensors" for n in range(800_000)}}).encode()


@_index("a hundred thousand files")
def _() -> bytes:
    return json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(100_000)}}).encode()


@_index("one file by many names")
def _() -> bytes:
    return json.dumps({"weight_map": {f"t{n}": "./" * n + "a.safetensors" for n in range(2000)}}).encode()


@_index("a long name of a file")
def _() -> bytes:
    return json.dumps({"weight_map": {"t": "a" * 50_000_000}}).encode()


@_index("a size beyond all numbers")
def _() -> bytes:
    return b'{"metadata":{"total_size":1e999},"weight_map":{"weight":"a.safetensors","bias":"a.safetensors"}}'


@_index("deep lists")
def _() -> bytes:
    return b'{"metadata":' + b"[" * 200_000 + b"]" * 200_000 + b',"weight_map":{"weight":"a.safetensors"}}'


# --- distributed ---


def _metadata(name: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        def bomb(folder: Path) -> str:
            write(folder / ".metadata", make())
            write(folder / "__0_0.distcp", bytes(1024))
            return str(folder)

        BOMBS[f"distributed: {name}"] = bomb
        return make

    return register


def _dcp(entries: Iterable[bytes], more: bytes = b"") -> bytes:
    record = named("torch.distributed.checkpoint.metadata", "Metadata") + b")\x81"
    return (
        PROTO
        + record
        + mapping(
            [
                text("state_dict_metadata") + mapping(entries),
                text("planner_data") + b"}",
                text("storage_data") + b"}",
                more,
            ]
        )
        + b"b."
    )


@_metadata("a million names of nothing")
def _() -> bytes:
    return _dcp(text(f"t{n}") + b"N" for n in range(500_000))


@_metadata("names of thousands of parts")
def _() -> bytes:
    record = named("torch.distributed.checkpoint.metadata", "BytesStorageMetadata") + b")\x81" + put(0) + b"0"
    return PROTO + record + _dcp(text("a." * 2000 + str(n)) + get(0) for n in range(3000))[2:]


# --- folders ---


def _folder(name: str) -> Callable[[Bomb], Bomb]:
    def register(make: Bomb) -> Bomb:
        BOMBS[f"folder: {name}"] = make
        return make

    return register


@_folder("thousands of checkpoints")
def _(folder: Path) -> str:
    content = checkpoint(mapping([MODEL]))
    for number in range(3000):
        (folder / f"m{number}.pth").write_bytes(content)
    return str(folder)


@_folder("thousands of ranks")
def _(folder: Path) -> str:
    content = checkpoint(mapping([text("model") + mapping([MODEL])]))
    for number in range(2000):
        write(folder / f"iter_0000001/mp_rank_{number:02}/model_optim_rng.pt", content)
    write(folder / "latest_checkpointed_iteration.txt", "1")
    return str(folder)


@_folder("latest is a number of a million digits")
def _(folder: Path) -> str:
    write(folder / "latest_checkpointed_iteration.txt", "9" * 1_000_000)
    write(folder / "latest", "9" * 1_000_000)
    write(folder / "iter_0000001/mp_rank_00/model_optim_rng.pt", checkpoint(mapping([MODEL])))
    return str(folder)


@_folder("shards that count to a billion")
def _(folder: Path) -> str:
    content = safetensors_bytes({"weight": tensor("F32", [2, 3], 0, 24)}, bytes(24))
    write(folder / "model-00001-of-999999999.safetensors", content)
    write(folder / "model-00002-of-999999999.safetensors", content)
    return str(folder)


@_folder("a folder in itself")
def _(folder: Path) -> str:
    os.symlink(folder, folder / "checkpoint")
    write(folder / "latest", "checkpoint")
    return str(folder)


# --- TorchScript, torch.export ---


@_file("TorchScript: code of a hundred thousand classes", ".pt")
def _() -> bytes:
    content = b"".join(b'class A%d(Module):\n  __parameters__ = ["w", ]\n  w : Tensor\n' % n for n in range(100_000))
    return _zip(
        {
            "m/data.pkl": PROTO + _PRELUDE + mapping([MODEL]) + STOP,
            "m/constants.pkl": b"\x80\x02).",
            "m/code/__torch__.py": content,
            "m/version": b"3\n",
            "m/data/0": bytes(24),
        }
    )


@_file("TorchScript: a long line of code", ".pt")
def _() -> bytes:
    return _zip(
        {
            "m/data.pkl": PROTO + _PRELUDE + mapping([MODEL]) + STOP,
            "m/constants.pkl": b"\x80\x02).",
            "m/code/__torch__.py": b"class A(Module):\n  __parameters__ = [" + b'"w", ' * 4_000_000 + b"]\n",
            "m/version": b"3\n",
            "m/data/0": bytes(24),
        }
    )


@_file("torch.export: a program of deep JSON", ".pt2")
def _() -> bytes:
    return _zip(
        {
            "a/models/model.json": b"[" * 1_000_000,
            "a/archive_format": b"pt2",
            "a/byteorder": b"little",
            "a/data/weights/model_weights_config.json": b"{" + b'"a":{' * 500_000,
            ".data/version": b"1",
        }
    )


@_file("a legacy file with a million storages")
def _() -> bytes:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}]
    storages = b"".join(
        b"(" + text("storage") + b"h\x00" + text(str(n)) + text("cpu") + b"K\x00tQ0" for n in range(200_000)
    )
    body = PROTO + named("torch", "FloatStorage") + b"q\x000" + storages + b"}."
    keys = pickle.dumps([str(n) for n in range(200_000)], 2)
    return b"".join(pickle.dumps(value, 2) for value in head) + body + keys + bytes(8 * 200_000)
