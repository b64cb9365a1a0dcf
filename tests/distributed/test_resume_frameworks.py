"""Runs that accelerate and transformers' Trainer saved under FSDP, by their own code on two ranks, go on."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.distributed._ranks import on_ranks
from tests.distributed.test_resume_sharded import fsdp2, skip_without_fsdp2
from torchload import errors, inspect_checkpoint, smart_load, smart_resume

STEPS, MORE = 5, 4

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Part:
    """A model with its optimizer and its schedule, whose rate drops twice."""

    def __init__(self, seed: int, shard: Any = lambda model: model) -> None:
        torch.manual_seed(seed)
        self.model = shard(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01 * (seed + 1))
        self.scheduler = lr_scheduler.MultiStepLR(self.optimizer, [3, STEPS + 2])

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            loss = self.model(inputs).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def resume(self, path: Path) -> Any:
        return smart_resume(self.model, path, self.optimizer, self.scheduler)


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def _save(framework: str, version: int, form: str, count: int, rank: int, folder: Path) -> list[list[float]]:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    if framework == "trainer":
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(output_dir=str(folder / "run"), use_cpu=True, report_to=[], disable_tqdm=True)
        trainer = Trainer(model=nn.Linear(2, 2), args=arguments)
        accelerator = trainer.accelerator
    else:
        accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = (
        DistributedType.FSDP
    )  # which it takes on GPUs only; all that follows is its own
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, state_dict_type=form, cpu_ram_efficient_loading=False
    )
    parts = [Part(seed, fsdp1 if version == 1 else fsdp2) for seed in range(count)]
    for part in parts:
        part.train(0, STEPS)
    if framework == "trainer":
        (part,) = parts
        trainer.is_fsdp_enabled = True
        trainer.model = trainer.model_wrapped = part.model
        trainer.optimizer, trainer.lr_scheduler = part.optimizer, part.scheduler
        trainer.state.global_step, trainer.state.epoch = STEPS, 1.0
        trainer._save_checkpoint(part.model, None)
    else:
        accelerator._models = [part.model for part in parts]
        accelerator._optimizers = [part.optimizer for part in parts]
        accelerator._schedulers = [part.scheduler for part in parts]
        accelerator.save_state(str(folder / "run" / f"checkpoint-{STEPS}"))
    return [part.train(STEPS, STEPS + MORE) for part in parts]


def saved(folder: Path, framework: str, version: int, form: str, count: int = 1) -> tuple[Path, list[list[float]]]:
    """The folder that two ranks wrote, and what training went on with there."""
    pytest.importorskip("accelerate")
    if framework == "trainer":
        pytest.importorskip("transformers")
    skip_without_fsdp2()
    losses, _ = on_ranks(partial(_save, framework, version, form, count), folder)
    return folder / "run" / f"checkpoint-{STEPS}", losses


def _go_on(path: Path, rank: int, folder: Path) -> list[float]:
    part = Part(7, fsdp2)
    part.resume(path)
    return part.train(STEPS, STEPS + MORE)


@pytest.mark.parametrize("framework", ["accelerate", "trainer"])
@pytest.mark.parametrize(
    ("version", "form"),
    [(1, "SHARDED_STATE_DICT"), (2, "SHARDED_STATE_DICT"), (2, "FULL_STATE_DICT")],  # the first can't gather on the CPU
)
def test_a_run_goes_on(tmp_path, framework, version, form):
    path, (want,) = saved(tmp_path, framework, version, form)
    names = {file.name for file in path.iterdir()}
    sharded = {"pytorch_model_fsdp_0", "optimizer_0"}
    assert sharded <= names if form == "SHARDED_STATE_DICT" else "pytorch_model_fsdp.bin" in names
    (tmp_path / "again").mkdir()
    for losses in on_ranks(partial(_go_on, path), tmp_path / "again"):
        assert losses == pytest.approx(want, rel=1e-6)
    part = Part(7)
    report = part.resume(path)
    if framework == "trainer":
        assert (report.step, report.epoch) == (STEPS, 1)
    assert [phrase.split()[0] for phrase in report.restored] == ["AdamW", "MultiStepLR", "random"]
    assert part.train(STEPS, STEPS + MORE) == pytest.approx(want, rel=1e-6)
    inspect_checkpoint(path)
    assert smart_load(Part(8).model, path).tensors == 4
    weights = next(file for file in path.iterdir() if file.name.startswith("pytorch_model_fsdp"))
    part = Part(7)
    part.resume(weights)  # the path of the model says the same
    assert part.train(STEPS, STEPS + MORE) == pytest.approx(want, rel=1e-6)


def test_the_local_state_of_the_first_fsdp_is_named(tmp_path):
    path, _ = saved(tmp_path, "accelerate", 1, "LOCAL_STATE_DICT")
    with pytest.raises(errors.AmbiguousCheckpointError, match=r"FSDP's local \(flat\) state, gather the model"):
        Part(7).resume(path)


@pytest.mark.parametrize("form", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_each_of_several_models_goes_on_with_what_is_its_own(tmp_path, form):
    path, losses = saved(tmp_path, "accelerate", 2, form, count=2)
    with pytest.raises(errors.AmbiguousCheckpointError) as caught:
        Part(7).resume(path)
    assert len(caught.value.candidates) == 2
    for weights, want in zip(sorted(caught.value.candidates, key=len), losses):
        part = Part(7)
        report = part.resume(Path(weights))
        assert report.load.tensors == 4
        assert part.train(STEPS, STEPS + MORE) == pytest.approx(want, rel=1e-6)
