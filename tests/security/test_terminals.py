"""Nothing that a file says reaches a terminal, a log or a warning raw: no colours, no forged lines, no turned text."""

from __future__ import annotations

import json
import logging
import tarfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.security._handmade import safetensors_bytes, tensor, write
from torchload import inspect_checkpoint, read_state_dict, smart_load, smart_resume, smart_save, verify_weights
from torchload.core.text import printable, printable_lines

EVIL = "x\x1b[2K\rm.pth → Linear on cpu: all 2 tensors loaded\n  verified  yes \x1b[8m\u202e\u2066\x9b31m\x00"


def is_clean(text: str) -> bool:
    """One forged line more, or a character that a terminal acts on, and it isn't."""
    return all(line.isprintable() for line in text.split("\n")) and "\n  verified" not in text


def _state(folder: Path) -> str:
    torch.save({**nn.Linear(3, 2).state_dict(), EVIL: torch.zeros(1)}, folder / "m.pth")
    return str(folder / "m.pth")


def _containers(folder: Path) -> str:
    inner = nn.Linear(3, 2).state_dict()
    torch.save({EVIL: inner, EVIL + "2": {name: value + 1 for name, value in inner.items()}}, folder / "m.pth")
    return str(folder / "m.pth")


def _beside(folder: Path) -> str:
    values = {EVIL: 3, "note": EVIL, "list": [EVIL]}
    torch.save({"state_dict": nn.Linear(3, 2).state_dict(), "args": values, **values}, folder / "m.pth")
    return str(folder / "m.pth")


def _safetensors(folder: Path) -> str:
    header = {"__metadata__": {EVIL: EVIL}, EVIL: tensor("F32", [2], 0, 8), "b": tensor(EVIL, [2], 8, 16)}
    return write(folder / "m.safetensors", safetensors_bytes(header, bytes(16)))


def _members(folder: Path) -> str:
    torch.save({"weight": torch.zeros(2, 3)}, folder / "inner.pth")
    whole = (folder / "inner.pth").read_bytes()
    with zipfile.ZipFile(folder / "m.zip", "w") as archive:
        archive.writestr("a.pth", whole)
        archive.writestr(zipfile.ZipInfo(EVIL.replace("\x00", "") + "/b.pth"), whole[:-40])
    return str(folder / "m.zip")


