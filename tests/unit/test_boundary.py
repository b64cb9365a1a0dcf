"""What an error hears on its way out: which checkpoint, and what became of the model; once, and true."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchload import errors, inspect_checkpoint, read_state_dict, smart_load, smart_resume, verify_weights

UNCHANGED = "Nothing was loaded; the model is unchanged."


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def failed(call: Callable[[], object]) -> errors.TorchLoadError:
    with pytest.raises(errors.TorchLoadError) as caught:
        call()
    return caught.value


def test_what_is_refused_names_the_file_and_the_model_in_its_first_line(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", nn.Linear(3, 2).state_dict())
    error = failed(lambda: smart_load(nn.Linear(4, 2), path))
    assert str(error).splitlines()[0] == f"{path} does not fit this Linear. {UNCHANGED}"
    assert error.path == str(path)
    assert error.args == (str(error),)


def test_an_error_that_speaks_of_something_else_names_the_file_first(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"weight": torch.ones(1), "bias": torch.full((1,), 1e30)})
    model = nn.BatchNorm1d(1, track_running_stats=False).half()
    error = failed(lambda: smart_load(model, path, atomic=True))
    assert str(error).startswith(f"{path}: bias does not fit float16")
    assert str(error).endswith(UNCHANGED)


def test_a_damaged_file_is_named_once(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", nn.Linear(3, 2).state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    error = failed(lambda: smart_load(nn.Linear(3, 2), path))
    assert str(error).count(str(path)) == 1
    assert str(error).count(UNCHANGED) == 1


def test_what_was_written_is_said(tmp_path: Path) -> None:
    values = {f"{index}.weight": torch.full((2, 2), 2.0) for index in range(40)}
    path = saved(tmp_path / "x.pth", {**values, "39.weight": torch.full((2, 2), 1e30)})
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(40))).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    error = failed(lambda: smart_load(model, path))
    changed = {name for name, tensor in model.named_parameters() if not bool((tensor == 1).all())}
    assert changed <= set(error.written)
    assert ("The model has changed" in str(error)) == bool(error.written)
    assert (UNCHANGED in str(error)) != bool(error.written)


class _Stubborn(nn.Linear):
    """Takes its extra state, refuses it, and does not take the old one back either."""

    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        raise ValueError(f"never {state}")


class _Saved(nn.Linear):
    def get_extra_state(self) -> int:
        return 2


def test_where_taking_back_fails_the_model_is_not_called_unchanged(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", _Saved(3, 2).state_dict())
    error = failed(lambda: smart_load(_Stubborn(3, 2), path, atomic=True))
    assert "never 2" in str(error)
    assert error.written == ("_extra_state",)
    assert UNCHANGED not in str(error)
    assert "The model has changed: a tensor of it was written to (_extra_state)" in str(error)


class _LoadsAnother(nn.Linear):
    """Loads a file of its own when it is loaded."""

    other: Path

    def _load_from_state_dict(self, *args: Any) -> None:
        smart_load(nn.Linear(9, 9), self.other)


def test_an_error_that_leaves_two_loads_is_told_once(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", nn.Linear(3, 2).state_dict())
    model = _LoadsAnother(3, 2)
    model.other = saved(tmp_path / "other.pth", nn.Linear(5, 5).state_dict())
    error = failed(lambda: smart_load(model, path))
    assert str(error).count(UNCHANGED) == 1
    assert "other.pth" in str(error)


def test_calls_that_change_nothing_say_nothing_of_a_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"epoch": 3})
    for call in (
        lambda: read_state_dict(path),
        lambda: verify_weights(nn.Linear(3, 2), path),
        lambda: inspect_checkpoint(tmp_path / "absent.pth"),
    ):
        error = failed(call)
        assert str(error).startswith(str(tmp_path))
        assert "unchanged" not in str(error)


def test_resuming_speaks_of_everything(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    path = saved(tmp_path / "x.pth", {"model": model.state_dict()})
    error = failed(lambda: smart_resume(model, path, torch.optim.SGD(model.parameters())))
    first = f"{path} can't be resumed from. Nothing was restored; everything is as it was."
    assert str(error).splitlines()[0] == first


def test_errors_that_have_left_pickle(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", nn.Linear(3, 2).state_dict())
    error = failed(lambda: smart_load(nn.Linear(4, 2), path))
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_warnings_name_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"weight": torch.ones(2, 3), "bias": torch.ones(4)})
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2))
    values = {"0.weight": torch.ones(2, 3), "1.weight": torch.ones(2, 4)}
    path = saved(tmp_path / "y.pth", values)
    with pytest.warns(errors.CheckpointWarning, match=r"y\.pth: loaded in part \(strict=False\)") as caught:
        smart_load(model, path, strict=False)
    assert caught[0].filename == __file__
