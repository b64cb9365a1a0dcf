"""Whatever a pickle asks for, nothing is called, imported or looked up."""

from __future__ import annotations

import io
import pickle
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.security._hostile import PROTO, STOP, named, text
from torchload.core.checkpoint import Container, Record, TensorEntry
from torchload.errors import CorruptCheckpointError
from torchload.formats.pickles import standins
from torchload.formats.pickles.unpickle import read_pickle

OS = sys.modules["os"].system.__module__  # posix or nt


def _system(command: str) -> list[bytes]:
    """Pickles that run a command in every unpickler that does as it is told: one per way to make a call."""
    argument = text(command)
    run = named("os", "system")
    return [
        run + b"(" + argument + b"tR.",
        PROTO + run + argument + b"\x85R.",
        b"\x80\x04" + text("os") + text("system") + b"\x93" + argument + b"\x85R.",
        b"(" + argument + b"ios\nsystem\n.",
        b"(" + run + argument + b"o.",
        PROTO + named(OS, "system") + argument + b"\x85R.",
        # look the function up by other means
        PROTO + named("builtins", "getattr") + named("os", "path")[:0] + named("builtins", "__import__") + text("os")
        + b"\x85R" + text("system") + b"\x86R" + argument + b"\x85R.",
        PROTO + named("operator", "attrgetter") + text("system") + b"\x85R" + named("importlib", "import_module")
        + text("os") + b"\x85R\x85R" + argument + b"\x85R.",
        PROTO + named("operator", "methodcaller") + text("system") + argument + b"\x86R"
        + named("importlib", "import_module") + text("os") + b"\x85R\x85R.",
        PROTO + named("functools", "partial") + run + argument + b"\x86R)R.",
        PROTO + named("functools", "reduce") + run + b"]" + argument + b"a\x86R.",
        PROTO + named("builtins", "map") + run + b"]" + argument + b"a\x86R" + named("builtins", "list")[:0] + b".",
        # text that is code
        PROTO + named("builtins", "eval") + text(f"__import__('os').system({command!r})") + b"\x85R.",
        PROTO + named("builtins", "exec") + text(f"import os; os.system({command!r})") + b"\x85R.",
        PROTO + named("__builtin__", "eval") + text(f"__import__('os').system({command!r})") + b"\x85R.",
        PROTO + named("torch.jit.unsupported_tensor_ops", "execWrapper")
        + text(f"import os; os.system({command!r})") + b"}}\x87R.",
        PROTO + named("code", "InteractiveInterpreter") + b")R" + named("builtins", "getattr") + b"2" + b"0.",
        # classes that act when they are made, by each opcode that makes one
        PROTO + named("subprocess", "Popen") + b"]" + text("sh") + b"a" + text("-c") + b"a" + argument + b"a\x85\x81.",
        b"\x80\x04" + named("subprocess", "Popen") + b")}" + text("args") + argument + b"s" + text("shell") + b"\x88s"
        b"\x92.",
        PROTO + named("subprocess", "check_output") + argument + b"\x85R.",
        PROTO + named("copyreg", "_reconstructor") + named("subprocess", "Popen") + run + argument + b"\x87R.",
        PROTO + named("copyreg", "__newobj__") + named("subprocess", "Popen") + argument + b"\x86R.",
        # the state of an object
        PROTO + named("subprocess", "Popen") + b")\x81}" + text("__setstate__") + run + b"sb" + argument + b"b.",
        PROTO + named("collections", "OrderedDict") + b")R}" + text("__setitem__") + run + b"sb"
        + argument + argument + b"s.",
        PROTO + named("collections", "defaultdict") + run + b"\x85R" + argument + argument + b"s.",
        # streams within streams
        PROTO + named("pickle", "loads") + b"U" + bytes([len(command) + 17])
        + b"cos\nsystem\n(S'" + command.encode() + b"'\ntR." + b"\x85R.",
        PROTO + named("torch.storage", "_load_from_bytes") + b"U" + bytes([len(command) + 17])
        + b"cos\nsystem\n(S'" + command.encode() + b"'\ntR." + b"\x85R.",
        PROTO + named("torch", "load") + argument + b"\x85R.",
        PROTO + named("torch.hub", "load_state_dict_from_url") + argument + b"\x85R.",
        # through the functions that torch itself allows
        PROTO + named("torch._tensor", "_rebuild_from_type_v2") + run + named("torch", "Tensor") + argument
        + b"\x85N(" + b"t"[:0] + b"0" + b"\x87R.",
        PROTO + named("torch._utils", "_rebuild_parameter") + run + argument + b"\x85R\x88N\x87R.",
        PROTO + b"(" + text("storage") + run + text("0") + text("cpu") + b"K\x01tQ.",
        PROTO + b"(" + text("module") + run + argument + argument + b"tQ" + argument + b"\x85R.",
        PROTO + named("_codecs", "encode") + argument + text("rot13") + b"\x86R.",
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(_system(""))))
def test_no_call_is_made(number: int, tmp_path: Path) -> None:
    marker = tmp_path / "called"
    stream = _system(f"touch {marker}")[number]
    with suppress(CorruptCheckpointError):
        read_pickle(stream, name="hostile")
    assert not marker.exists()


