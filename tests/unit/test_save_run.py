"""smart_save of a whole training run: what smart_resume goes on from, and what plain torch reads."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.law import assert_equal_bits, snapshot
from tests.unit.test_resume import OPTIMIZERS, SCHEDULERS, STEPS, STOP, TAKES_NAMES, Run, assert_same_run, new_model
from torchload import errors, read_state_dict, smart_load, smart_resume, smart_save, verify_weights

NAMES = ["last.pth", "last"]  # a file, and a folder of torch.distributed.checkpoint


def save(run: Run, path: Path, **more: Any) -> Any:
    return smart_save(
        run.model, path, optimizer=run.optimizer, scheduler=run.scheduler, ema=run.ema, extra={"epoch": 3}, **more
    )


def stopped_run(*kinds: str) -> Run:
    run = Run(*kinds)
    run.train(0, STOP)
    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_with_any_optimizer(tmp_path, optimizer, name):
    if optimizer == "AdamW named" and not TAKES_NAMES:
        pytest.skip("optimizers of this torch don't take names")
    straight = Run(optimizer)
    losses = straight.train(0, STEPS)
    save(stopped_run(optimizer), tmp_path / name)
    second = Run(optimizer, seed=1)
    report = smart_resume(
        second.model, tmp_path / name, second.optimizer, second.scheduler, ema=second.ema, verify=name == "last.pth"
    )
    assert report.epoch == 3
    assert second.train(STOP, STEPS) == losses[STOP:]
    assert_equal_bits(snapshot(second.ema), snapshot(straight.ema))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR of torch 2.4
def test_training_goes_on_bit_for_bit_with_any_scheduler(tmp_path, scheduler, name):
    losses = Run("SGD momentum", scheduler).train(0, STEPS)
    save(stopped_run("SGD momentum", scheduler), tmp_path / name)
    second = Run("SGD momentum", scheduler, seed=1)
    smart_resume(second.model, tmp_path / name, second.optimizer, second.scheduler)
    assert second.train(STOP, STEPS) == losses[STOP:]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
def test_plain_torch_goes_on_from_the_file(tmp_path, scheduler):
    losses = Run("Adam", scheduler).train(0, STEPS)
    save(stopped_run("Adam", scheduler), tmp_path / "last.pth")
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    second = Run("Adam", scheduler, seed=1)
    second.model.load_state_dict(saved["state_dict"])
    second.optimizer.load_state_dict(saved["optimizer_state_dict"])
    second.scheduler.load_state_dict(saved["scheduler_state_dict"])
    second.ema.load_state_dict(saved["ema_state_dict"])
    assert saved["epoch"] == 3
    assert second.train(STOP, STEPS) == losses[STOP:]


def test_wrappers_are_stripped_from_every_part(tmp_path):
    model = new_model()
    wrapped = torch.compile(nn.DataParallel(model))
    optimizer = torch.optim.Adam(wrapped.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    smart_save(wrapped, tmp_path / "last.pth", optimizer=optimizer, ema=AveragedModel(nn.DataParallel(model)))
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    assert list(saved["state_dict"]) == list(model.state_dict())
    assert list(saved["ema_state_dict"]) == ["n_averaged", *(f"module.{name}" for name in model.state_dict())]
    names = [name for name, _ in model.named_parameters()]
    assert saved["optimizer_state_dict"]["param_groups"][0]["param_names"] == names
    assert list(optimizer.param_groups[0]) == list(torch.optim.Adam(model.parameters()).param_groups[0])  # unchanged
    other = new_model(1)
    turned = torch.optim.Adam([*other.parameters()][::-1])  # names find what positions would exchange
    smart_resume(other, tmp_path / "last.pth", turned)
    for (name, parameter), old in zip(other.named_parameters(), model.parameters()):
        assert torch.equal(turned.state[parameter]["exp_avg"], optimizer.state[old]["exp_avg"]), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [list, dict])
def test_several_optimizers_and_schedulers(tmp_path, name, kind):
    def build(seed: int) -> tuple[nn.Module, Any, Any]:
        model = new_model(seed)
        optimizers = [torch.optim.Adam(model[0].parameters()), torch.optim.Adam(model[3].parameters(), 0.5)]
        schedulers = [torch.optim.lr_scheduler.MultiStepLR(each, [1, 3]) for each in optimizers]
        if kind is dict:
            return model, dict(zip("ab", optimizers)), dict(zip("ab", schedulers))
        return model, optimizers, schedulers

    def each(several: Any) -> list[Any]:
        return list(several.values()) if kind is dict else several

    model, optimizers, schedulers = build(0)
    model(torch.randn(4, 6)).sum().backward()
    for one in [*each(optimizers), *each(schedulers)]:
        one.step()
    smart_save(model, tmp_path / name, optimizer=optimizers, scheduler=schedulers)
    other, new_optimizers, new_schedulers = build(1)
    smart_resume(other, tmp_path / name, new_optimizers, new_schedulers)
    for new, old in zip(each(new_optimizers), each(optimizers)):
        for mine, theirs in zip(new.param_groups[0]["params"], old.param_groups[0]["params"]):
            assert torch.equal(new.state[mine]["exp_avg"], old.state[theirs]["exp_avg"])
        assert new.param_groups[0]["lr"] == old.param_groups[0]["lr"]
    for new, old in zip(each(new_schedulers), each(schedulers)):
        assert new.state_dict() == old.state_dict()
        assert type(new.milestones) is Counter


def test_objects_that_keep_an_average(tmp_path):
    class ModelEMA:  # as ultralytics has it
        def __init__(self, model):
            self.ema = model
            self.updates = 7

    class Shadow:  # as torch_ema has it: parameters by position
        def __init__(self, parameters):
            self.shadow = [parameter.detach().clone() for parameter in parameters]

        def state_dict(self):
            return {"decay": 0.5, "shadow_params": self.shadow}

        def load_state_dict(self, state):
            self.shadow = state["shadow_params"]

    model, average = new_model(), new_model(1)
    smart_save(model, tmp_path / "one.pth", ema=ModelEMA(average))
    new = ModelEMA(new_model(2))
    new.updates = 0
    smart_resume(new_model(3), tmp_path / "one.pth", ema=new)
    assert_equal_bits(snapshot(new.ema), snapshot(average))
    assert new.updates == 7
    smart_save(model, tmp_path / "two.pth", ema=Shadow(average.parameters()))
    shadow = Shadow(new_model(2).parameters())
    smart_resume(new_model(3), tmp_path / "two.pth", ema=shadow)
    assert all(map(torch.equal, shadow.shadow, average.parameters()))


def test_extra_is_any_plain_data_and_tensors(tmp_path):
    model = nn.Linear(2, 2)
    extra = {
        "epoch": 3,
        "best": np.float32(0.5),
        "seen": np.int64(7),
        "history": [{"loss": np.float64(0.25)}, (1, None)],
        "torch_rng_state": torch.get_rng_state(),
        "shape": torch.Size([2, 3]),
    }
    smart_save(model, tmp_path / "x.pth", extra=extra, metadata={"licence": "MIT"})
    saved = torch.load(tmp_path / "x.pth", weights_only=True)
    assert (saved["epoch"], saved["best"], saved["seen"], saved["licence"]) == (3, 0.5, 7, "MIT")
    assert saved["history"] == [{"loss": 0.25}, (1, None)]
    number = torch.rand(1)
    smart_resume(model, tmp_path / "x.pth")
    assert torch.rand(1) == number


@pytest.mark.parametrize("name", ["last.pth", "last"])
def test_tensors_beside_the_weights_are_read_by_their_names(tmp_path, name):
    extra = {"anchors": torch.arange(4.0), "stats": {"mean": torch.ones(3)}}
    smart_save(nn.Linear(2, 2), tmp_path / name, extra=extra)
    [anchors] = read_state_dict(tmp_path / name, key="anchors").values()
    assert torch.equal(anchors, extra["anchors"])
    assert torch.equal(read_state_dict(tmp_path / name, key="stats")["mean"], extra["stats"]["mean"])


def test_half_precision_is_for_the_weights_alone(tmp_path):
    run = stopped_run()
    save(run, tmp_path / "last.pth", dtype=torch.float16)
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    assert saved["state_dict"]["0.weight"].dtype is torch.float16
    assert saved["optimizer_state_dict"]["state"][0]["exp_avg"].dtype is torch.float32
    assert torch.equal(saved["ema_state_dict"]["module.0.weight"], run.ema.module[0].weight)


def test_a_scaler_that_is_disabled_has_nothing_to_store(tmp_path):
    smart_save(nn.Linear(1, 1), tmp_path / "x.pth", scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert list(torch.load(tmp_path / "x.pth", weights_only=True)) == ["weight", "bias"]


class Point(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"extra": {"state_dict": 1}}, ValueError, "where the weights go"),
        ({"extra": {"args": [Point(1, 2)]}}, ValueError, r"args\.0 is of type .*Point, which torch\.load"),
        ({"extra": {"words": np.arange(3)}}, ValueError, r"torch\.from_numpy"),
        ({"extra": {3: 1}}, TypeError, "are text, .*, not 3"),
        ({"extra": 3}, TypeError, "dictionaries"),
        ({"extra": {"x": torch.ones(2, device="meta")}}, ValueError, "on the meta device.*: x"),
        ({"optimizer": 3}, TypeError, "optimizer= takes what has a state_dict method, not int"),
        ({"scheduler": [object()]}, TypeError, "scheduler= takes"),
    ],
)
def test_what_can_not_be_stored(tmp_path, arguments, error, words):
    for name in NAMES:
        with pytest.raises(error, match=words):
            smart_save(nn.Linear(1, 1), tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_has_no_room_for_a_run(tmp_path):
    run = stopped_run()
    with pytest.raises(ValueError, match=r"optimizer_state_dict is a dict; .*: save as \.pth"):
        save(run, tmp_path / "last.safetensors")


def test_the_report_names_what_stands_beside(tmp_path):
    report = save(stopped_run(), tmp_path / "last.pth")
    assert report.beside == ("optimizer_state_dict", "scheduler_state_dict", "ema_state_dict", "epoch")
    assert "beside  optimizer_state_dict, scheduler_state_dict, ema_state_dict, epoch" in str(report)


# --- as a whole ---


def test_a_save_changes_nothing(tmp_path):
    run = stopped_run()
    before = run.everything()
    for name in NAMES:
        save(run, tmp_path / name)
    assert_same_run(run, before)


def test_while_another_thread_trains_the_file_agrees_with_its_checksums(tmp_path):
    model, stop = nn.Linear(1500, 1500), threading.Event()

    def train() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with torch.no_grad():
                model.weight.fill_(number)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(10):
            smart_save(model, tmp_path / "last.pth")
            smart_load(nn.Linear(1500, 1500), tmp_path / "last.pth", verify=True)
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(os.name == "nt", reason="permissions as Unix has them")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_permissions_are_kept_on_replacement(tmp_path, mode):
    for name in NAMES:
        smart_save(nn.Linear(1, 1), tmp_path / name)
    (tmp_path / "last.pth").chmod(mode)
    (tmp_path / "last").chmod(0o700)
    for name in NAMES:
        smart_save(nn.Linear(2, 2), tmp_path / name)
    assert stat.S_IMODE((tmp_path / "last.pth").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "last").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["é" * 125 + ".pth", "層" * 83 + ".pth", "x" * 251 + ".pth", "層" * 85])
def test_names_may_be_as_long_as_the_file_system_allows(tmp_path, name):
    model = nn.Linear(2, 2)
    smart_save(model, tmp_path / name)
    assert verify_weights(model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_is_replaced_as_a_whole_and_only_by_its_like(tmp_path):
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    for model in (old, new):
        smart_save(model, tmp_path / "last")
        assert verify_weights(model, tmp_path / "last")
        assert [path.name for path in tmp_path.iterdir()] == ["last"]
    (tmp_path / "last" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds something else \(notes\.txt\)"):
        smart_save(old, tmp_path / "last")
    assert verify_weights(new, tmp_path / "last")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        smart_save(old, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_where_folders_can_not_be_exchanged_they_are_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr("torchload.writing.replacing._exchange", lambda one, other: False)
    for model in (nn.Linear(2, 2), nn.Linear(2, 2)):
        smart_save(model, tmp_path / "last")
        assert verify_weights(model, tmp_path / "last")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.filterwarnings("ignore")  # torch's own: of single processes, and in 2.4 of its own torch.load
def test_torchs_own_reader_reads_the_folder(tmp_path):
    import torch.distributed.checkpoint as dcp

    old = nn.Linear(2, 2)
    smart_save(old, tmp_path / "last")
    state = nn.Linear(2, 2).state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "last")
    assert_equal_bits(state, old.state_dict())


SAVER = """
import sys, torch
from torchload import smart_save
model = torch.nn.Linear(400, 400)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
print("ready", flush=True)
number = 0
while True:
    number += 1
    torch.nn.init.constant_(model.weight, number)
    torch.nn.init.constant_(model.bias, number)
    smart_save(model, sys.argv[1], optimizer=optimizer, extra={"epoch": number})
