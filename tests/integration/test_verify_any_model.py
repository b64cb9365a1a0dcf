"""verify_weights says yes to whatever load_state_dict or smart_load have put into a module, and no to anything else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parameter import is_lazy

from tests.integration.test_any_model import HERE, LAZY, MADE, STATEFUL, Doubled, Extra, build
from tests.law import randomise
from tests.versions import register_pre_hook
from torchload import smart_load, verify_weights

Build = Callable[[], nn.Module]
CLASSES: dict[str, Build] = {name: STATEFUL[name] for name in HERE} | MADE
pytestmark = pytest.mark.filterwarnings("ignore")  # the transformer's about nested tensors, old weight_norm's


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What of a model is in its state dict, each object once, under the name that it is saved by first."""
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and id(value) not in seen and value.numel() and not is_lazy(value):
            seen.add(id(value))
            yield name, value


def changed(value: torch.Tensor) -> None:
    """Flip one element so that it is another number whatever its dtype."""
    with torch.no_grad():
        flat = value.detach().reshape(-1)[-1:]
        other = ~flat if value.dtype is torch.bool else flat + 1
        value.detach()[(-1,) * value.dim()] = other.reshape(())


@pytest.mark.parametrize("name", CLASSES)
def test_law_yes_after_a_load_and_no_after_any_change(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained, model, want = (randomise(CLASSES[name](), seed) for seed in (1, 2, 3))
    torch.save({"state_dict": nn.DataParallel(trained).state_dict()}, tmp_path / "x.pth")
    if not trained.state_dict():
        return
    want.load_state_dict(trained.state_dict())
    smart_load(model, tmp_path / "x.pth")
    for loaded in (want, model):
        report = verify_weights(loaded, tmp_path / "x.pth")
        assert report.ok, str(report)
        tensors = sum(isinstance(value, torch.Tensor) for value in trained.state_dict().values())
        assert report.tensors == tensors
    for key, value in list(saved_tensors(model)):
        before = value.detach().clone()
        changed(value)
        report = verify_weights(model, tmp_path / "x.pth")
        assert not report.ok, key
        assert key in [difference.name for difference in report.differing], key
        with torch.no_grad():
            value.detach().copy_(before)
    assert verify_weights(model, tmp_path / "x.pth")


@pytest.mark.parametrize("name", LAZY)
def test_lazy_modules(tmp_path, name):
    lazy, eager = LAZY[name]
    trained, model = randomise(eager(), 1), lazy()
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    report = verify_weights(model, tmp_path / "x.pth")
    assert not report.ok
    assert {difference.reason for difference in report.differing} <= {"the model has no values for it yet", ""}
    smart_load(model, tmp_path / "x.pth")
    assert verify_weights(model, tmp_path / "x.pth").ok
    assert verify_weights(trained, tmp_path / "x.pth").ok


# --- modules that make something else of what they are given ---


class Renamed(nn.Module):
    """Takes the name that an older version had, by a loader of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.kernel = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "old_kernel" in state_dict:
            state_dict[prefix + "kernel"] = state_dict.pop(prefix + "old_kernel").flip(0)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Split(nn.Module):
    """Older files have one matrix where it has three: as attention does whose projections were put apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        register_pre_hook(self, split_by_hook)


def split_by_hook(module, state_dict, prefix, *_):
    if prefix + "qkv.weight" in state_dict:
        parts = state_dict.pop(prefix + "qkv.weight").chunk(3)
        state_dict.update({f"{prefix}{name}.weight": part for name, part in zip("qkv", parts)})


class SplitItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(4)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        split_by_hook(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Upgraded(nn.Module):
    """Before its second version it had no temperature."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("temperature", torch.tensor(0.0))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2:
            state_dict.setdefault(prefix + "temperature", torch.tensor(1.0))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Growing(nn.Module):
    """Takes the file's shape, as observers and vocabularies do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "table" in state_dict:
            self.table = torch.empty_like(state_dict[prefix + "table"])
        super()._load_from_state_dict(state_dict, prefix, *args)


def renamed_state() -> dict[str, torch.Tensor]:
    return {"fc.weight": torch.randn(2, 3), "fc.bias": torch.randn(2), "old_kernel": torch.randn(3)}


def qkv_state() -> dict[str, torch.Tensor]:
    return {"qkv.weight": torch.randn(12, 4), "norm.weight": torch.randn(4), "norm.bias": torch.randn(4)}


UPGRADES: dict[str, tuple[Build, Callable[[], dict[str, torch.Tensor]]]] = {
    "renamed": (Renamed, renamed_state),
    "split by a hook": (Split, qkv_state),
    "split by itself": (SplitItself, qkv_state),
    "upgraded": (Upgraded, lambda: {"weight": torch.randn(3)}),
    "growing": (Growing, lambda: {"table": torch.randn(7)}),
    "doubled": (lambda: Doubled(3, 2), lambda: {"weight": torch.randn(2, 3), "bias": torch.randn(2)}),
}


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "inside"])
@pytest.mark.parametrize("name", UPGRADES)
def test_what_older_versions_saved(tmp_path, name, inside):
    make, state = UPGRADES[name]
    theirs = state()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), make()) if inside else make()

    if inside:
        theirs = {f"1.{key}": value for key, value in theirs.items()}
        theirs.update({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)})
    torch.save(theirs, tmp_path / "old.pth")
    want, ours = model(), randomise(model(), 2)
    want.load_state_dict(copy.copy(theirs))
    assert not verify_weights(ours, tmp_path / "old.pth").ok
    smart_load(ours, tmp_path / "old.pth")
    for loaded in (want, ours):
        report = verify_weights(loaded, tmp_path / "old.pth")
        assert report.ok, str(report)
        for key, value in list(saved_tensors(loaded)):
            before = value.detach().clone()
            changed(value)
            found = verify_weights(loaded, tmp_path / "old.pth")
            assert key in [difference.name for difference in found.differing], key
            with torch.no_grad():
                value.detach().copy_(before)


