"""Checked by mypy, never run: what a caller of the public API sees."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_type

import torchload
from torchload import (
    CheckpointInfo,
    Difference,
    LoadReport,
    SaveReport,
    TensorInfo,
    VerifyReport,
    best_device,
    errors,
    inspect_checkpoint,
    read_state_dict,
    smart_load,
    smart_resume,
    smart_save,
    verify_weights,
)


def one_line(model: nn.Module) -> None:
    assert_type(smart_load(model, "model.pth"), LoadReport)
    assert_type(smart_load(model, Path("model.pth"), "cuda:0"), LoadReport)
    assert_type(smart_load(model, "model.pth", torch.device("cpu"), dtype=torch.float16), LoadReport)


def every_argument(model: nn.Module) -> LoadReport:
    return smart_load(
        model,
        "model.pth",
        {"encoder": "cuda:0", "decoder": 1},
        dtype="auto",
        keep_fp32=["*.norm.*"],
        strict=False,
        key="ema",
        prefix="backbone.",
        rename={r"^gamma$": "weight"},
        skip=("fc.*",),
        verify=True,
        atomic=True,
        mmap=False,
        process_group=torch.distributed.group.WORLD,
        progress=True,
    )


def callables(model: nn.Module) -> None:
    def rename(name: str) -> str | None:
        return None if name.startswith("aux.") else re.sub("gamma", "weight", name)

    def progress(bytes_done: int, bytes_total: int) -> None:
        assert bytes_done <= bytes_total

    smart_load(model, "model.pth", rename=rename, progress=progress)


def report(model: nn.Module) -> None:
    found = smart_load(model, "model.pth", strict=False)
    assert_type(found.missing_keys, list[str])
    assert_type(found.unexpected_keys, list[str])
    assert_type(str(found), str)


def catch(model: nn.Module) -> None:
    try:
        smart_load(model, "model.pth")
    except errors.IncompatibleCheckpointError as error:
        assert_type(error.missing_keys, list[str])
        assert_type(error.mismatched, dict[str, tuple[tuple[int, ...], tuple[int, ...]]])
    except errors.TorchLoadError as error:
        assert_type(error.path, str | None)


def resume(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    found = smart_resume(model, "last.pth", optimizer, scheduler, "cpu", scaler=None, ema=None, strict=False, rng=False)
    assert_type(found.epoch, int | None)
    assert_type(found.step, int | None)
    assert_type(found.load, LoadReport)
    smart_resume(model, "last.pth", [optimizer, optimizer])
    smart_resume(model, "last.pth", {"generator": optimizer})
    smart_save(model, "last.pth", optimizer={"generator": optimizer}, scheduler=[scheduler], extra={"epoch": 3})


def inspect() -> None:
    found = inspect_checkpoint(Path("model.pth"))
    assert_type(found, CheckpointInfo)
    assert_type(found.tensors, tuple[TensorInfo, ...])
    assert_type(found.tensors[0].shape, tuple[int, ...] | None)
    assert_type(found.nbytes, int)


def read() -> None:
    assert_type(read_state_dict("model.pth"), dict[str, torch.Tensor])
    assert_type(
        read_state_dict("model.pth", "cuda:0", dtype=torch.float16, key="ema", mmap=False), dict[str, torch.Tensor]
    )


def verify(model: nn.Module) -> None:
    found = verify_weights(model, "model.pth", key="ema", prefix="backbone.", rename={"^a": "b"}, skip=["fc.*"])
    assert_type(found, VerifyReport)
    assert_type(found.ok, bool)
    assert_type(found.differing, tuple[Difference, ...])


def save(model: nn.Module) -> None:
    found = smart_save(model, Path("model.pth"), dtype=torch.float16, keep_fp32=["*.norm.*"], metadata={"epoch": 1})
    assert_type(found, SaveReport)
    assert_type(found.nbytes, int)


def live(model: nn.Module) -> None:
    smart_load(model, "model.pth", atomic=threading.Lock())
    smart_load(model, "model.pth", atomic=threading.RLock())
    smart_load(model, "model.pth", atomic=contextlib.nullcontext())
    smart_load(model, "model.pth", atomic=threading.Lock)  # type: ignore[arg-type]


def misuse(model: nn.Module) -> None:
    smart_load(model, "model.pth", dtpye=torch.float16)  # type: ignore[call-arg]
    smart_load("model.pth", model)  # type: ignore[arg-type]
    smart_load(model, "model.pth", atomic="yes")  # type: ignore[arg-type]


assert_type(best_device(), torch.device)
assert_type(torchload.__version__, str)


def anything_that_holds_weights(model: nn.Module, source: nn.Module) -> None:
    smart_load(model, source.state_dict())
    smart_load(model, {"epoch": 3, "state_dict": source.state_dict()})
    smart_load(model, ["a.safetensors", Path("b.safetensors")])
    with Path("model.pth").open("rb") as file:
        smart_load(model, file)
    smart_load(model, io.BytesIO())
    smart_load(model, 3)  # type: ignore[arg-type]
    verify_weights(model, None)  # type: ignore[arg-type]
    assert_type(inspect_checkpoint("model.pth").values["args"], object)
