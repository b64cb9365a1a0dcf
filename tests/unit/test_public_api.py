"""The public API is small, and all of it is pinned here: a change to it is a decision."""

from __future__ import annotations

import argparse
import inspect
import pickle
import typing
from pathlib import Path

import pytest
import torch

import torchload
from torchload import errors


def test_exported_names() -> None:
    assert sorted(torchload.__all__) == [
        "CheckpointInfo",
        "ContainerInfo",
        "Difference",
        "LoadReport",
        "Record",
        "ResumeReport",
        "SaveReport",
        "TensorInfo",
        "VerifyReport",
        "__version__",
        "best_device",
        "errors",
        "inspect_checkpoint",
        "read_state_dict",
        "smart_load",
        "smart_resume",
        "smart_save",
        "verify_weights",
    ]
    for name in torchload.__all__:
        assert hasattr(torchload, name)


def test_nothing_else_is_public() -> None:
    # Submodules show up as attributes once something imports them; they are private by documentation.
    others = {
        name
        for name, value in vars(torchload).items()
        if not name.startswith("_") and name not in torchload.__all__ and not inspect.ismodule(value)
    }
    assert others <= {"annotations"}


def test_signature_of_smart_load() -> None:
    parameters = inspect.signature(torchload.smart_load).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert positional == ["model", "path", "device"]
    assert keywords == {
        "dtype": None,
        "keep_fp32": (),
        "strict": True,
        "key": None,
        "prefix": None,
        "rename": None,
        "skip": (),
        "verify": False,
        "atomic": False,
        "mmap": False,
        "process_group": None,
        "progress": False,
    }


@pytest.mark.parametrize(
    ("name", "positional", "keywords"),
    [
        ("inspect_checkpoint", ["path"], {}),
        ("read_state_dict", ["path", "device"], {"dtype": None, "key": None, "mmap": False}),
        (
            "smart_save",
            ["model", "path"],
            {
                "dtype": None,
                "keep_fp32": (),
                **dict.fromkeys(("optimizer", "scheduler", "scaler", "ema", "extra", "metadata")),
                "distributed": True,
            },
        ),
        ("verify_weights", ["model", "path"], {"key": None, "prefix": None, "rename": None, "skip": ()}),
    ],
)
def test_signatures_of_the_companions(name: str, positional: list[str], keywords: dict[str, object]) -> None:
    parameters = inspect.signature(getattr(torchload, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == keywords


@pytest.mark.parametrize("name", torchload.__all__)
def test_public_things_are_documented(name: str) -> None:
    value = getattr(torchload, name)
    if callable(value):
        assert inspect.getdoc(value)


@pytest.mark.parametrize("name", sorted({*errors.__all__} - {"CheckpointWarning"}))
def test_errors_have_one_base(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.TorchLoadError)
    assert inspect.getdoc(error)


@pytest.mark.parametrize("name", torchload.__all__)
def test_public_things_say_where_they_are_from(name: str) -> None:
    value = getattr(torchload, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == "torchload"


@pytest.mark.parametrize("name", [name for name in torchload.__all__ if name not in {"__version__", "errors"}])
def test_public_things_can_be_looked_into(name: str) -> None:
    value = getattr(torchload, name)
    assert pickle.loads(pickle.dumps(value)) is value
    assert inspect.getmodule(value) is torchload
    assert inspect.signature(value)
    hints = typing.get_type_hints(value)
    assert "return" in hints if inspect.isfunction(value) else set(hints) == set(value.__annotations__)
    for member in vars(value).values() if inspect.isclass(value) else ():
        if inspect.isfunction(member):
            typing.get_type_hints(member)


def test_a_path_is_what_can_be_a_checkpoint() -> None:
    for name in ("smart_load", "verify_weights", "read_state_dict", "inspect_checkpoint", "smart_resume"):
        hint = typing.get_type_hints(getattr(torchload, name))["path"]
        assert hint is not typing.Any
        assert {str, typing.BinaryIO} <= set(typing.get_args(hint))


def test_objects_of_a_file_are_of_a_public_class(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2), "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    value = torchload.inspect_checkpoint(tmp_path / "x.pth").values["args"]
    assert isinstance(value, torchload.Record)
    assert (value.name, value.state) == ("argparse.Namespace", {"lr": 1})
    report = torchload.smart_load(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).state_dict())
    assert type(report) is torchload.LoadReport
    assert type(pickle.loads(pickle.dumps(report))) is torchload.LoadReport