"""


@pytest.mark.skipif(os.name == "nt", reason="a process is killed as Unix does it")
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment_it_leaves_a_whole_one_and_nothing_for_ever(tmp_path, name):
    path = tmp_path / name
    for attempt in range(4):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE)
        assert saver.stdout is not None
        assert saver.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(attempt).uniform(0, 0.1))
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        model = nn.Linear(400, 400)
        epoch = smart_resume(model, path).epoch
        assert torch.equal(model.weight, torch.full_like(model.weight, epoch))
        assert torch.equal(model.bias, torch.full_like(model.bias, epoch))
    smart_save(nn.Linear(2, 2), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(os.name == "nt", reason="locks as Unix has them")
@pytest.mark.parametrize("name", NAMES)
def test_what_another_process_is_writing_stays(tmp_path, name):
    import fcntl

    held = tmp_path / f".{name}.{'1' * 12}.tmp"
    other = tmp_path / f".{name}.old.tmp"  # somebody else's
    for path in (held, other):
        path.write_text("half")
    with held.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        smart_save(nn.Linear(2, 2), tmp_path / name)
        assert held.exists()
    smart_save(nn.Linear(2, 2), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, other.name])


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_leaves_what_was_there(tmp_path, name, monkeypatch):
    old = nn.Linear(2, 2)
    smart_save(old, tmp_path / name)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torchload.writing.folder._save" if name == "last" else "os.fsync", full)
    with pytest.raises(OSError, match="What was there before is unchanged"):
        smart_save(nn.Linear(2, 2), tmp_path / name)
    monkeypatch.undo()
    assert verify_weights(old, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_overflow_in_a_folder_is_named(tmp_path):
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = 1e9
    with pytest.raises(errors.CastOverflowError) as caught:
        smart_save(model, tmp_path / "last", dtype=torch.float16)
    assert (caught.value.tensor, caught.value.largest) == ("weight", 1e9)
    assert list(tmp_path.iterdir()) == []
    smart_save(model, tmp_path / "last", dtype=torch.float16, keep_fp32=["weight"])
    assert read_state_dict(tmp_path / "last")["bias"].dtype is torch.float16


@pytest.mark.parametrize("name", NAMES)
def test_for_inference_the_average_is_taken_and_for_training_the_raw_weights(tmp_path, name):
    run = stopped_run()
    save(run, tmp_path / name)
    report = smart_load(model := new_model(1), tmp_path / name)
    assert (report.key, report.averaged) == ("ema_state_dict", True)
    assert torch.equal(model[0].weight, run.ema.module[0].weight)
    assert smart_resume(model, tmp_path / name).load.key == "state_dict"
    assert torch.equal(model[0].weight, run.model[0].weight)
