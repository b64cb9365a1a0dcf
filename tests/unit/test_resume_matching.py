"""Whose state is whose: several optimizers, parameters that only have numbers, parts that lie beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import lr_scheduler

from tests.law import same_bits, snapshot
from tests.versions import save_folder
from torchload import errors, read_state_dict, smart_load, smart_resume, smart_save


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()


def assert_same_moments(new: torch.optim.Optimizer, old: torch.optim.Optimizer, key: str = "exp_avg") -> None:
    pairs = zip(
        (parameter for group in new.param_groups for parameter in group["params"]),
        (parameter for group in old.param_groups for parameter in group["params"]),
    )
    for mine, theirs in pairs:
        assert same_bits(new.state[mine][key], old.state[theirs][key])


# --- several ---


class Pair(nn.Module):
    """Two parts of the same shapes."""

    def __init__(self, seed: int, features: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.generator = nn.Linear(3, 3)
        self.discriminator = nn.Linear(3, features)


def two(model: Pair) -> dict[str, torch.optim.Optimizer]:
    return {
        "discriminator": torch.optim.Adam(model.discriminator.parameters(), 0.01),
        "generator": torch.optim.Adam(model.generator.parameters(), 0.02),
    }


def saved_pair(path: Path, features: int = 3, **more: Any) -> tuple[Pair, dict[str, torch.optim.Optimizer]]:
    model = Pair(0, features)
    optimizers = two(model)
    step(model, *optimizers.values())
    states = {name: one.state_dict() for name, one in optimizers.items()}
    torch.save({"model": model.state_dict(), "optimizers": states, **more}, path)
    return model, optimizers


@pytest.mark.parametrize("features", [1, 3])
def test_a_list_is_matched_by_parameters_not_by_position(tmp_path, features):
    _, old = saved_pair(tmp_path / "x.pth", features)
    model = Pair(1, features)
    new = two(model)
    report = smart_resume(model, tmp_path / "x.pth", [new["generator"], new["discriminator"]])
    for name in new:
        assert_same_moments(new[name], old[name])
        assert new[name].param_groups[0]["lr"] == old[name].param_groups[0]["lr"]
    assert any("optimizers.generator" in phrase for phrase in report.restored)


def test_names_are_matched_by_name(tmp_path):
    _, old = saved_pair(tmp_path / "x.pth")
    model = Pair(1)
    new = two(model)
    smart_resume(model, tmp_path / "x.pth", dict(reversed(new.items())))
    for name in new:
        assert_same_moments(new[name], old[name])
    with pytest.raises(errors.IncompatibleCheckpointError, match="optimizers are 'discriminator', 'generator', those"):
        smart_resume(model, tmp_path / "x.pth", {"d": new["discriminator"], "g": new["generator"]})


def test_what_can_not_be_told_is_asked(tmp_path):
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    old = {"g": torch.optim.Adam(model[0].parameters()), "d": torch.optim.Adam(model[1].parameters())}
    step(model, *old.values())
    states = {name: one.state_dict() for name, one in old.items()}
    torch.save({"model": model.state_dict(), "optimizers": states}, tmp_path / "x.pth")
    other = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    new = [torch.optim.Adam(part.parameters()) for part in other]
    before = snapshot(other)
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_resume(other, tmp_path / "x.pth", new)
    assert "pass optimizer={'g': …, 'd': …}" in str(caught.value)
    assert all(same_bits(value, before[name]) for name, value in snapshot(other).items())
    smart_resume(other, tmp_path / "x.pth", dict(zip("gd", new)))
    assert_same_moments(new[0], old["g"])
    assert_same_moments(new[1], old["d"])


def test_schedulers_go_with_their_optimizers(tmp_path):
    model = Pair(0)
    optimizers = two(model)
    schedulers = {
        "discriminator": lr_scheduler.StepLR(optimizers["discriminator"], 1),
        "generator": lr_scheduler.StepLR(optimizers["generator"], 5),
    }
    step(model, *optimizers.values())
    for scheduler in schedulers.values():
        scheduler.step()
    smart_save(model, tmp_path / "x.pth", optimizer=optimizers, scheduler=schedulers)
    other = Pair(1)
    new = two(other)
    mine = [lr_scheduler.StepLR(new["generator"], 5), lr_scheduler.StepLR(new["discriminator"], 1)]
    smart_resume(other, tmp_path / "x.pth", [new["generator"], new["discriminator"]], mine)
    assert mine[0].state_dict() == schedulers["generator"].state_dict()
    assert mine[1].state_dict() == schedulers["discriminator"].state_dict()


@pytest.mark.parametrize("pattern", ["optim_{}", "{}_opt", "{}Optimizer", "optimizer_{}_state_dict"])
def test_states_under_names_of_their_own_are_found_by_what_they_hold(tmp_path, pattern):
    model = Pair(0)
    old = two(model)
    schedulers = {name: lr_scheduler.StepLR(optimizer, 1) for name, optimizer in old.items()}
    step(model, *old.values())
    schedulers["generator"].step()
    states = {pattern.format(name): optimizer.state_dict() for name, optimizer in old.items()}
    rates = {f"sched_{name}": scheduler.state_dict() for name, scheduler in schedulers.items()}
    torch.save({"model": model.state_dict(), **states, **rates}, tmp_path / "x.pth")
    names = {name: pattern.format(name) if pattern == "{}Optimizer" else name for name in old}
    other = Pair(1)
    new = two(other)
    mine = {name: lr_scheduler.StepLR(new[name], 1) for name in new}
    smart_resume(other, tmp_path / "x.pth", {names[name]: new[name] for name in reversed(new)}, mine)
    for name in new:
        assert_same_moments(new[name], old[name])
        assert mine[name].state_dict() == schedulers[name].state_dict()
    part = torch.optim.Adam(other.generator.parameters(), 0.5)
    report = smart_resume(other, tmp_path / "x.pth", {names["generator"]: part})
    assert_same_moments(part, old["generator"])
    assert any(pattern.format("discriminator") in note for note in report.notes)
    with pytest.raises(errors.IncompatibleCheckpointError, match="1 was given; to choose by name") as caught:
        smart_resume(other, tmp_path / "x.pth", part)
    assert "leave" not in str(caught.value)


@pytest.mark.parametrize("where", ["training", "state"])
def test_states_one_level_down_are_found(tmp_path, where):
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    step(model, optimizer)
    scheduler.step()
    inside = {"optimizer": optimizer.state_dict(), "lr_sched": scheduler.state_dict(), "scheduler": {"kind": "step"}}
    file = {"model": model.state_dict(), "early_stopping": {"last_epoch": 3}, "config": {"optimizer": {"lr": 0.1}}}
    torch.save({**file, where: inside}, tmp_path / "x.pth")
    new = torch.optim.Adam(model.parameters())
    mine = lr_scheduler.StepLR(new, 9)
    report = smart_resume(model, tmp_path / "x.pth", new, mine)
    assert_same_moments(new, optimizer)
    assert mine.state_dict() == scheduler.state_dict()
    assert any(f"{where}.optimizer" in phrase for phrase in report.restored)


# --- by position ---


class Ordered(nn.Module):
    """The same parameters, registered in the order given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(3, 3))