def test_the_streams_above_do_call_when_read_by_pickle(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    working = 0
    for number in range(len(_system(""))):
        marker = tmp_path / f"called{number}"
        stream = _system(f"touch {marker}")[number]
        if b"torch" in stream:
            continue
        with suppress(Exception):
            pickle.loads(stream)
        working += marker.exists()
    assert working >= 12


def test_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = read_pickle(PROTO + named("hostile_module", "Thing") + b")R.", name="hostile")
    assert type(tree) is Record
    assert tree.name == "hostile_module.Thing"
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_the_extension_registry_is_refused(code: bytes) -> None:
    import copyreg

    copyreg.add_extension("os", "system", 1)
    try:
        with pytest.raises(CorruptCheckpointError, match="extension registry"):
            read_pickle(b"\x80\x02" + code + b".", name="hostile")
    finally:
        copyreg.remove_extension("os", "system", 1)


def test_even_a_stream_that_was_not_checked_cannot_use_the_registry_without_leaving_the_reader() -> None:
    # What the scan lets through has no extension opcode, wherever it hides: also after a replaced opcode.
    for before in (b"}0", b"\x8f0", b"\x95\x02\x00\x00\x00\x00\x00\x00\x00"):
        with pytest.raises(CorruptCheckpointError):
            read_pickle(b"\x80\x04" + before + b"\x82\x01.", name="hostile")


STORAGE = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01tQ"
CLASSES = [
    named("os", "system"),
    named("collections", "OrderedDict"),
    named("torch._utils", "_rebuild_tensor_v2"),
    named("torch", "FloatStorage"),
    named("torch", "Size"),
    named("builtins", "getattr"),
    named("torch", "float32"),
]


@pytest.mark.parametrize("target", CLASSES)
@pytest.mark.parametrize(
    "state",
    [
        b"N}" + text("convert") + b"K\x01s\x86",
        b"}" + text("__new__") + b"K\x01s",
        b"N}" + text("__setstate__") + b"K\x01s\x86",
        b"N}" + text("__class__") + named("os", "system") + b"s\x86",
        b"N}" + text("qualified") + text("os.path") + b"s\x86",
    ],
)
def test_the_stand_ins_themselves_cannot_be_changed(target: bytes, state: bytes) -> None:
    before = {name: dict(vars(thing)) for name, thing in vars(standins).items() if isinstance(thing, type)}
    with pytest.raises(CorruptCheckpointError):
        read_pickle(PROTO + target + state + b"b.", name="hostile")
    after = {name: dict(vars(thing)) for name, thing in vars(standins).items() if isinstance(thing, type)}
    assert before == after


@pytest.mark.parametrize(
    "change",
    [
        b"}" + text("numel") + b"K\x7fsb",
        b"N}" + text("numel") + b"K\x7fs\x86b",
        b"(" + text("numel") + b"K\x7f" + b"lb",
        text("numel") + b"K\x7fs",
        b"(K\x01K\x02e",
    ],
)
def test_a_storage_cannot_be_changed(change: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        read_pickle(PROTO + STORAGE + change + b".", name="hostile")


def test_what_a_format_supplies_cannot_be_changed() -> None:
    from torchload.formats.pickles.unpickle import unpickle

    entry = TensorEntry(torch.float32, (0,), ())
    changes = (b"(K\x01K\x02K\x03K\x04lb", b"}" + text("shape") + b"K\x07sb", b"N}" + text("shape") + b"K\x07s\x86b")
    for change in (*changes, b"K\x00K\x01s", b"K\x01a"):
        with pytest.raises(CorruptCheckpointError):
            unpickle(PROTO + text("id") + b"Q" + change + b".", name="hostile", outside=lambda pid: entry).finish()
    assert unpickle(PROTO + text("id") + b"Q.", name="format", outside=lambda pid: entry).finish() is entry
    assert entry.shape == (0,)


def test_a_payload_left_in_the_file_cannot_be_moved() -> None:
    payload = b"B" + (5000).to_bytes(4, "little") + b"x" * 5000
    for change in (b"}" + text("index") + b"K\x07sb", b"N}" + text("index") + b"K\x07s\x86b", b"(K\x00K\x07lb"):
        with pytest.raises(CorruptCheckpointError):
            read_pickle(b"\x80\x03" + payload + change + b".", name="hostile")


@pytest.mark.parametrize("pid", [b"K\x00", b"K\x07", b"J\xff\xff\xff\xff", text("0"), b"]", b")", b"K\x01\x85"])
def test_persistent_ids_that_are_no_storages_are_refused(pid: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        read_pickle(PROTO + pid + b"Q.", name="hostile")
    with pytest.raises(CorruptCheckpointError):
        read_pickle(b"P0\n.", name="hostile")


def test_what_the_reader_itself_writes_is_only_data_to_it() -> None:
    # The replacements of `opcodes`, spelled by the file.
    assert read_pickle(PROTO + b"NQ.", name="hostile") == {}
    assert read_pickle(PROTO + b"\x89Q.", name="hostile") == set()
    assert read_pickle(PROTO + b"(K\x01K\x02t\x88\x86Q.", name="hostile") == {1: 2}
    assert read_pickle(PROTO + b"(K\x01K\x02t\x89\x86Q.", name="hostile") == frozenset((1, 2))


def test_weights_come_out_beside_an_attack(tmp_path: Path) -> None:
    import zipfile

    from torchload.core.source import MemorySource
    from torchload.formats.files import archives

    marker = tmp_path / "called"
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2, 3)}, buffer)
    original = zipfile.ZipFile(buffer)
    repacked = io.BytesIO()
    with zipfile.ZipFile(repacked, "w") as archive:
        for name in original.namelist():
            data = original.read(name)
            if name.endswith("data.pkl"):
                data = data[:-1] + text("attack") + named("os", "system") + text(f"touch {marker}") + b"\x85Rs."
            archive.writestr(name, data)
    root = archives.open(MemorySource(repacked.getvalue()), "attacked.pth").root
    assert type(root) is Container
    assert type(root["weight"]) is TensorEntry
    assert root["attack"].name == "os.system"
    assert not marker.exists()


def test_control_stop_is_needed() -> None:
    with pytest.raises(CorruptCheckpointError, match="incomplete"):
        read_pickle(PROTO + STOP[:0] + b"N", name="hostile")
