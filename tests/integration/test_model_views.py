"""Tensors of a model that lie in the memory of others: filled with them, as `safetensors.torch.load_model` has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from tests.law import assert_equal_bits, randomise, snapshot
from torchload import errors, smart_load, smart_resume, smart_save, verify_weights


class Pair(nn.Module):
    """One parameter, and another one that is a view of it."""

    def __init__(self, view: Callable[[torch.Tensor], torch.Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.enc = nn.Parameter(torch.randn(4, 6, device=device))
        self.fc = nn.Linear(2, 2, device=device)
        self.dec = nn.Parameter(view(self.enc.detach()))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reshaped": lambda whole: whole.view(3, 8),
    "sliced": lambda whole: whole[1:3],
    "one row": lambda whole: whole[2],
    "flat": lambda whole: whole.view(-1),
}
STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda whole: whole.t(),
    "columns": lambda whole: whole[:, 1:5:2],
    "a block, transposed": lambda whole: whole[1:, 2:].t(),
    "expanded": lambda whole: whole[1].expand(3, 6),
}
OPTIONS = [{}, {"atomic": True}, {"dtype": torch.float16}, {"mmap": True}, {"verify": True}, {"strict": False}]


def shares(model: Pair) -> bool:
    return model.enc.untyped_storage().data_ptr() == model.dec.untyped_storage().data_ptr()


def check(model: Pair, trained: Pair, path: Path, **options: Any) -> None:
    enc, dec = model.enc, model.dec
    report = smart_load(model, path, **options)
    assert (report.tensors, report.total) == (4, 4)
    assert (model.enc is enc, model.dec is dec, shares(model)) == (True, True, True)
    assert_equal_bits(snapshot(model), {name: tensor.to(enc.dtype) for name, tensor in snapshot(trained).items()})
    assert verify_weights(model, path).ok
    with torch.no_grad():
        model.enc.zero_()
    assert not model.dec.any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views_that_save_model_left_out(tmp_path: Path, view: str, options: dict[str, Any]) -> None:
    path = tmp_path / "x.safetensors"
    trained, peer = Pair(VIEWS[view]), Pair(VIEWS[view])
    save_model(trained, str(path))
    assert load_model(peer, str(path)) == (set(), [])
    assert_equal_bits(snapshot(peer), snapshot(trained))
    check(Pair(VIEWS[view]), trained, path, **options)
    wrapped = nn.DataParallel(Pair(VIEWS[view]))
    smart_load(wrapped, path)
    assert_equal_bits(snapshot(wrapped.module), snapshot(trained))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("view", STRIDED)
def test_views_with_other_strides(tmp_path: Path, view: str, options: dict[str, Any]) -> None:
    path = tmp_path / "x.safetensors"
    trained = Pair(STRIDED[view])
    save_file({name: tensor for name, tensor in trained.state_dict().items() if name != "dec"}, path)
    check(Pair(STRIDED[view]), trained, path, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_file_that_has_the_view_of_all(tmp_path: Path, options: dict[str, Any]) -> None:
    """The transposed one, laid out anew: its elements lie in another order than in the model."""
    path = tmp_path / "x.safetensors"
    trained = Pair(STRIDED["transposed"])
    state = {name: tensor.contiguous() for name, tensor in trained.state_dict().items() if name != "enc"}
    save_file(state, path)
    check(Pair(STRIDED["transposed"]), trained, path, **options)


@pytest.mark.parametrize("view", [*VIEWS, "transposed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_with_both_leave_the_view_one(tmp_path: Path, view: str, options: dict[str, Any]) -> None:
    make = {**VIEWS, **STRIDED}[view]
    trained = Pair(make)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    check(Pair(make), trained, tmp_path / "x.pth", **options)
    save_file({name: tensor.clone().contiguous() for name, tensor in trained.state_dict().items()}, tmp_path / "y.st")
    check(Pair(make), trained, tmp_path / "y.st", **options)


@pytest.mark.parametrize("atomic", [False, True])
def test_a_file_with_two_values_for_one_piece_of_memory_is_refused(tmp_path: Path, atomic: bool) -> None:
    model = Pair(VIEWS["sliced"])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["dec"] += 1
    torch.save(state, tmp_path / "x.pth")
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="enc and dec differ in the file, but the model ties"):
        smart_load(model, tmp_path / "x.pth", atomic=atomic)
    assert_equal_bits(snapshot(model), before)


def test_a_part_does_not_fill_the_whole(tmp_path: Path) -> None:
    model = Pair(VIEWS["sliced"])
    save_file({name: t.clone() for name, t in model.state_dict().items() if name != "enc"}, tmp_path / "x.safetensors")
    assert load_model(model, str(tmp_path / "x.safetensors"), strict=False)[0] == {"enc"}
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_load(model, tmp_path / "x.safetensors")
    assert caught.value.missing_keys == ["enc"]


@pytest.mark.parametrize("view", ["reshaped", "sliced"])
@pytest.mark.parametrize("strict", [False, True])
def test_what_only_shared_memory_tells_is_refused_on_meta(tmp_path: Path, view: str, strict: bool) -> None:
    path = tmp_path / "x.safetensors"
    trained = Pair(VIEWS[view])
    save_model(trained, str(path))
    with pytest.raises(errors.IncompatibleCheckpointError, match="build the model on a real device") as caught:
        smart_load(Pair(VIEWS[view], "meta"), path, strict=strict)
    assert not {"skip=", "include_buffers"} & set(str(caught.value).split())
    model = Pair(VIEWS[view], "cpu")  # the advice
    smart_load(model, path, strict=strict)
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_what_only_shared_memory_tells_is_refused_where_the_model_shares_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    trained, model = Pair(VIEWS["sliced"]), Pair(VIEWS["sliced"])
    save_model(trained, str(path))
    model.dec = nn.Parameter(model.dec.detach().clone())
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="make it a view of that in the model") as caught:
        smart_load(model, path)
    assert "skip=" not in str(caught.value)
    assert_equal_bits(snapshot(model), before)
    torch.save(trained.state_dict(), tmp_path / "x.pth")  # the advice
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_many_views_of_one_flat_tensor(tmp_path: Path) -> None:
    def flat() -> nn.Module:
        model = nn.Module()
        model.flat = nn.Parameter(torch.zeros(600))
        model.parts = nn.ParameterList(model.flat.detach()[start : start + 6].view(2, 3) for start in range(0, 600, 6))
        return model

    trained = randomise(flat(), 1)
    save_file({"flat": trained.flat.detach()}, tmp_path / "x.safetensors")
    for options in OPTIONS[:2]:
        model = flat()
        smart_load(model, tmp_path / "x.safetensors", **options)
        assert torch.equal(model.flat, trained.flat)
        assert_equal_bits(snapshot(model), snapshot(trained))


class Lazy(nn.Module):
    """A parameter, a buffer that shows it conjugated, and one that is negated, both lazily."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))
        self.register_buffer("conjugate", self.plain.detach().conj())
        self.register_buffer("negative", torch._neg_view(torch.randn(3)))