def saved_in_order(path: Path, *names: str, optimizer: Any = torch.optim.Adam) -> Any:
    model = Ordered(*names)
    old = optimizer(model.parameters(), 0.01)
    step(model, old)
    torch.save({"model": model.state_dict(), "optimizer": old.state_dict()}, path)
    return model, old


def test_numbers_are_refused_where_the_files_model_has_another_order(tmp_path):
    saved, old = saved_in_order(tmp_path / "x.pth", "b", "a")
    model = Ordered("a", "b")
    new = torch.optim.Adam(model.parameters())
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_resume(model, tmp_path / "x.pth", new)
    assert "another order than this one (b.weight where a.weight is here)" in str(caught.value)
    assert not new.state
    # What it advises:
    new = torch.optim.Adam([*model.b.parameters(), *model.a.parameters()])
    smart_resume(model, tmp_path / "x.pth", new)
    for name, parameter in model.named_parameters():
        assert same_bits(new.state[parameter]["exp_avg"], old.state[saved.get_parameter(name)]["exp_avg"])


def test_groups_and_parts_in_the_same_order_are_not_refused(tmp_path):
    model = Ordered("a", "b")

    def groups(of: nn.Module) -> list[dict[str, Any]]:
        named = list(of.named_parameters())
        return [{"params": [value for name, value in named if name.endswith(end)]} for end in ("weight", "bias")]

    old = torch.optim.Adam(groups(model))
    step(model, old)
    torch.save({"model": model.state_dict(), "optimizer": old.state_dict()}, tmp_path / "x.pth")
    other = Ordered("a", "b")
    new = torch.optim.Adam(groups(other))
    smart_resume(other, tmp_path / "x.pth", new)
    assert_same_moments(new, old)