def _no_checkpoint(folder: Path) -> str:
    with zipfile.ZipFile(folder / "m.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(EVIL.replace("\x00", "") + "/x.txt"), b"")
    return str(folder / "m.zip")


def _extra_state(folder: Path) -> str:
    torch.save({**nn.Linear(3, 2).state_dict(), "_extra_state": EVIL}, folder / "m.pth")
    return str(folder / "m.pth")


def _tar(folder: Path) -> str:
    torch.save({"weight": torch.zeros(2, 3)}, folder / "inner.pth")
    (folder / "inner.pth").write_bytes((folder / "inner.pth").read_bytes()[:-40])
    with tarfile.open(folder / "m.tar", "w") as archive:
        archive.add(folder / "inner.pth", EVIL.replace("\x00", "")[:40])
    return str(folder / "m.tar")


def _folder(folder: Path) -> str:
    name = EVIL.replace("\x00", "").replace("/", "")[:60]
    for number in range(2):
        torch.save(nn.Linear(3, 2).state_dict(), folder / f"{name}{number}.pth")
    return str(folder)


def _nothing_in_a_folder(folder: Path) -> str:
    (folder / f"{EVIL[:20]}.json").write_text("{}")
    return str(folder)


def _index(folder: Path) -> str:
    return write(folder / "model.safetensors.index.json", json.dumps({"weight_map": {EVIL: EVIL}}))


def _page(folder: Path) -> str:
    return write(folder / "m.pth", f"<html><title>{EVIL}</title></html>")


def _foreign_names(folder: Path) -> str:
    torch.save({EVIL + name: torch.zeros(3) for name in ("a", "b")}, folder / "m.pth")
    return str(folder / "m.pth")


def _missing_shards(folder: Path) -> list[str]:
    return [str(folder / EVIL.replace("\x00", "")), str(folder / "m.pth")]


def _sparse(folder: Path) -> str:
    torch.save({EVIL: torch.eye(3).to_sparse()[0]}, folder / "m.pth")
    return str(folder / "m.pth")


def _too_large(folder: Path) -> str:
    torch.save({EVIL: torch.full((3,), 1e30)}, folder / "m.pth")
    return str(folder / "m.pth")


def _own_name(folder: Path) -> str:
    return write(folder / EVIL.replace("\x00", ""), bytes(100))


def _near_name(folder: Path) -> str:
    torch.save({}, folder / EVIL.replace("\x00", ""))
    return str(folder / EVIL.replace("\x00", "")[:-1])


MAKERS: dict[str, Callable[[Path], Any]] = {
    make.__name__.strip("_"): make
    for make in (
        *(_state, _containers, _beside, _safetensors, _members, _tar, _folder, _nothing_in_a_folder, _index, _page),
        *(_foreign_names, _own_name, _near_name, _missing_shards, _sparse, _too_large),
        *(_no_checkpoint, _extra_state),
    )
}


def _resume(path: str) -> object:
    model = nn.Linear(3, 2)
    return smart_resume(model, path, torch.optim.SGD(model.parameters(), lr=1.0))


class _Quoting(nn.Linear):
    """Takes nothing, and says what it was given."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        args[-1].append(f"not {', '.join(map(str, state_dict))}")

    def get_extra_state(self) -> Any:
        return None

    def set_extra_state(self, state: Any) -> None:
        raise ValueError(f"not {state}")


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._parameters[EVIL] = nn.Parameter(torch.zeros(3))


ENTRANCES: dict[str, Callable[[str], object]] = {
    "smart_load": lambda path: smart_load(nn.Linear(3, 2), path),
    "smart_load, strict=False": lambda path: smart_load(nn.Linear(3, 2), path, strict=False),
    "inspect_checkpoint": inspect_checkpoint,
    "read_state_dict": read_state_dict,
    "read_state_dict, float16": lambda path: read_state_dict(path, dtype=torch.float16),
    "smart_load, as named": lambda path: smart_load(_Named(), path, dtype=torch.float16),
    "a module that loads itself": lambda path: smart_load(_Quoting(3, 2), path, strict=False),
    "verify_weights, such a module": lambda path: verify_weights(_Quoting(3, 2), path),
    "verify_weights": lambda path: verify_weights(nn.Linear(3, 2), path),
    "smart_resume": _resume,
    "smart_load, prefix": lambda path: smart_load(nn.Linear(3, 2), path, prefix="no.such."),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("kind", MAKERS)
def test_text_from_a_file_is_spelled_out(
    kind: str, entrance: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = MAKERS[kind](tmp_path)
    said: list[str] = []
    with caplog.at_level(logging.DEBUG, "torchload"), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result = ENTRANCES[entrance](path)
            said += [str(result) if not isinstance(result, dict) else "", repr(result)]
        except Exception as error:  # noqa: BLE001 - whatever it is, it is printed
            said += [str(error), repr(error)]
            causes = traceback.format_exception_only(error.__cause__) if error.__cause__ else []
            assert all(line.isprintable() for cause in causes for line in cause.split("\n"))
    said += [record.getMessage() for record in caplog.records]
    said += [str(warning.message) for warning in warned]
    assert "".join(said)
    assert all(map(is_clean, said)), said


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".zip", "/no/such/folder/m.pth"])
def test_what_a_save_refuses_is_spelled_out(suffix: str, tmp_path: Path) -> None:
    name = EVIL.replace("/", "")
    with pytest.raises((ValueError, OSError)) as caught:
        smart_save(nn.Linear(3, 2), str(tmp_path / name.replace("\x00", "")) + suffix, extra={name: object()})
    assert is_clean(str(caught.value))


def test_honest_text_stays_as_it_is() -> None:
    for text in ("layers.0.weight", "größe.重み", "→ 3 × 4 …", "a\\b 'c'"):
        assert printable(text) == text
    assert printable_lines("two\nlines\x07") == "two\nlines\\x07"
    assert printable("\udcff\n\u202e") == "\\udcff\\n\\u202e"
