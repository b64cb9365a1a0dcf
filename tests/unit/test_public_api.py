"""The public API is small, and all of it is pinned here: a change to it is a decision."""

from __future__ import annotations

import inspect

import pytest

import torchload
from torchload import errors


def test_exported_names() -> None:
    assert sorted(torchload.__all__) == [
        "CheckpointInfo",
        "ContainerInfo",
        "Difference",
        "LoadReport",
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
        assert value.__module__.partition(".")[0] == "torchload"
