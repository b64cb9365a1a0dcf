"""Load any PyTorch checkpoint into any model with one line: safely, verified, at the speed of the machine.

    from torchload import smart_load

    report = smart_load(model, "model.pth", "cuda:0")

Names are imported when they are first used, so that a program which may never load anything pays nothing.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from torchload import errors
    from torchload.api import smart_load
    from torchload.comparison import Difference
    from torchload.contents import CheckpointInfo, ContainerInfo, TensorInfo, inspect_checkpoint
    from torchload.placement import best_device
    from torchload.reading import read_state_dict
    from torchload.report import LoadReport
    from torchload.resuming import ResumeReport, smart_resume
    from torchload.saving import SaveReport, smart_save
    from torchload.verification import VerifyReport, verify_weights

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
    "CheckpointInfo": "contents",
    "ContainerInfo": "contents",
    "Difference": "comparison",
    "LoadReport": "report",
    "ResumeReport": "resuming",
    "SaveReport": "saving",
    "TensorInfo": "contents",
    "VerifyReport": "verification",
    "best_device": "placement",
    "inspect_checkpoint": "contents",
    "read_state_dict": "reading",
    "smart_load": "api",
    "smart_resume": "resuming",
    "smart_save": "saving",
    "verify_weights": "verification",
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
