"""smart_resume: training goes on as if never interrupted, or nothing changes."""

from __future__ import annotations

import argparse
import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.law import assert_equal_bits, same_bits, snapshot
from tests.versions import save_folder
from torchload import errors, smart_resume

STEPS, STOP = 7, 4


def new_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [*model[0].parameters(), *model[1].parameters()]}, {"params": model[3].parameters(), "lr": 0.02}]


TAKES_NAMES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1),
    "SGD momentum": lambda model: torch.optim.SGD(two_groups(model), 0.1, momentum=0.9, nesterov=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), 0.01),
    "AdamW amsgrad": lambda model: torch.optim.AdamW(two_groups(model), 0.01, amsgrad=True),
    "AdamW named": lambda model: torch.optim.AdamW(model.named_parameters(), 0.01),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), 0.01),
    "Adadelta": lambda model: torch.optim.Adadelta(model.parameters()),
    "Adamax": lambda model: torch.optim.Adamax(model.parameters()),
    "ASGD": lambda model: torch.optim.ASGD(model.parameters()),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters()),
    "RAdam": lambda model: torch.optim.RAdam(model.parameters()),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), momentum=0.5, centered=True),
    "Rprop": lambda model: torch.optim.Rprop(model.parameters()),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3, 5]),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
}


class Run:
    """A training run, on data that depends on nothing but the step."""

    def __init__(self, optimizer="Adam", scheduler="StepLR", seed=0):
        self.model = new_model(seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            inputs, target = torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator)

            def closure(inputs=inputs, target=target):
                self.optimizer.zero_grad()
                loss = nn.functional.mse_loss(self.model(inputs), target)
                loss.backward()
                return loss

            loss = self.optimizer.step(closure)
            self.ema.update_parameters(self.model)
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss.item())
            else:
                self.scheduler.step()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "epoch": 2,
            "global_step": STOP,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "model_ema": self.ema.state_dict(),
            "args": argparse.Namespace(lr=0.01, tags=["a"]),
            "best": 0.5,
        }

    def everything(self) -> dict[str, Any]:
        groups = self.optimizer.state_dict()
        return copy.deepcopy({"model": snapshot(self.model), "ema": snapshot(self.ema), "optimizer": groups}) | {
            "scheduler": repr(self.scheduler.state_dict())
        }


def assert_same_run(one: Run, before: dict[str, Any]) -> None:
    now = one.everything()
    assert_equal_bits(now["model"], before["model"])
    assert_equal_bits(now["ema"], before["ema"])
    assert repr(now["optimizer"]["param_groups"]) == repr(before["optimizer"]["param_groups"])
    assert now["optimizer"]["state"].keys() == before["optimizer"]["state"].keys()
    for key, values in now["optimizer"]["state"].items():
        assert values.keys() == before["optimizer"]["state"][key].keys()
        for name, value in values.items():
            assert same_bits(value, before["optimizer"]["state"][key][name]), (key, name)
    assert now["scheduler"] == before["scheduler"]


@pytest.fixture
def stopped(tmp_path):
    """A run that stopped, and its checkpoint."""
    run = Run()
    run.train(0, STOP)
    torch.save(run.state(), tmp_path / "last.pth")
    return run


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_with_any_optimizer(tmp_path, optimizer):
    if optimizer == "AdamW named" and not TAKES_NAMES:
        pytest.skip("optimizers of this torch don't take names")
    straight = Run(optimizer)
    losses = straight.train(0, STEPS)
    first = Run(optimizer)
    assert first.train(0, STOP) == losses[:STOP]
    torch.save(first.state(), tmp_path / "last.pth")
    second = Run(optimizer, seed=1)
    report = smart_resume(
        second.model, tmp_path / "last.pth", second.optimizer, second.scheduler, "cpu", ema=second.ema
    )
    assert second.train(report.step, STEPS) == losses[STOP:]
    assert_equal_bits(snapshot(second.model), snapshot(straight.model))
    assert_equal_bits(snapshot(second.ema), snapshot(straight.ema))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR of torch 2.4
def test_training_goes_on_bit_for_bit_with_any_scheduler(tmp_path, scheduler):
    losses = Run("SGD momentum", scheduler).train(0, STEPS)
    first = Run("SGD momentum", scheduler)
    first.train(0, STOP)
    torch.save(first.state(), tmp_path / "last.pth")
    second = Run("SGD momentum", scheduler, seed=1)
    smart_resume(second.model, tmp_path / "last.pth", second.optimizer, second.scheduler)
    assert second.train(STOP, STEPS) == losses[STOP:]
    assert type(getattr(second.scheduler, "milestones", None)) is type(getattr(first.scheduler, "milestones", None))


