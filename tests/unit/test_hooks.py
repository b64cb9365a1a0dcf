"""Hooks of torch: what they are told, and that what they did can be taken back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.law import assert_equal_bits, randomise, snapshot
from torchload import errors, smart_load
from torchload.hooks import Undo, plain
from torchload.index import Container, OpaqueTensor, Record


def test_undo_goes_backwards_and_only_once() -> None:
    seen: list[int] = []
    undo = Undo([lambda: seen.append(1), lambda: seen.append(2)])
    undo.roll_back()
    undo.roll_back()
    assert seen == [2, 1]


def test_plain_keeps_collections_and_refuses_what_would_run_code() -> None:
    value = plain(Container({"a": [1, (2.5, "x")], 3: None}), lambda entry: torch.zeros(1))
    assert value == {"a": [1, (2.5, "x")], 3: None}
    assert type(value) is dict
    for leaf in (Record("os.system"), OpaqueTensor("a sparse COO tensor")):
        with pytest.raises(ValueError, match="does not build"):
            plain([leaf], lambda entry: torch.zeros(1))


class Guarded(nn.Module):
    """Refuses through the channel that torch gives a pre-hook."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self._register_load_state_dict_pre_hook(self.check)

    def check(self, state, prefix, metadata, strict, missing, unexpected, complaints):
        complaints.append("too old")


def test_a_pre_hook_may_refuse(tmp_path) -> None:
    torch.save(Guarded().state_dict(), tmp_path / "x.pth")
    model = randomise(Guarded(), 2)
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="too old"):
        smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(model), before)


class Counter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        if state["count"] < 0:
            raise ValueError("negative")
        self.count = state["count"]


def test_extra_state_that_a_module_refuses_takes_back_what_was_set(tmp_path) -> None:
    trained = nn.ModuleDict({"a": Counter(), "b": Counter()})
    trained["a"].count, trained["b"].count = 5, -1
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model = randomise(nn.ModuleDict({"a": Counter(), "b": Counter()}), 2)
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="negative"):
        smart_load(model, tmp_path / "x.pth")
    assert model["a"].count == 0
    assert_equal_bits(snapshot(model), before)
    smart_load(model, tmp_path / "x.pth", skip=["b._extra_state"])
    assert (model["a"].count, model["b"].count) == (5, 0)


def test_a_pre_hook_may_drop_what_the_model_no_longer_has(tmp_path) -> None:
    class Newer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self._register_load_state_dict_pre_hook(lambda state, prefix, *_: state.pop(prefix + "fc.mask", None))

    trained = randomise(nn.ModuleDict({"fc": nn.Linear(2, 2)}), 1)
    torch.save({**trained.state_dict(), "fc.mask": torch.zeros(2)}, tmp_path / "x.pth")
    model = Newer()
    smart_load(model, tmp_path / "x.pth")
    assert torch.equal(model.fc.weight, trained["fc"].weight)


def test_post_hooks_hear_what_a_partial_load_left(tmp_path) -> None:
    heard = []
    model = nn.Linear(2, 2)
    model.register_load_state_dict_post_hook(lambda module, keys: heard.append(keys.missing_keys))
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="bias"):
        smart_load(model, tmp_path / "x.pth", strict=False)
    assert heard == [["bias"]]
