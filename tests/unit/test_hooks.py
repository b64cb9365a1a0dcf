"""Hooks of torch: what they are told, and that what they did can be taken back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.law import assert_equal_bits, randomise, snapshot
from torchload import errors, smart_load, verify_weights
from torchload.core.checkpoint import Container, OpaqueTensor, Record
from torchload.core.undo import Undo
from torchload.plan.plain import plain


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


# --- modules with a loader of their own ---


class Doubled(nn.Linear):
    """Keeps twice what the file holds."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "weight" in state_dict:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *args)


class Remembering(nn.Linear):
    """Saves and loads what is neither a parameter nor a buffer: a list of tensors, and a word."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.memory: list[torch.Tensor] = []
        self.word = ""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "memory"] = list(self.memory)
        destination[prefix + "word"] = self.word

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.memory = state_dict.pop(prefix + "memory")
        self.word = state_dict.pop(prefix + "word")
        super()._load_from_state_dict(state_dict, prefix, *args)


def doubling() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), Doubled(3, 2))


@pytest.fixture
def trained(tmp_path):
    model = randomise(doubling(), 1)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    torch.save({name: value for name, value in model.state_dict().items() if name[0] == "0"}, tmp_path / "part.pth")
    return model


def test_a_module_on_meta_that_loads_itself_gets_memory(tmp_path, trained):
    with torch.device("meta"):
        model = doubling()
    parameters = list(model.parameters())
    report = smart_load(model, tmp_path / "x.pth")
    assert report.tensors == 4
    assert torch.equal(model[1].weight, trained[1].weight * 2)
    assert torch.equal(model[1].bias, trained[1].bias)
    assert all(one is other for one, other in zip(model.parameters(), parameters))


def test_a_module_on_meta_that_refuses_is_on_meta_again(tmp_path):
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args):
            raise ValueError("not today")

    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    model = Refusing(2, 2, device="meta")
    with pytest.raises(errors.IncompatibleCheckpointError, match="not today"):
        smart_load(model, tmp_path / "x.pth")
    assert model.weight.is_meta
    assert model.bias.is_meta


def test_what_such_a_module_does_not_get_must_not_stay_on_meta(tmp_path, trained):
    with torch.device("meta"):
        model = doubling()
    with pytest.raises(errors.IncompatibleCheckpointError, match=r"1\.bias is on the meta device"):
        smart_load(model, tmp_path / "x.pth", skip=["1.bias"])
    assert model[0].weight.is_meta


def test_dtype_reaches_modules_that_load_themselves(tmp_path, trained):
    model = doubling()
    smart_load(model, tmp_path / "x.pth", dtype=torch.float64, keep_fp32=["1.bias"])
    assert torch.equal(model[1].weight, trained[1].weight.double() * 2)
    assert (model[1].weight.dtype, model[1].bias.dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("file", ["x.pth", "part.pth"])
def test_such_a_module_can_be_skipped(tmp_path, trained, file):
    model = randomise(doubling(), 2)
    before = snapshot(model[1])
    report = smart_load(model, tmp_path / file, skip=["1.*"])
    assert report.tensors == 2
    assert_equal_bits(snapshot(model[1]), before)
    assert torch.equal(model[0].weight, trained[0].weight)


def test_such_a_module_may_stay_as_it_is_where_that_is_allowed(tmp_path, trained):
    model = randomise(doubling(), 2)
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match=r"1\.\{weight, bias\}"):
        smart_load(model, tmp_path / "part.pth")
    assert_equal_bits(snapshot(model), before)
    with pytest.warns(UserWarning, match=r"1\.\{weight, bias\}"):
        smart_load(model, tmp_path / "part.pth", strict=False)
    assert torch.equal(model[1].weight, before["1.weight"])
    assert torch.equal(model[0].weight, trained[0].weight)


def test_atomic_says_what_it_does_not_cover(tmp_path, trained):
    report = smart_load(doubling(), tmp_path / "x.pth", atomic=True)
    assert any("Doubled" in note for note in report.notes)


def test_state_that_only_the_module_knows(tmp_path):
    trained, model = Remembering(), nn.ModuleDict({"net": Remembering()})
    trained.memory, trained.word = [torch.arange(3.0), torch.ones(2, 2)], "hello"
    wrapped = nn.DataParallel(nn.ModuleDict({"net": trained}))
    torch.save({"state_dict": wrapped.state_dict(), "word": "top", "memory": [1, 2]}, tmp_path / "x.pth")
    assert not verify_weights(model, tmp_path / "x.pth")
    report = smart_load(model, tmp_path / "x.pth")
    assert (report.tensors, report.total) == (4, 4)
    assert model["net"].word == "hello"
    assert all(torch.equal(one, other) for one, other in zip(model["net"].memory, trained.memory))
    assert verify_weights(model, tmp_path / "x.pth")
    model["net"].memory[1][0, 0] = 7.0
    (difference,) = verify_weights(model, tmp_path / "x.pth").differing
    assert (difference.name, difference.count, difference.largest) == ("net.memory", 1, 6.0)
    model["net"].memory, model["net"].word = [], "bye"
    assert [found.name for found in verify_weights(model, tmp_path / "x.pth").differing] == ["net.memory", "net.word"]


def test_such_state_is_not_a_view_of_the_file(tmp_path):
    trained, model = Remembering(), Remembering()
    trained.memory = [torch.arange(1000.0)]
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"\0" * (tmp_path / "x.pth").stat().st_size)
    assert torch.equal(model.memory[0], torch.arange(1000.0))


def test_attributes_are_taken_back_with_the_rest(tmp_path):
    trained = nn.ModuleDict({"a": Remembering(), "b": Counter()})
    trained["a"].word, trained["b"].count = "new", -1
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model = randomise(nn.ModuleDict({"a": Remembering(), "b": Counter()}), 2)
    model["a"].word, memory = "old", model["a"].memory
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="negative"):
        smart_load(model, tmp_path / "x.pth")
    assert model["a"].word == "old"
    assert model["a"].memory is memory
    assert_equal_bits(snapshot(model), before)


def test_verifying_compares_with_what_a_load_would_give(tmp_path, trained):
    model = doubling()
    smart_load(model, tmp_path / "x.pth")
    before = snapshot(model)
    report = verify_weights(model, tmp_path / "x.pth")
    assert report.ok, str(report)
    assert report.tensors == 4
    assert_equal_bits(snapshot(model), before)
    with torch.no_grad():
        model[1].weight.copy_(trained[1].weight)  # the file's own values are not what a load gives
    (difference,) = verify_weights(model, tmp_path / "x.pth").differing
    assert (difference.name, difference.source, difference.count) == ("1.weight", "1.weight", 6)
    assert verify_weights(model, tmp_path / "x.pth", skip=["1.weight"]).ok
    model.half()
    smart_load(model, tmp_path / "x.pth")
    assert verify_weights(model, tmp_path / "x.pth").ok


def test_verifying_a_module_that_can_not_be_copied_says_so(tmp_path, trained):
    model = doubling()
    smart_load(model, tmp_path / "x.pth")
    model[1].handle = (value for value in ())  # as a socket or a lock can't be copied either
    report = verify_weights(model, tmp_path / "x.pth")
    assert {difference.name for difference in report.differing} == {"1.weight", "1.bias"}
    assert "a copy of it did not" in report.differing[0].reason


def test_checksums_cover_what_such_modules_are_given(tmp_path, trained):
    data = bytearray((tmp_path / "x.pth").read_bytes())
    where = data.index(trained[1].weight.detach().numpy().tobytes())
    data[where] ^= 1
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(errors.CorruptCheckpointError):
        smart_load(doubling(), tmp_path / "x.pth", verify=True)


def test_all_that_refuse_are_named_at_once(tmp_path):
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *arguments):
            self.was_here = True
            raise ValueError("not this one")

    class Picky(nn.Linear):
        version = 1

        def get_extra_state(self):
            return self.version

        def set_extra_state(self, state):
            if state != self.version:
                raise ValueError("another version")

    def build():
        return nn.ModuleDict({"a": Refusing(2, 2), "b": Refusing(2, 2), "c": Picky(2, 2)})

    trained = build()
    trained["c"].version = 2
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model = build()
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_load(model, tmp_path / "x.pth")
    assert len(caught.value.problems) == 3
    assert all(name in str(caught.value) for name in ("'a'", "'b'", "'c._extra_state'"))
    assert isinstance(caught.value.__cause__, ValueError)
    assert not hasattr(model["a"], "was_here")
    assert caught.value.written == ()
    assert_equal_bits(snapshot(model), before)


def test_extra_state_inside_a_module_that_loads_itself_is_set_once(tmp_path):
    class Inner(nn.Linear):
        calls = 0

        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            self.calls += 1

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner(2, 2)

        def _load_from_state_dict(self, *arguments):
            super()._load_from_state_dict(*arguments)

    torch.save(nn.ModuleDict({"x": Outer()}).state_dict(), tmp_path / "x.pth")
    model = nn.ModuleDict({"x": Outer()})
    smart_load(model, tmp_path / "x.pth")
    assert model["x"].inner.calls == 1