def test_the_report(tmp_path, stopped):
    run = Run(seed=1)
    report = smart_resume(run.model, tmp_path / "last.pth", run.optimizer, run.scheduler, ema=run.ema)
    assert (report.epoch, report.step) == (2, STOP)
    assert report.values == {"epoch": 2, "global_step": STOP, "args": {"lr": 0.01, "tags": ["a"]}, "best": 0.5}
    assert report.load.key == "model_state_dict"
    assert report.ema.key == "model_ema"
    text = str(report)
    assert "epoch 2, step 4" in text
    assert "Adam from 'optimizer_state_dict' (1 group, 6 parameters)" in text
    assert "StepLR from 'scheduler_state_dict'" in text
    assert "eval()" not in text


def test_step_counters_stay_on_the_cpu_and_moments_take_the_parameters_dtype(tmp_path, stopped):
    model = new_model(1).double()
    optimizer = torch.optim.Adam(model.parameters())
    smart_resume(model, tmp_path / "last.pth", optimizer)
    want = torch.optim.Adam(model.parameters())
    want.load_state_dict(stopped.optimizer.state_dict())
    for parameter in model.parameters():
        for name, value in want.state[parameter].items():
            assert same_bits(optimizer.state[parameter][name], value)
    assert optimizer.state[model[0].weight]["step"].dtype is torch.float32
    assert optimizer.state[model[0].weight]["exp_avg"].dtype is torch.float64


def test_a_scaler_that_is_disabled_asks_for_nothing_and_one_that_is_not_gets_its_state(tmp_path, stopped):
    run = Run(seed=1)
    smart_resume(run.model, tmp_path / "last.pth", scaler=torch.amp.GradScaler("cpu", enabled=False))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    with pytest.raises(errors.IncompatibleCheckpointError, match="no scaler state; leave scaler= out"):
        smart_resume(run.model, tmp_path / "last.pth", scaler=scaler)
    old = torch.amp.GradScaler("cpu", init_scale=128.0)
    torch.save({**stopped.state(), "scaler": old.state_dict()}, tmp_path / "scaled.pth")
    smart_resume(run.model, tmp_path / "scaled.pth", scaler=scaler)
    assert scaler.state_dict() == old.state_dict()


# --- the layouts in use ---


def plain(run: Run) -> dict[str, Any]:
    return run.state()


def lightning(run: Run) -> dict[str, Any]:
    return {
        "epoch": 2,
        "global_step": STOP,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict((f"model.{name}", value) for name, value in run.model.state_dict().items()),
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [run.optimizer.state_dict()],
        "lr_schedulers": [run.scheduler.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }


def lightning_average(run: Run) -> dict[str, Any]:
    average = run.ema.state_dict()
    return {
        **lightning(run),
        "state_dict": {k.removeprefix("module."): v for k, v in average.items() if k != "n_averaged"},
        "averaging_state": {"n_averaged": average["n_averaged"]},
        "current_model_state": run.model.state_dict(),
    }


def mmengine(run: Run) -> dict[str, Any]:
    average = run.ema.state_dict()
    inner = {name: value for name, value in average.items() if name != "n_averaged"}
    return {
        "meta": {"epoch": 2, "iter": STOP, "experiment_name": "x"},
        "state_dict": {name.removeprefix("module."): value for name, value in inner.items()},
        "message_hub": {"runtime_info": {"epoch": 1}},
        "optimizer": run.optimizer.state_dict(),
        "param_schedulers": [run.scheduler.state_dict()],
        "ema_state_dict": {
            "steps": torch.tensor(STOP),
            **{f"module.{name}": value for name, value in run.model.state_dict().items()},
        },
    }


def timm(run: Run) -> dict[str, Any]:
    average = {k.removeprefix("module."): v for k, v in run.ema.state_dict().items() if k != "n_averaged"}
    return {
        "epoch": 2,
        "arch": "net",
        "state_dict": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(lr=0.1),
        "state_dict_ema": average,
        "metric": 0.5,
    }


def nanogpt(run: Run) -> dict[str, Any]:
    model = {f"_orig_mod.{name}": value for name, value in run.model.state_dict().items()}
    return {
        "model": model,
        "optimizer": run.optimizer.state_dict(),
        "iter_num": STOP,
        "best_val_loss": torch.tensor(1.5),
    }


def fvcore(run: Run) -> dict[str, Any]:
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "iteration": STOP,
    }