def test_without_a_state_of_its_own_any_order_will_do(tmp_path):
    saved_in_order(tmp_path / "x.pth", "b", "a", optimizer=torch.optim.SGD)
    model = Ordered("a", "b")
    new = torch.optim.SGD(model.parameters(), 0.5)
    smart_resume(model, tmp_path / "x.pth", new)
    assert new.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("source", ["mapping", "folder"])
def test_the_order_is_that_of_a_mapping_and_of_weights_beside_the_optimizer(tmp_path, source):
    saved, old = saved_in_order(tmp_path / "x.pth", "b", "a")
    if source == "mapping":
        path: Any = {"model": saved.state_dict(), "optimizer": old.state_dict()}
    else:
        path = tmp_path / "run"
        path.mkdir()
        torch.save(saved.state_dict(), path / "pytorch_model.bin")
        torch.save(old.state_dict(), path / "optimizer.pt")
    model = Ordered("a", "b")
    with pytest.raises(errors.IncompatibleCheckpointError, match="another order than this one"):
        smart_resume(model, path, torch.optim.Adam(model.parameters()))
    smart_resume(saved, path, torch.optim.Adam(saved.parameters()))


@pytest.mark.parametrize("sorted_by", ["safetensors", "somebody"])
def test_sorted_names_say_nothing_of_a_models_order(tmp_path, sorted_by):
    saved, old = saved_in_order(tmp_path / "x.pth", "b", "a")
    weights = dict(sorted(saved.state_dict().items()))
    if sorted_by == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(weights, tmp_path / "model.safetensors")
        torch.save(old.state_dict(), tmp_path / "optimizer.pt")
        path = tmp_path
    else:
        path = tmp_path / "y.pth"
        torch.save({"model": weights, "optimizer": old.state_dict()}, path)
    new = torch.optim.Adam(saved.parameters())
    smart_resume(saved, path, new)
    assert_same_moments(new, old)


