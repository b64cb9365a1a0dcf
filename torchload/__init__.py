"""Load any PyTorch checkpoint into any model with one line: safely, verified, at the speed of the machine.

    from torchload import smart_load

    report = smart_load(model, "model.pth", "cuda:0")

Names are imported when they are first used, so that a program which may never load anything pays nothing.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from torchload import errors
    from torchload.companions.contents import CheckpointInfo, ContainerInfo, TensorInfo, inspect_checkpoint
    from torchload.companions.reading import read_state_dict
    from torchload.companions.resume_report import ResumeReport
    from torchload.companions.resuming import smart_resume
    from torchload.companions.saving import SaveReport, smart_save
    from torchload.companions.verification import VerifyReport, verify_weights
    from torchload.comparison import Difference
    from torchload.loading import smart_load
    from torchload.model.placement import best_device
    from torchload.report import LoadReport

__version__ = "0.1.0"

__all__ = [
    "CheckpointInfo",
    "ContainerInfo",
    "Difference",
    "LoadReport",
    "ResumeReport",
    "SaveReport",
    "TensorInfo",
    "VerifyReport",
    "__version__",
    "best_device",
    "errors",
    "inspect_checkpoint",
    "read_state_dict",
    "smart_load",
    "smart_resume",
    "smart_save",
    "verify_weights",
]

_HOME = {
    "CheckpointInfo": "companions.contents",
    "ContainerInfo": "companions.contents",
    "Difference": "comparison",
    "LoadReport": "report",
    "ResumeReport": "companions.resume_report",
    "SaveReport": "companions.saving",
    "TensorInfo": "companions.contents",
    "VerifyReport": "companions.verification",
    "best_device": "model.placement",
    "inspect_checkpoint": "companions.contents",
    "read_state_dict": "companions.reading",
    "smart_load": "loading",
    "smart_resume": "companions.resuming",
    "smart_save": "companions.saving",
    "verify_weights": "companions.verification",
}


def __getattr__(name: str) -> _typing.Any:
    if name == "errors":
        return _importlib.import_module("torchload.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'torchload' has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"torchload.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