def detectron2(run: Run) -> dict[str, Any]:
    inner = {"iteration": STOP, "optimizer": run.optimizer.state_dict()}
    hooks = {"LRScheduler": run.scheduler.state_dict()}
    return {
        "model": run.model.state_dict(),
        "trainer": {"iteration": STOP, "hooks": hooks, "_trainer": inner},
        "iteration": STOP,
    }


def composer(run: Run) -> dict[str, Any]:
    return {
        "state": {
            "model": run.model.state_dict(),
            "optimizers": {"Adam": run.optimizer.state_dict()},
            "schedulers": {"StepLR": run.scheduler.state_dict()},
        },
        "rng": [{"python": (1, 2)}],
    }


LAYOUTS = {
    build.__name__: (build, scheduler, average, epoch, step)
    for build, scheduler, average, epoch, step in (
        (plain, True, True, 2, STOP),
        (lightning, True, False, 2, STOP),
        (lightning_average, True, True, 2, STOP),
        (mmengine, True, True, 2, STOP),
        (timm, False, True, 2, None),
        (nanogpt, False, False, None, STOP),
        (fvcore, True, False, None, STOP),
        (detectron2, True, False, None, STOP),
        (composer, True, False, None, None),
    )
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_use(tmp_path, layout, stopped):
    build, has_scheduler, has_average, epoch, step = LAYOUTS[layout]
    torch.save(build(stopped), tmp_path / "x.ckpt")
    run = Run(seed=1)
    report = smart_resume(
        run.model,
        tmp_path / "x.ckpt",
        run.optimizer,
        run.scheduler if has_scheduler else None,
        ema=run.ema if has_average else None,
    )
    assert (report.epoch, report.step) == (epoch, step)
    assert_equal_bits(snapshot(run.model), snapshot(stopped.model))
    if has_average:
        counted = layout in ("plain", "lightning_average")
        want = snapshot(stopped.ema) if counted else {**snapshot(stopped.ema), "n_averaged": torch.tensor(0)}
        assert_equal_bits(snapshot(run.ema), want)
        assert counted is not any("how many" in note for note in report.notes)
    for ours, theirs in zip(run.model.parameters(), stopped.model.parameters()):
        assert same_bits(list(run.optimizer.state[ours].values()), list(stopped.optimizer.state[theirs].values()))
    if has_scheduler:
        assert run.scheduler.state_dict() == stopped.scheduler.state_dict()


def test_ultralytics_keeps_only_the_average(tmp_path, stopped):
    class ModelEMA:  # its own, not a module
        def __init__(self, model):
            self.ema = copy.deepcopy(model)
            self.updates = 0

    state = {"epoch": 2, "model": None, "ema": stopped.model, "updates": 9, "optimizer": stopped.optimizer.state_dict()}
    torch.save(state, tmp_path / "last.pt")
    run = Run(seed=1)
    ema = ModelEMA(run.model)
    report = smart_resume(run.model, tmp_path / "last.pt", run.optimizer, ema=ema)
    assert_equal_bits(snapshot(run.model), snapshot(stopped.model))
    assert_equal_bits(snapshot(ema.ema), snapshot(stopped.model))
    assert ema.updates == 9
    assert "no raw weights" in str(report)


def test_folders_of_accelerate_and_of_transformers_trainer(tmp_path, stopped):
    accelerate, trainer = tmp_path / "accelerate", tmp_path / "checkpoint-4"
    for folder, suffix in ((accelerate, "bin"), (trainer, "pt")):
        folder.mkdir()
        save_file(stopped.model.state_dict(), folder / "model.safetensors")
        torch.save(stopped.optimizer.state_dict(), folder / f"optimizer.{suffix}")
        torch.save(stopped.scheduler.state_dict(), folder / f"scheduler.{suffix}")
    (trainer / "trainer_state.json").write_text(json.dumps({"epoch": 1.5, "global_step": STOP, "max_steps": 9}))
    for folder in (accelerate, trainer):
        run = Run(seed=1)
        report = smart_resume(run.model, folder, run.optimizer, run.scheduler)
        assert_equal_bits(snapshot(run.model), snapshot(stopped.model))
        assert run.scheduler.state_dict() == stopped.scheduler.state_dict()
        assert len(run.optimizer.state) == 6
    assert (report.epoch, report.step) == (1, STOP)
    assert report.values["trainer_state"]["max_steps"] == 9
    (trainer / "trainer_state.json").write_text("{")
    with pytest.raises(errors.CorruptCheckpointError, match="no valid JSON"):
        smart_resume(run.model, trainer)


def test_several_optimizers(tmp_path):
    def build():
        model = new_model()
        return model, [
            torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9),
            torch.optim.Adam(model[3].parameters()),
        ]

    trained, theirs = build()
    trained(torch.randn(4, 6)).sum().backward()
    for optimizer in theirs:
        optimizer.step()
    state = {"state_dict": trained.state_dict(), "optimizer_states": [each.state_dict() for each in theirs]}
    torch.save(state, tmp_path / "x.ckpt")
    model, ours = build()
    smart_resume(model, tmp_path / "x.ckpt", ours)
    assert "momentum_buffer" in ours[0].state[model[0].weight]
    assert "exp_avg" in ours[1].state[model[3].weight]
    with pytest.raises(errors.IncompatibleCheckpointError, match="states of 2 optimizers, 1 was given"):
        smart_resume(model, tmp_path / "x.ckpt", ours[:1])


