"""The contestants: each the recipe that its own documentation gives, in one small function.

A function does the whole load of a `Job` and returns when the model is ready to use. It is called in a fresh process
that has already imported the arm's modules and built the model. Imports inside the functions keep absent peers absent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.cases import Case

__all__ = ["ALWAYS", "ARMS", "Arm", "Job", "applicable"]


@dataclass(frozen=True, slots=True)
class Job:
    """One load.

    Attributes:
        model: Where the weights go.
        path: The file.
        device: Where the weights must be afterwards.
        case: What is measured.
    """

    model: nn.Module
    path: str
    device: torch.device
    case: Case


@dataclass(frozen=True, slots=True)
class Arm:
    """One contestant.

    Attributes:
        name: As in the tables.
        run: The load.
        distribution: The package that must be installed.
        modules: What to import before the clock starts.
        formats: The case formats it takes part in.
        into: The kinds of model it can fill: ``"existing"``, ``"meta"``.
        devices: ``"cpu"``, ``"cuda"``.
        variant: The only file layout it reads, where that is its own.
        mapped: Whether the weights on the CPU may stay views of the file: nothing is copied, nothing is read before it
            is used, and what changes the file changes the model.
        big_only: Whether it is of interest where bytes are the cost, and nowhere else.
    """

    name: str
    run: Callable[[Job], None]
    distribution: str
    modules: tuple[str, ...]
    formats: tuple[str, ...]
    into: tuple[str, ...]
    devices: tuple[str, ...]
    variant: str | None
    mapped: bool
    big_only: bool


ARMS: dict[str, Arm] = {}

ALWAYS = ("torchload", "torch")  # measured whatever peers are asked for
FEW = (*ALWAYS, "safetensors")

BOTH = ("pth", "safetensors")


def arm(
    name: str,
    distribution: str,
    *modules: str,
    formats: tuple[str, ...] = BOTH,
    into: tuple[str, ...] = ("existing", "meta"),
    devices: tuple[str, ...] = ("cpu", "cuda"),
    variant: str | None = None,
    mapped: bool = False,
    big_only: bool = False,
) -> Callable[[Callable[[Job], None]], Callable[[Job], None]]:
    """Enter a function into the table."""

    def enter(run: Callable[[Job], None]) -> Callable[[Job], None]:
        ARMS[name] = Arm(name, run, distribution, modules, formats, into, devices, variant, mapped, big_only)
        return run

    return enter


def applicable(candidate: Arm, case: Case, device: str) -> bool:
    """Whether the arm can do the case at all."""
    if (case.few_peers and candidate.distribution not in FEW) or (candidate.big_only and not case.ceilings):
        return False
    return case.file_format in candidate.formats and case.into in candidate.into and device in candidate.devices


# ----------------------------------------------------------------------------------------------------------- torchload


@arm("torchload", "torchload", "torchload.api.load")
def torchload_smart_load(job: Job) -> None:
    from torchload import smart_load

    smart_load(job.model, job.path, job.device)


@arm("torchload mmap", "torchload", "torchload.api.load", into=("meta",), devices=("cpu",), mapped=True)
def torchload_mapped(job: Job) -> None:
    from torchload import smart_load

    smart_load(job.model, job.path, job.device, mmap=True)


@arm("torchload verify", "torchload", "torchload.api.load", big_only=True)
def torchload_verify(job: Job) -> None:
    from torchload import smart_load

    smart_load(job.model, job.path, job.device, verify=True)


# --------------------------------------------------------------------------------------------------------------- torch


@arm("torch.load + load_state_dict", "torch", formats=("pth",), into=("existing",))
def torch_load(job: Job) -> None:
    state = torch.load(job.path, map_location=job.device, weights_only=True)
    job.model.load_state_dict(state)


@arm("torch.load(mmap) + load_state_dict", "torch", formats=("pth",), into=("existing",))
def torch_mmap(job: Job) -> None:
    state = torch.load(job.path, map_location="cpu", mmap=True, weights_only=True)
    job.model.load_state_dict(state)


@arm("torch.load + assign", "torch", formats=("pth",), into=("meta",))
def torch_assign(job: Job) -> None:
    state = torch.load(job.path, map_location=job.device, weights_only=True)
    job.model.load_state_dict(state, assign=True)


@arm("torch.load(mmap) + assign", "torch", formats=("pth",), into=("meta",), devices=("cpu",), mapped=True)
def torch_mmap_assign(job: Job) -> None:
    state = torch.load(job.path, map_location="cpu", mmap=True, weights_only=True)
    job.model.load_state_dict(state, assign=True)


# --------------------------------------------------------------------------------------------------------- safetensors


@arm(
    "safetensors load_file + load_state_dict",
    "safetensors",
    "safetensors.torch",
    formats=("safetensors",),
    into=("existing",),
)
def safetensors_load_file(job: Job) -> None:
    from safetensors.torch import load_file

    job.model.load_state_dict(load_file(job.path, device=str(job.device)))


@arm("safetensors load_model", "safetensors", "safetensors.torch", formats=("safetensors",), into=("existing",))
def safetensors_load_model(job: Job) -> None:
    from safetensors.torch import load_model

    load_model(job.model, job.path, device=str(job.device))


@arm("safetensors safe_open + copy_", "safetensors", "safetensors.torch", formats=("safetensors",), into=("existing",))
def safetensors_loop(job: Job) -> None:
    from safetensors import safe_open

    places = job.model.state_dict()
    with safe_open(job.path, framework="pt", device=str(job.device)) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            places[name].copy_(file.get_tensor(name))


# On the CPU its tensors are copies in some releases and views of the file in others: `mapped` says what it may be.
@arm(
    "safetensors load_file + assign",
    "safetensors",
    "safetensors.torch",
    formats=("safetensors",),
    into=("meta",),
    mapped=True,
)
def safetensors_assign(job: Job) -> None:
    from safetensors.torch import load_file

    job.model.load_state_dict(load_file(job.path, device=str(job.device)), assign=True)


# ---------------------------------------------------------------------------------------------------------- frameworks


# Imported by accelerate at its first load, half a second that says nothing about loading.
ACCELERATE = ("accelerate", "torch.distributed.checkpoint.state_dict")


@arm("accelerate load_checkpoint_in_model", "accelerate", *ACCELERATE)
def accelerate_in_model(job: Job) -> None:
    from accelerate import load_checkpoint_in_model

    load_checkpoint_in_model(job.model, job.path, device_map={"": str(job.device)} if job.case.into == "meta" else None)


@arm("accelerate load_checkpoint_and_dispatch", "accelerate", *ACCELERATE, into=("meta",))
def accelerate_dispatch(job: Job) -> None:
    from accelerate import load_checkpoint_and_dispatch

    load_checkpoint_and_dispatch(job.model, job.path, device_map={"": str(job.device)})


@arm("timm load_checkpoint", "timm", "timm.models", into=("existing",), devices=("cpu",))
def timm_load(job: Job) -> None:
    from timm.models import load_checkpoint

    load_checkpoint(job.model, job.path)


@arm("mmengine load_checkpoint", "mmengine", "mmengine.runner", formats=("pth",), into=("existing",))
def mmengine_load(job: Job) -> None:
    from mmengine.runner import load_checkpoint

    load_checkpoint(job.model, job.path, map_location=str(job.device), strict=True)


@arm(
    "fvcore Checkpointer",
    "fvcore",
    "fvcore.common.checkpoint",
    formats=("pth",),
    into=("existing",),
    variant="fvcore.pth",
)
def fvcore_load(job: Job) -> None:
    from fvcore.common.checkpoint import Checkpointer

    Checkpointer(job.model).load(job.path)


# -------------------------------------------------------------------------------------------------- specialised readers


@arm("fastsafetensors + copy_", "fastsafetensors", "fastsafetensors", formats=("safetensors",), into=("existing",))
def fastsafetensors_copy(job: Job) -> None:
    from fastsafetensors import fastsafe_open

    places = job.model.state_dict()
    with fastsafe_open(job.path, device=str(job.device), nogds=True) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            places[name].copy_(file.get_tensor(name))


@arm("fastsafetensors + assign", "fastsafetensors", "fastsafetensors", formats=("safetensors",), into=("meta",))
def fastsafetensors_assign(job: Job) -> None:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(job.path, device=str(job.device), nogds=True) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        job.model.load_state_dict(state, assign=True)


@arm(
    "runai streamer + copy_",
    "runai-model-streamer",
    "runai_model_streamer",
    formats=("safetensors",),
    into=("existing",),
)
def runai_copy(job: Job) -> None:
    from runai_model_streamer import SafetensorsStreamer

    places = job.model.state_dict()
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(job.path)
        for name, tensor in streamer.get_tensors():
            places[name].copy_(tensor)


@arm(
    "runai streamer + assign", "runai-model-streamer", "runai_model_streamer", formats=("safetensors",), into=("meta",)
)
def runai_assign(job: Job) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(job.path)
        # The streamer reuses its buffers, so that what is kept must be copied.
        state = {name: tensor.to(job.device, copy=True) for name, tensor in streamer.get_tensors()}
    job.model.load_state_dict(state, assign=True)


@arm(
    "instanttensor + copy_",
    "instanttensor",
    "instanttensor",
    formats=("safetensors",),
    into=("existing",),
    devices=("cuda",),
)
def instanttensor_copy(job: Job) -> None:
    from instanttensor import safe_open

    places = job.model.state_dict()
    with safe_open([job.path], framework="pt", device=job.device.index or 0) as file:
        for name, tensor in file.tensors():
            places[name].copy_(tensor)


@arm(
    "instanttensor + assign",
    "instanttensor",
    "instanttensor",
    formats=("safetensors",),
    into=("meta",),
    devices=("cuda",),
)
def instanttensor_assign(job: Job) -> None:
    from instanttensor import safe_open

    with safe_open([job.path], framework="pt", device=job.device.index or 0) as file:
        job.model.load_state_dict({name: tensor.clone() for name, tensor in file.tensors()}, assign=True)


@arm(
    "flashpack assign_from_file (own format)",
    "flashpack",
    "flashpack",
    formats=("safetensors",),
    into=("meta",),
    variant="flashpack",
    mapped=True,
)
def flashpack_assign(job: Job) -> None:
    from flashpack import assign_from_file

    assign_from_file(job.model, job.path, device=job.device)
