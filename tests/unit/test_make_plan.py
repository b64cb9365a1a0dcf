"""The plan decides: what goes where, how it gets its bytes, when its data is checked, and what stands against it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchload import errors
from torchload.formats import open_checkpoint
from torchload.match.globs import Globs
from torchload.model.placement import Placement
from torchload.model.target import describe_model
from torchload.plan.options import Options
from torchload.plan.plan import Check, LoadPlan, Way
from torchload.plan.planner import make_plan
from torchload.plan.steps import select_for

CPU = torch.device("cpu")


@pytest.fixture
def plan_of(tmp_path: Path) -> Any:
    """The plan for a model and what a file holds."""

    def planned(model: nn.Module, weights: Any, *, device: Any = None, skip: Any = (), **options: Any) -> LoadPlan:
        torch.save(weights, tmp_path / "x.pth")
        with open_checkpoint(tmp_path / "x.pth") as checkpoint:
            strict = options.pop("strict", True)
            given = {"dtype": None, "keep_fp32": (), "atomic": False, **options}
            settings = Options(Placement(device), strict=strict, skip=Globs(skip), **given)
            target = describe_model(model)
            selection = select_for(target, checkpoint, settings.skip, strict, key=None, prefix=None, rename=None)
            return make_plan(target, checkpoint, selection, settings)

    return planned


def problems_of(plan_of: Any, *arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        plan_of(*arguments, **options)
    assert caught.value.written == ()
    return caught.value.problems


def ways(plan: LoadPlan) -> dict[str, Way]:
    return {item.name: item.way for item in plan.assignments}


def checks(plan: LoadPlan) -> dict[str, Check]:
    return {item.name: item.check for item in plan.assignments}


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(16, 16, bias=False, **options)


WEIGHTS = {"weight": torch.ones(16, 16)}


# --- how a tensor gets its bytes ---


def test_data_goes_straight_to_where_it_belongs(plan_of: Any) -> None:
    assert ways(plan_of(linear(), WEIGHTS)) == {"weight": Way.IN_PLACE}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (linear(), {"atomic": True}),
        (linear(), {"dtype": torch.float16}),
        (linear(device="meta"), {}),
        (nn.LazyLinear(16, bias=False), {}),
    ],
    ids=["atomic", "another dtype", "no memory yet", "no shape yet"],
)
def test_fresh_memory_where_the_old_will_not_do(plan_of: Any, model: nn.Module, options: Any) -> None:
    assert ways(plan_of(model, WEIGHTS, **options)) == {"weight": Way.FRESH}


def test_fresh_memory_for_an_expanded_buffer(plan_of: Any) -> None:
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(1, 16).expand(16, 16))
    assert ways(plan_of(model, WEIGHTS)) == {"weight": Way.FRESH}


def test_mapped_where_the_file_has_it_as_it_is_needed(plan_of: Any) -> None:
    model = nn.ModuleDict({"a": linear(), "b": linear(dtype=torch.float16), "c": linear(device="meta")})
    weights = {f"{name}.weight": torch.ones(16, 16) for name in "abc"}
    expected = {"a.weight": Way.MAPPED, "b.weight": Way.IN_PLACE, "c.weight": Way.MAPPED}
    assert ways(plan_of(model, weights, mmap=True)) == expected


def test_what_is_mapped_needs_no_free_memory(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchload.model.placement.free_bytes", lambda device: 100)
    plan_of(linear(device="meta"), WEIGHTS, mmap=True)
    with pytest.raises(errors.DeviceError, match="are free"):
        plan_of(linear(device="meta"), WEIGHTS)


def test_modules_that_load_themselves_are_handed_theirs(plan_of: Any) -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, *arguments: Any) -> None: ...

    plan = plan_of(
        nn.ModuleDict({"own": Own(2, 2), "fc": nn.Linear(2, 2)}),
        {
            f"{name}.{part}": torch.ones(*shape)
            for name in ("own", "fc")
            for part, shape in (("weight", (2, 2)), ("bias", (2,)))
        },
    )
    assert set(ways(plan)) == {"fc.weight", "fc.bias"}
    assert [hooked.prefix for hooked, _ in plan.own_loaders] == ["own."]
    assert [entry.shape for entry in plan.given] == [(2, 2), (2,)]


def test_old_memory_is_kept_where_post_hooks_have_yet_to_forgive(plan_of: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weights = model.state_dict()
    model.register_load_state_dict_post_hook(lambda module, keys: None)
    assert not plan_of(model, weights).keeps_old
    del weights["1.bias"]
    plan = plan_of(model, weights)
    assert (plan.keeps_old, plan.is_tentative) == (True, True)
    assert set(ways(plan).values()) == {Way.FRESH}


# --- when data is checked ---


@pytest.mark.parametrize(
    ("model", "options", "check"),
    [
        (linear(), {}, Check.BEFORE),
        (linear(), {"atomic": True}, Check.ARRIVAL),
        (linear(device="meta"), {}, Check.ARRIVAL),
        (linear(), {"dtype": torch.float16}, Check.ARRIVAL | Check.AFTER),
        (linear(dtype=torch.float16), {}, Check.BEFORE | Check.AFTER),
        (linear(), {"mmap": True}, Check.BEFORE | Check.AFTER),
    ],
    ids=["in place", "atomic", "meta", "cast into fresh memory", "cast in place", "mapped"],
)
def test_when_data_is_checked(plan_of: Any, model: nn.Module, options: Any, check: Check) -> None:
    assert checks(plan_of(model, WEIGHTS, verify=True, **options)) == {"weight": check}
    assert checks(plan_of(model, WEIGHTS, **options)) == {"weight": Check.NONE}


def test_no_data_goes_unchecked(plan_of: Any) -> None:
    shared = torch.arange(64.0).reshape(8, 8)  # one record for two tensors: neither has a checksum to itself
    model = nn.ModuleDict({"a": nn.Linear(8, 4, bias=False), "b": nn.Linear(8, 4, bias=False), "c": nn.LayerNorm(4)})
    weights = {**model.state_dict(), "a.weight": shared[:4], "b.weight": shared[4:]}
    for options in ({}, {"atomic": True}, {"mmap": True}, {"dtype": torch.float64}):
        plan = plan_of(model, weights, verify=True, **options)
        first = {id(extent) for extent in plan.extents_to_check_first}
        for item in plan.assignments:
            assert all(id(box.extent) in first for box in item.entry.boxes) or Check.ARRIVAL in item.check
        assert Check.BEFORE in checks(plan)["a.weight"]


# --- dtypes and devices ---


def test_casts_are_counted_and_integers_stay(plan_of: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    plan = plan_of(model, model.state_dict(), dtype=torch.bfloat16, keep_fp32=["1.*"])
    dtypes = {item.name: item.dtype for item in plan.assignments}
    assert dtypes["0.weight"] is torch.bfloat16
    assert dtypes["1.running_var"] is torch.float32
    assert dtypes["1.num_batches_tracked"] is torch.int64
    assert plan.casts == {(torch.float32, torch.bfloat16): 2}


def test_the_files_dtype(plan_of: Any) -> None:
    (item,) = plan_of(linear(), {"weight": torch.ones(16, 16, dtype=torch.bfloat16)}, dtype="auto").assignments
    assert (item.dtype, item.way) == (torch.bfloat16, Way.FRESH)


def test_what_nothing_fills_moves_with_the_rest(plan_of: Any) -> None:
    model = nn.Module()
    model.fc = linear()
    model.register_buffer("table", torch.ones(2), persistent=False)
    model.register_buffer("count", torch.ones(2, dtype=torch.int64), persistent=False)
    plan = plan_of(model, {"fc.weight": torch.ones(16, 16)}, dtype=torch.float16)
    assert [(item.slot.name, item.dtype, item.device) for item in plan.conversions] == [("table", torch.float16, CPU)]


def test_a_counter_on_meta_becomes_zero(plan_of: Any) -> None:
    model = nn.BatchNorm1d(2, device="meta")
    weights = nn.BatchNorm1d(2).state_dict()
    del weights["num_batches_tracked"]
    (conversion,) = plan_of(model, weights).conversions
    assert conversion.slot.name == "num_batches_tracked"


# --- what stands against it ---


def test_all_problems_at_once(plan_of: Any) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abcd"})
    model["b"] = nn.Linear(2, 2, bias=False, dtype=torch.complex64)
    model.register_buffer("index", torch.zeros(2, dtype=torch.int64))
    weights = {
        "a.weight": torch.eye(2).to_sparse(),
        "b.weight": torch.ones(2, 2),
        "c.weight": torch.ones(2, 2, dtype=torch.complex64),
        "d.weight": torch.ones(2, 2),
        "index": torch.tensor([0.5, 1.0]),
    }
    problems = problems_of(plan_of, model, weights, device={"e": "cpu"})
    text = "\n".join(problems)
    assert "a.weight is a sparse COO tensor" in text
    assert "c.weight: complex64 in the file would lose its imaginary part in float32" in text
    assert "index" in text
    assert "device= names parts that the model does not have: 'e'" in text
    assert len(problems) == 4


def test_missing_mismatched_and_unexpected_in_one_error(plan_of: Any) -> None:
    weights = {
        "0.weight": torch.ones(2, 2),
        "0.bias": torch.ones(3),
        "1.weight": torch.ones(2, 2),
        "1.odd": torch.ones(1),
    }
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        plan_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), weights)
    assert caught.value.missing_keys == ["1.bias"]
    assert caught.value.unexpected_keys == ["1.odd"]
    assert caught.value.mismatched == {"0.bias": ((3,), (2,))}


def test_conflicts_of_ties_join_the_rest(plan_of: Any) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    model["b"].weight = model["a"].weight
    weights = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2), "c.weight": torch.eye(2).to_sparse()}
    problems = problems_of(plan_of, model, weights)
    assert len(problems) == 2
    assert "differ in the file, but the model ties them" in problems[0]
    weights = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2), "c.weight": torch.ones(2, 2)}
    assert [item.name for item in plan_of(model, weights).assignments] == ["a.weight", "c.weight"]


@pytest.mark.parametrize("persistent", [True, False])
def test_what_would_stay_on_meta(plan_of: Any, persistent: bool) -> None:
    model = nn.Module()
    model.fc = linear(device="meta")
    model.register_buffer("table", torch.ones(2, device="meta"), persistent=persistent)
    (problem,) = problems_of(plan_of, model, {"fc.weight": torch.ones(16, 16)}, strict=False)
    assert ("not in the file: nothing" if persistent else "non-persistent buffer") in problem


def test_parameters_without_memory(plan_of: Any) -> None:
    model = linear()
    model.weight = nn.Parameter(torch.eye(16).to_sparse(), requires_grad=False)
    (problem,) = problems_of(plan_of, model, WEIGHTS)
    assert "without memory that could be written to" in problem


def test_objects_where_only_code_could_build_a_value(plan_of: Any) -> None:
    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "packed"] = argparse.Namespace()

        def _load_from_state_dict(self, *arguments: Any) -> None: ...

    model = nn.ModuleDict({"a": Packed(2, 2)})
    (problem,) = problems_of(
        plan_of, model, {**nn.ModuleDict({"a": nn.Linear(2, 2)}).state_dict(), "a.packed": argparse.Namespace()}
    )
    assert "a.packed is argparse.Namespace in the file" in problem


def test_another_model_is_not_loaded_in_part(plan_of: Any) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)])
    weights = {"3.bias": torch.ones(8), **{f"{number}.other": torch.ones(3) for number in range(10)}}
    (problem,) = problems_of(plan_of, model, weights, strict=False)
    assert "this is another model" in problem
