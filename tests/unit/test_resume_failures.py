"""Wherever smart_resume fails, model, optimizer, scheduler, scaler and average are as they were, and train on so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from tests.law import assert_equal_bits, same_bits, snapshot
from torchload import errors, smart_resume

STOP = 3


class Failure(Exception):
    """Stands for whatever a user's code raises."""


class Model(nn.Sequential):
    """Every kind of module that has a say in its loading, and one that an interrupt can reach."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), Doubling(5, 5), Extra(5, 2))


class Doubling(nn.Linear):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *args)


class Extra(nn.Linear):
    seen = 0

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class Scheduler(lr_scheduler.StepLR):
    """Fails when half of its state is in it, if told to."""

    fails: ClassVar[list[BaseException]] = []

    def load_state_dict(self, state):
        self.last_epoch = state["last_epoch"]
        self.base_lrs[0] = -1.0
        if self.fails:
            raise self.fails[0]
        super().load_state_dict(state)


class Optimizer(torch.optim.AdamW):
    fails: BaseException | None = None

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.fails:
            raise self.fails


class Run:
    """A training run with everything that one can have."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Model()
        self.optimizer = Optimizer(self.model.parameters(), 0.01, amsgrad=True)
        self.scheduler = Scheduler(self.optimizer, 2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (8 + seed))
        self.ema = AveragedModel(self.model, use_buffers=True)
        self.train(0, STOP)
        self.model[3].seen = seed

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            loss = self.model(inputs).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.ema.update_parameters(self.model)
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "epoch": 1,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def resume(self, path: Any, **options: Any) -> Any:
        return smart_resume(
            self.model, path, self.optimizer, self.scheduler, scaler=self.scaler, ema=self.ema, **options
        )

    def everything(self) -> Any:
        return copy.deepcopy(
            {
                "model": snapshot(self.model),
                "ema": snapshot(self.ema),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
        )

    def objects(self) -> list[Any]:
        """What must stay the same objects in the same memory."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.ema.parameters(), *self.ema.buffers()]
        groups = self.optimizer.param_groups
        return [
            *((id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in tensors),
            *(id(parameter) for group in groups for parameter in group["params"]),
            id(self.scheduler.optimizer),
        ]


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return copy.deepcopy(Run(1).state())


def assert_as_it_was(run: Run, before: Any, objects: Any, seed: int = 2) -> None:
    now = run.everything()
    assert_equal_bits(now["model"], before["model"])
    assert_equal_bits(now["ema"], before["ema"])
    assert now["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    assert now["optimizer"]["state"].keys() == before["optimizer"]["state"].keys()
    for key, values in now["optimizer"]["state"].items():
        assert same_bits(list(values.values()), list(before["optimizer"]["state"][key].values()))
    assert (now["scheduler"], now["scaler"]) == (before["scheduler"], before["scaler"])
    assert run.objects() == objects
    run.optimizer.fails = None
    run.scheduler.fails.clear()
    assert run.train(STOP, STOP + 3) == Run(seed).train(STOP, STOP + 3)


# --- what the file has ---


def huge_weight(state: Any) -> None:
    state["model"]["3.bias"] = torch.full((2,), 1e30)


def huge_average(state: Any) -> None:
    state["ema"]["module.3.bias"] = torch.full((2,), 1e30)


def huge_moment(state: Any) -> None:
    state["optimizer"]["state"][6]["exp_avg"] = torch.full((2, 5), 1e30)


def no_lr(state: Any) -> None:
    del state["optimizer"]["param_groups"][0]["lr"]


def moment_missing(state: Any) -> None:
    del state["optimizer"]["state"][6]["exp_avg_sq"]


def state_of_one_missing(state: Any) -> None:
    state["optimizer"]["param_groups"][0]["params"].pop()


def moments_of_another_shape(state: Any) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def no_epoch_in_the_scheduler(state: Any) -> None:
    del state["lr_scheduler"]["last_epoch"]


def scheduler_of_no_use(state: Any) -> None:
    state["lr_scheduler"] = {"x": 1}


def no_scale(state: Any) -> None:
    state["scaler"] = {"growth_factor": 2.0}


def no_scaler(state: Any) -> None:
    del state["scaler"]


def missing_key(state: Any) -> None:
    del state["model"]["1.running_mean"]


def missing_average(state: Any) -> None:
    del state["ema"]["module.0.bias"]


def extra_state_of_another_kind(state: Any) -> None:
    state["model"]["3._extra_state"] = {"other": 1}


def own_loader_refuses(state: Any) -> None:
    del state["model"]["2.bias"]


SPOILED: dict[Callable[[Any], None], tuple[type[Exception], Any]] = {
    huge_weight: (errors.CastOverflowError, {"dtype": torch.float16}),
    huge_average: (errors.CastOverflowError, {"dtype": torch.float16}),
    huge_moment: (errors.CastOverflowError, {"dtype": torch.float16}),
    no_lr: (errors.IncompatibleCheckpointError, {}),
    moment_missing: (errors.IncompatibleCheckpointError, {}),
    state_of_one_missing: (errors.IncompatibleCheckpointError, {}),
    moments_of_another_shape: (errors.IncompatibleCheckpointError, {}),
    no_epoch_in_the_scheduler: (errors.IncompatibleCheckpointError, {}),
    scheduler_of_no_use: (errors.IncompatibleCheckpointError, {}),
    no_scale: (errors.IncompatibleCheckpointError, {}),
    no_scaler: (errors.IncompatibleCheckpointError, {}),
    missing_key: (errors.IncompatibleCheckpointError, {}),
    missing_average: (errors.IncompatibleCheckpointError, {}),
    extra_state_of_another_kind: (errors.IncompatibleCheckpointError, {}),
    own_loader_refuses: (errors.IncompatibleCheckpointError, {}),
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_file_that_does_not_fit(tmp_path, state, spoil):
    state = copy.deepcopy(state)
    spoil(state)
    torch.save(state, tmp_path / "x.pth")
    run = Run(2)
    before, objects = run.everything(), run.objects()
    kind, options = SPOILED[spoil]
    with pytest.raises(kind):
        run.resume(tmp_path / "x.pth", **options)
    assert_as_it_was(run, before, objects)


@pytest.fixture(autouse=True)
def _no_failure():
    yield
    Scheduler.fails.clear()


@pytest.mark.parametrize("part", ["model", "optimizer", "ema"])
def test_damaged_data(tmp_path, state, part):
    torch.save(state, tmp_path / "x.pth")
    values = (
        state["optimizer"]["state"][0]["exp_avg"]
        if part == "optimizer"
        else next(value for name, value in state[part].items() if name.endswith("0.weight"))
    )
    data = bytearray((tmp_path / "x.pth").read_bytes())
    place = data.find(values.numpy().tobytes())
    assert place > 0
    data[place + 5] ^= 4
    (tmp_path / "x.pth").write_bytes(data)
    run = Run(2)
    before, objects = run.everything(), run.objects()
    with pytest.raises(errors.CorruptCheckpointError):
        run.resume(tmp_path / "x.pth", verify=True)
    assert_as_it_was(run, before, objects)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_half_a_file(tmp_path, state, share):
    torch.save(state, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: int(len(data) * share)])
    run = Run(2)
    before, objects = run.everything(), run.objects()
    with pytest.raises(errors.TorchLoadError):
        run.resume(tmp_path / "x.pth")
    assert_as_it_was(run, before, objects)


# --- what the receivers do ---


def post_hook_of_the_model(run: Run, error: BaseException) -> None:
    def hook(*_: object) -> None:
        raise error

    run.model[0].register_load_state_dict_post_hook(hook)


def post_hook_of_the_average(run: Run, error: BaseException) -> None:
    def hook(*_: object) -> None:
        raise error

    run.ema.register_load_state_dict_post_hook(hook)


def optimizer(run: Run, error: BaseException) -> None:
    run.optimizer.fails = error


def hook_of_the_optimizer(run: Run, error: BaseException) -> None:
    def hook(*_: object) -> None:
        raise error

    run.optimizer.register_load_state_dict_post_hook(hook)


def scheduler(run: Run, error: BaseException) -> None:
    run.scheduler.fails.append(error)


def scaler(run: Run, error: BaseException) -> None:
    class Scaler(torch.amp.GradScaler):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            raise error

    run.scaler.__class__ = Scaler


RECEIVERS = [post_hook_of_the_model, post_hook_of_the_average, optimizer, hook_of_the_optimizer, scheduler, scaler]


@pytest.mark.parametrize("error", [Failure("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("fails", RECEIVERS, ids=lambda fails: fails.__name__)
def test_a_receiver_that_fails(tmp_path, state, fails, error):
    torch.save(state, tmp_path / "x.pth")
    run = Run(2)
    fails(run, error)
    before, objects = run.everything(), run.objects()
    with pytest.raises((type(error), errors.IncompatibleCheckpointError)):
        run.resume(tmp_path / "x.pth")
    assert_as_it_was(run, before, objects)


def test_random_numbers_go_on_where_they_were(tmp_path, state):
    torch.save({**state, "torch_rng_state": torch.get_rng_state()}, tmp_path / "x.pth")
    run = Run(2)
    scheduler(run, Failure("no"))
    torch.manual_seed(9)
    want = torch.rand(3)
    torch.manual_seed(9)
    with pytest.raises(errors.IncompatibleCheckpointError):
        run.resume(tmp_path / "x.pth")
    assert torch.equal(torch.rand(3), want)


def test_after_a_failure_the_right_file_resumes(tmp_path, state):
    spoiled = copy.deepcopy(state)
    scheduler_of_no_use(spoiled)
    torch.save(spoiled, tmp_path / "bad.pth")
    torch.save(state, tmp_path / "good.pth")
    run, want = Run(2), Run(1)
    with pytest.raises(errors.IncompatibleCheckpointError):
        run.resume(tmp_path / "bad.pth")
    run.resume(tmp_path / "good.pth")
    with torch.no_grad():  # which is doubled on the way
        want.model[2].weight.mul_(2)
        want.ema.module[2].weight.mul_(2)
    assert run.train(STOP, STOP + 3) == want.train(STOP, STOP + 3)
    assert run.model[3].seen == 1