def test_parameters_are_matched_by_name_where_the_file_names_them(tmp_path, stopped):
    if not TAKES_NAMES:
        pytest.skip("optimizers of this torch don't take names")
    named = torch.optim.AdamW(nn.DataParallel(stopped.model).named_parameters())
    stopped.model(torch.randn(4, 6)).sum().backward()
    named.step()
    if "param_names" not in named.state_dict()["param_groups"][0]:
        pytest.skip("this torch does not save names")
    torch.save({"model": stopped.model.state_dict(), "optimizer": named.state_dict()}, tmp_path / "x.pth")
    model = new_model(1)
    optimizer = torch.optim.AdamW(list(model.parameters())[::-1])
    report = smart_resume(model, tmp_path / "x.pth", optimizer)
    assert "matched by name" in str(report)
    for ours, theirs in zip(model.parameters(), stopped.model.parameters()):
        assert same_bits(optimizer.state[ours]["exp_avg"], named.state[theirs]["exp_avg"])


def test_states_keyed_by_name_as_fsdp_saves_them(tmp_path, stopped):
    names = [name for name, _ in stopped.model.named_parameters()]
    saved = stopped.optimizer.state_dict()
    state = {names[number]: values for number, values in saved["state"].items()}
    groups = [{**saved["param_groups"][0], "params": names}]
    torch.save({"model": stopped.model.state_dict(), "optim": {"state": state, "param_groups": groups}}, tmp_path / "x")
    run = Run(seed=1)
    smart_resume(run.model, tmp_path / "x", run.optimizer)
    for ours, theirs in zip(run.model.parameters(), stopped.model.parameters()):
        assert same_bits(run.optimizer.state[ours]["exp_avg_sq"], stopped.optimizer.state[theirs]["exp_avg_sq"])


# --- everything or nothing ---


def swapped_order(state):
    groups = state["optimizer_state_dict"]["param_groups"]
    groups[0]["params"] = groups[0]["params"][::-1]


def drop_parameter(state):
    state["optimizer_state_dict"]["param_groups"][0]["params"].pop()


def two_of_them(state):
    state["optimizer_state_dict"]["param_groups"] *= 2


def other_optimizer(state):
    state["optimizer_state_dict"] = torch.optim.SGD(new_model().parameters(), 0.1).state_dict()


def other_scheduler(state):
    state["scheduler_state_dict"] = {"last_epoch": 1, "total_steps": 9}


def scheduler_with_objects(state):
    state["scheduler_state_dict"]["gamma"] = argparse.Namespace()


def no_optimizer(state):
    del state["optimizer_state_dict"]


def no_average(state):
    del state["model_ema"]


def other_model(state):
    del state["model_state_dict"]["0.weight"]


def average_of_another(state):
    state["model_ema"]["module.0.weight"] = torch.zeros(2, 2)