def test_names_sorted_within_each_shard_say_nothing_of_a_models_order(tmp_path):
    saved, old = saved_in_order(tmp_path / "x.pth", "c", "a", "d", "b")
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights = saved.state_dict()
    shards = [tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"]
    for shard, layers in zip(shards, ("ca", "db")):
        save_file({name: weights[name] for name in weights if name[0] in layers}, shard)
    mapping = read_state_dict(shards)
    assert [*mapping] != sorted(mapping)
    assert [*mapping] != [*weights]
    new = torch.optim.Adam(saved.parameters())
    smart_resume(saved, {"model": mapping, "optimizer": old.state_dict()}, new)
    assert_same_moments(new, old)


def test_ties_have_the_place_of_their_first_name(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.body = nn.Linear(3, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    model, other = Tied(), Tied()
    old, new = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters())
    step(model, old)
    torch.save({"model": model.state_dict(), "optimizer": old.state_dict()}, tmp_path / "x.pth")
    smart_resume(other, tmp_path / "x.pth", new)
    assert_same_moments(new, old)


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR of torch 2.4
def test_numbers_that_a_distributed_checkpoint_made_text_of(tmp_path):
    model = nn.Linear(3, 3)
    old = torch.optim.Adam(model.parameters(), 0.1)
    first = lr_scheduler.SequentialLR(
        old, [lr_scheduler.ConstantLR(old, 1.0), lr_scheduler.MultiStepLR(old, [1, 2])], [1]
    )
    for _ in range(2):
        step(model, old)
        first.step()
    state = {"model": model.state_dict(), "optimizer": old.state_dict(), "scheduler": first.state_dict()}
    save_folder(state, checkpoint_id=tmp_path / "x")
    other = nn.Linear(3, 3)
    new = torch.optim.Adam(other.parameters(), 0.1)
    second = lr_scheduler.SequentialLR(
        new, [lr_scheduler.ConstantLR(new, 1.0), lr_scheduler.MultiStepLR(new, [1, 2])], [1]
    )
    smart_resume(other, tmp_path / "x", new, second)
    assert_same_moments(new, old)
    for _ in range(3):
        for optimizer, scheduler, one in ((old, first, model), (new, second, other)):
            step(one, optimizer)
            scheduler.step()
        assert new.param_groups[0]["lr"] == old.param_groups[0]["lr"]
    assert new.param_groups[0]["lr"] == pytest.approx(0.001)


def test_milestones_are_numbers_again_where_there_are_none_here(tmp_path):
    model = nn.Linear(3, 3)
    old = torch.optim.SGD(model.parameters(), 0.1)
    first = lr_scheduler.MultiStepLR(old, [2])
    state = {"model": model.state_dict(), "optimizer": old.state_dict(), "scheduler": first.state_dict()}
    save_folder(state, checkpoint_id=tmp_path / "x")
    new = torch.optim.SGD(model.parameters(), 0.1)
    second = lr_scheduler.MultiStepLR(new, [])
    smart_resume(model, tmp_path / "x", new, second)
    for _ in range(2):
        new.step()
        second.step()
    assert new.param_groups[0]["lr"] == pytest.approx(0.01)


# --- beside the weights ---


def accelerate_folder(folder: Path, *, count: int = 1) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """What accelerate's `save_state` and transformers' Trainer write under FSDP with SHARDED_STATE_DICT."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(part.parameters()) for part in model]
    step(model, *optimizers)
    save_folder({"model": model.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    for index, (part, optimizer) in enumerate(zip(model, optimizers)):
        state = get_state_dict(part, optimizer)[1]
        name = {key: f"{index}.{key}" for key, _ in part.named_parameters()}
        state = {
            "state": {name[key]: value for key, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [name[key] for key in group["params"]]} for group in state["param_groups"]
            ],
        }
        save_folder({"optimizer": state}, checkpoint_id=folder / f"optimizer_{index}")
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": 1.0, "global_step": 5}))
    return model, optimizers


@pytest.mark.parametrize("count", [1, 2])
def test_sharded_folders_of_accelerate_and_trainer(tmp_path, count):
    model, old = accelerate_folder(tmp_path, count=count)
    other = nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))
    new = [torch.optim.AdamW(part.parameters()) for part in other]
    report = smart_resume(other, tmp_path, new)
    assert report.step == 5
    for mine, theirs in zip(new, old):
        assert_same_moments(mine, theirs)
    assert all(same_bits(*pair) for pair in zip(other.parameters(), model.parameters()))


@pytest.mark.parametrize("save", ["safetensors", "torch"])
def test_each_of_several_models_in_a_folder_has_what_is_its_own(tmp_path, save):
    """As accelerate's `save_state` names them without FSDP."""
    names = (
        ["model.safetensors", "model_1.safetensors"]
        if save == "safetensors"
        else [
            "pytorch_model.bin",
            "pytorch_model_1.bin",
        ]
    )
    torch.manual_seed(0)
    models = [nn.Linear(3, 3), nn.Linear(3, 3)]
    optimizers = [torch.optim.Adam(model.parameters(), 0.01) for model in models]
    for number, (model, optimizer, name) in enumerate(zip(models, optimizers, names)):
        step(model, optimizer)
        smart_save(model, tmp_path / name)
        torch.save(optimizer.state_dict(), tmp_path / f"optimizer{f'_{number}' if number else ''}.bin")
    torch.save({"step": 1, "torch_manual_seed": torch.get_rng_state()}, tmp_path / "random_states_0.pkl")
    for path, model, optimizer in zip((tmp_path / name for name in names), models, optimizers):
        other = nn.Linear(3, 3)
        new = torch.optim.Adam(other.parameters())
        report = smart_resume(other, path, new)
        assert same_bits(other.weight, model.weight)
        assert_same_moments(new, optimizer)
        assert any("random numbers of torch" in phrase for phrase in report.restored)
    with pytest.raises(errors.AmbiguousCheckpointError, match=f"{names[0]}, {names[1]}"):
        smart_load(nn.Linear(3, 3), tmp_path)
    (tmp_path / "random_states_0.pkl").unlink()  # nothing says any more that these are two models of one run
    smart_load(nn.Linear(3, 3), tmp_path)


def test_a_file_that_holds_all_is_taken_by_itself(tmp_path):
    model = nn.Linear(3, 3)
    old = torch.optim.Adam(model.parameters(), 0.01)
    step(model, old)
    torch.save({"model": model.state_dict(), "optimizer": old.state_dict()}, tmp_path / "pytorch_model.bin")
    torch.save({}, tmp_path / "optimizer.bin")
    new = torch.optim.Adam(model.parameters())
    smart_resume(model, tmp_path / "pytorch_model.bin", new)
    assert_same_moments(new, old)


def test_a_state_that_lies_beside_is_not_advised_away(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    old, optimizer = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    step(model, old)
    file = tmp_path / "run" / "weights.pth"
    file.parent.mkdir()
    torch.save(model.state_dict(), file)
    with pytest.raises(errors.IncompatibleCheckpointError, match="leave optimizer= out"):
        smart_resume(model, file, optimizer)

    (file.parent / "optim_shards").mkdir()
    with pytest.raises(errors.IncompatibleCheckpointError, match="optim_shards in the folder may hold it"):
        smart_resume(model, file.parent, optimizer)

    torch.save(old.state_dict(), file.parent / "optimizer.pth")
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_resume(model, file, optimizer)
    assert f"optimizer.pth lies beside it, so give the folder: {file.parent}" in str(caught.value)
    assert "leave optimizer= out" not in str(caught.value)
    smart_resume(model, file.parent, optimizer)  # what it advises
    assert_same_moments(optimizer, old)

    torch.save(nn.Sequential(nn.Linear(3, 3)).state_dict(), file.parent / "weights_2.pth")
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_resume(model, file, torch.optim.AdamW(model.parameters()))
    assert "optimizer.pth lies beside it, and nothing says whether it belongs to these weights" in str(caught.value)
    weights, state = (torch.load(one, weights_only=True) for one in (file, file.parent / "optimizer.pth"))
    smart_resume(model, {"model": weights, "optimizer": state}, optimizer)  # what it advises


def test_universal_folders_of_deepspeed_are_named(tmp_path):
    folder = tmp_path / "global_step5_universal"
    parameter = folder / "zero" / "fc.weight"
    parameter.mkdir(parents=True)
    for name in ("fp32", "exp_avg", "exp_avg_sq"):
        torch.save({"param": torch.zeros(3, 3)}, parameter / f"{name}.pt")
    torch.save({"module": None, "universal_checkpoint_info": {}}, folder / "mp_rank_00_model_states.pt")
    (tmp_path / "latest_universal").write_text("global_step5_universal")
    model = nn.Linear(3, 3)
    for path in (folder, tmp_path):
        with pytest.raises(errors.CheckpointFormatError, match="DeepSpeed universal checkpoint") as caught:
            smart_resume(model, path, torch.optim.Adam(model.parameters()))
        assert "ds_to_universal.py" in str(caught.value)