# --- extra state ---


def test_extra_state_is_compared(tmp_path):
    model = nn.ModuleDict({"a": Extra(), "b": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert verify_weights(model, tmp_path / "x.pth").ok
    model["a"].extra = {"step": 1, "amax": torch.zeros(3)}
    (difference,) = verify_weights(model, tmp_path / "x.pth").differing
    assert difference.name == "a._extra_state"
    model["a"].extra = {"step": 0, "amax": torch.tensor([0.0, 1.0, 0.0])}
    assert not verify_weights(model, tmp_path / "x.pth").ok
    assert verify_weights(model, tmp_path / "x.pth", skip=["a._extra_state"]).ok


class Counting(nn.Module):
    """What it gets is not what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.steps = 0

    def get_extra_state(self) -> Any:
        return [self.steps]

    def set_extra_state(self, state: Any) -> None:
        self.steps = state[0] + 1


def test_extra_state_that_a_module_changes_is_compared_with_what_a_load_gives(tmp_path):
    model = Counting()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth")
    assert model.steps == 1
    assert verify_weights(model, tmp_path / "x.pth").ok
    assert model.steps == 1
    model.steps = 5
    assert not verify_weights(model, tmp_path / "x.pth").ok


@given(names=st.lists(st.sampled_from(sorted(CLASSES)), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_law_models_of_any_parts(tmp_path_factory, names, seed):
    names = [name for name in names if name != "DataParallel"]

    def assemble(seed: int) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [build(name, seed) if name in STATEFUL else randomise(MADE[name](), seed) for name in names]
        return nn.ModuleDict({"parts": nn.ModuleList(parts), "head": randomise(nn.Linear(2, 2), seed)})

    trained, model, want = assemble(seed), assemble(seed + 1), assemble(seed + 2)
    path = tmp_path_factory.mktemp("parts") / "x.pth"
    torch.save(trained.state_dict(), path)
    want.load_state_dict(trained.state_dict())
    smart_load(model, path)
    assert verify_weights(model, path).ok
    assert verify_weights(want, path).ok