@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[3:], ids=str)
def test_lazily_conjugated_and_negated_views_hold_values_of_their_own(tmp_path: Path, options: dict[str, Any]) -> None:
    trained, model = Lazy(), Lazy()
    values = {name: tensor.resolve_conj().resolve_neg().clone() for name, tensor in trained.state_dict().items()}
    torch.save(values, tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth", **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name]), name
    assert verify_weights(model, tmp_path / "x.pth").ok
    assert not verify_weights(Lazy(), tmp_path / "x.pth").ok


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_lazily_conjugated_view_is_saved_as_what_it_shows(tmp_path: Path, name: str) -> None:
    model = Lazy()
    smart_save(model, tmp_path / name)
    saved = (
        load_file(tmp_path / name) if name.endswith("safetensors") else torch.load(tmp_path / name, weights_only=True)
    )
    for key, tensor in model.state_dict().items():
        assert torch.equal(saved[key], tensor), key


@pytest.mark.parametrize("options", [*OPTIONS, {"dtype": torch.float16, "keep_fp32": ["enc"]}], ids=str)
@pytest.mark.parametrize("view", [*VIEWS, *STRIDED])
def test_a_non_persistent_buffer_goes_on_to_show_what_it_is_a_view_of(
    tmp_path: Path, view: str, options: dict[str, Any]
) -> None:
    shown = {**VIEWS, **STRIDED}[view]

    def build() -> nn.Module:
        model = nn.Module()
        model.enc = nn.Parameter(torch.randn(4, 6))
        model.fc = nn.Linear(2, 2)
        model.register_buffer("dec", shown(model.enc.detach()), persistent=False)
        return model

    trained, model = build(), build()
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    buffer = model.dec
    report = smart_load(model, tmp_path / "x.pth", **options)
    assert (report.tensors, model.dec is buffer) == (3, True)
    assert torch.equal(model.dec, shown(trained.enc.detach()).to(model.dec.dtype))
    if "keep_fp32" not in options:
        with torch.no_grad():
            model.enc.zero_()
        assert not model.dec.any()
    model = build()
    smart_resume(model, tmp_path / "x.pth")
    assert torch.equal(model.dec, shown(trained.enc.detach()))