REFUSALS = {
    swapped_order: "another order",
    drop_parameter: "group 0 has 5 parameters in the file and 6 here",
    two_of_them: "2 parameter groups, the optimizer 1",
    other_optimizer: "another kind of optimizer than Adam",
    other_scheduler: "another kind of scheduler",
    scheduler_with_objects: "argparse.Namespace",
    no_optimizer: "no optimizer state; leave optimizer= out",
    no_average: "no averaged weights",
    other_model: "0.weight",
    average_of_another: "another shape",
}


@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda spoil: spoil.__name__)
def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path, stopped, spoil):
    state = stopped.state()
    spoil(state)
    torch.save(state, tmp_path / "bad.pth")
    run = Run(seed=1)
    run.train(0, 2)
    before = run.everything()
    with pytest.raises(errors.IncompatibleCheckpointError, match=REFUSALS[spoil]):
        smart_resume(run.model, tmp_path / "bad.pth", run.optimizer, run.scheduler, ema=run.ema)
    assert_same_run(run, before)


class Refusing:
    """The last to be restored."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        if state:
            raise KeyError("no")


@pytest.mark.parametrize("ema", [True, False])
def test_a_failure_at_the_very_end_takes_everything_back(tmp_path, stopped, ema):
    torch.save({**stopped.state(), "scaler": {"scale": 1.0}}, tmp_path / "x.pth")
    run = Run(seed=1)
    run.train(0, 2)
    before, pointers = run.everything(), [value.data_ptr() for value in run.model.parameters()]
    with pytest.raises(errors.IncompatibleCheckpointError, match="Refusing did not accept its state"):
        smart_resume(
            run.model,
            tmp_path / "x.pth",
            run.optimizer,
            run.scheduler,
            ema=run.ema if ema else None,
            scaler=Refusing(),
        )
    assert_same_run(run, before)
    assert [value.data_ptr() for value in run.model.parameters()] == pointers
    assert run.train(2, 4) == Run(seed=1).train(0, 4)[2:]


@pytest.mark.parametrize("says", ["forgive", "nothing", "accuse"])
def test_post_hooks_of_the_model_have_the_last_word(tmp_path, says):
    saved, model = nn.Linear(3, 2, bias=says == "accuse"), nn.Linear(3, 2)
    torch.save({"model": saved.state_dict(), "epoch": 3}, tmp_path / "x.pth")

    def hook(module: nn.Module, keys: Any) -> None:
        heard.append(list(keys.missing_keys))
        if says == "forgive":
            keys.missing_keys.clear()
        elif says == "accuse":
            keys.missing_keys.append("bias")

    heard: list[list[str]] = []
    model.register_load_state_dict_post_hook(hook)
    before = snapshot(model)
    if says == "forgive":
        report = smart_resume(model, tmp_path / "x.pth")
        assert report.load.missing_keys == []
        assert same_bits(model.weight, saved.weight)
    else:
        with pytest.raises(errors.IncompatibleCheckpointError, match="bias") as caught:
            smart_resume(model, tmp_path / "x.pth")
        assert caught.value.missing_keys == ["bias"]
        assert_equal_bits(snapshot(model), before)
    assert heard == [[] if says == "accuse" else ["bias"]]
    if says == "nothing":
        with pytest.warns(errors.CheckpointWarning, match="kept initial values: bias"):
            report = smart_resume(model, tmp_path / "x.pth", strict=False)
        assert report.load.missing_keys == ["bias"]


def test_not_strict_restores_what_is_there(tmp_path, stopped):
    torch.save({"model": stopped.model.state_dict(), "epoch": 3}, tmp_path / "x.pth")
    run = Run(seed=1)
    report = smart_resume(run.model, tmp_path / "x.pth", run.optimizer, run.scheduler, ema=run.ema, strict=False)
    assert report.epoch == 3
    assert [word in str(report) for word in ("no optimizer state", "no scheduler state", "no averaged")] == [True] * 3
    assert_equal_bits(snapshot(run.model), snapshot(stopped.model))


def test_a_scheduler_without_a_state_still_works(tmp_path, stopped):
    plain_optimizer = torch.optim.Adam(stopped.model.parameters())  # its groups have no 'initial_lr'
    torch.save({"model": stopped.model.state_dict(), "optimizer": plain_optimizer.state_dict()}, tmp_path / "x.pth")
    run = Run(scheduler="CosineAnnealingLR", seed=1)
    smart_resume(run.model, tmp_path / "x.pth", run.optimizer, run.scheduler, strict=False)
    assert run.optimizer.param_groups[0]["initial_lr"] == 0.01
    assert run.optimizer.param_groups[0]["lr"] == 0.001
    run.train(0, 2)


def test_what_was_not_asked_for_is_mentioned(tmp_path, stopped):
    report = smart_resume(new_model(1), tmp_path / "last.pth")
    assert "pass optimizer= for that" in str(report)


def test_optimizers_keep_their_parameters(tmp_path, stopped):
    run = Run(seed=1)
    parameters = list(run.model.parameters())
    smart_resume(run.model, tmp_path / "last.pth", run.optimizer, run.scheduler)
    assert all(a is b for a, b in zip(parameters, run.optimizer.param_groups[0]["params"]))
    assert all(a is b for a, b in zip(parameters, run.model.parameters()))
    assert run.scheduler.optimizer is run.optimizer


CORPUS = Path(__file__).parents[3] / "shared" / "corpus"


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real checkpoints is not here")
@pytest.mark.parametrize(
    ("name", "key", "epoch", "step"),
    [
        ("mmengine_runner", "ema_state_dict", 1, 2),
        ("timm_checkpoint_saver_ema", "state_dict", 0, None),
        ("pl1_model_checkpoint_swa", "state_dict", 0, 2),
        ("ultralytics_trainer_save", "ema", 0, None),
        ("hf_trainer_checkpoint", "", 1, 2),
        ("timm_ema_v2_state_dict", "model", None, None),
    ],
)
def test_files_that_frameworks_wrote(monkeypatch, name, key, epoch, step):
    monkeypatch.syspath_prepend(str(CORPUS))
    import corpus_models

    cases = {case["name"]: case for case in json.loads((CORPUS / "manifest.json").read_text())["cases"]}
    model = corpus_models.build(cases[name]["target"])
    report = smart_resume(model, CORPUS / cases[name]["path"])
    assert report.load.key.split(".")[0] == key
    assert (report.epoch, report.step) == (epoch, step)


# --- folders of torch.distributed.checkpoint ---


def folder_state(run: Run, *, flat: bool) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as helpers

    options = helpers.StateDictOptions(flatten_optimizer_state_dict=flat)
    run.optimizer.zero_grad()  # torch 2.4 takes an optimizer that keeps no state for one that hasn't begun
    return {
        "model": helpers.get_model_state_dict(run.model),
        "optimizer": helpers.get_optimizer_state_dict(run.model, run.optimizer, options=options),
        "lr_scheduler": run.scheduler.state_dict(),
        "train_state": {"step": STOP},
    }


@pytest.mark.parametrize("optimizer", ["SGD momentum", "AdamW amsgrad", "Adagrad", "SGD"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])  # flat is torchtitan's way
def test_training_goes_on_from_a_folder_of_distributed_checkpoint(tmp_path, optimizer, flat):
    run = Run(optimizer)
    run.train(0, STOP)
    save_folder(folder_state(run, flat=flat), checkpoint_id=tmp_path / "step-4")
    straight = run.train(STOP, STEPS)
    again = Run(optimizer, seed=1)
    report = smart_resume(again.model, tmp_path / "step-4", again.optimizer, again.scheduler)
    assert again.train(STOP, STEPS) == straight
    assert report.step == STOP


def test_a_flat_state_is_matched_by_name_through_wrappers(tmp_path):
    run = Run("AdamW amsgrad")
    run.train(0, STOP)
    save_folder(folder_state(run, flat=True), checkpoint_id=tmp_path / "x")
    straight = run.train(STOP, STEPS)
    again = Run("AdamW amsgrad", seed=1)
    smart_resume(nn.DataParallel(again.model), tmp_path / "x", again.optimizer, again.scheduler)
    assert again.train(STOP, STEPS) == straight


def test_a_flat_state_that_does_not_fit_is_refused(tmp_path):
    run = Run("AdamW amsgrad")
    run.train(0, STOP)
    save_folder(folder_state(run, flat=True), checkpoint_id=tmp_path / "x")
    before = run.everything()
    for parameters, complaint in (
        (run.model.parameters(), "other settings in the file"),
        (run.model[0].parameters(), "parameters that this optimizer lacks"),
        ([*run.model.parameters(), nn.Parameter(torch.zeros(2))], "has no settings for"),
    ):
        with pytest.raises(errors.IncompatibleCheckpointError, match=complaint):
            smart_resume(run.model, tmp_path / "x", torch.optim.AdamW(parameters, amsgrad=True))
    assert_same_run(run, before)
