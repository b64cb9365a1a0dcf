"""Load any PyTorch checkpoint into any model with one line: safely, verified, at the speed of the machine.

    from torchload import smart_load

    report = smart_load(model, "model.pth", "cuda:0")

Names are imported when they are first used, so that a program which may never load anything pays nothing.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from torchload import errors
    from torchload.api.inspect import CheckpointInfo, ContainerInfo, TensorInfo, inspect_checkpoint
    from torchload.api.load import smart_load
    from torchload.api.read import read_state_dict
    from torchload.api.resume import smart_resume
    from torchload.api.save import smart_save
    from torchload.api.verify import VerifyReport, verify_weights
    from torchload.core.checkpoint import Record
    from torchload.model.placement import best_device
    from torchload.plan.compare import Difference
    from torchload.plan.report import LoadReport
    from torchload.training.report import ResumeReport
    from torchload.writing.report import SaveReport

__version__ = "0.2.0"

__all__ = [
    "CheckpointInfo",
    "ContainerInfo",
    "Difference",
    "LoadReport",
    "Record",
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
    "CheckpointInfo": "api.inspect",
    "ContainerInfo": "api.inspect",
    "Difference": "plan.compare",
    "LoadReport": "plan.report",
    "Record": "core.checkpoint",
    "ResumeReport": "training.report",
    "SaveReport": "writing.report",
    "TensorInfo": "api.inspect",
    "VerifyReport": "api.verify",
    "best_device": "model.placement",
    "inspect_checkpoint": "api.inspect",
    "read_state_dict": "api.read",
    "smart_load": "api.load",
    "smart_resume": "api.resume",
    "smart_save": "api.save",
    "verify_weights": "api.verify",
}

_PEERS = {
    "load": "smart_load(model, path) fills a model, read_state_dict(path) reads the weights alone",
    "load_state_dict": "smart_load(model, path) fills a model, from a file or from a state dict",
    "load_model": "smart_load(model, path) fills a model",
    "save": "smart_save(model, path) writes a model's weights",
}


def __getattr__(name: str) -> _typing.Any:
    if name == "errors":
        return _importlib.import_module("torchload.errors")
    if name in _PEERS:
        raise AttributeError(f"module 'torchload' has no attribute {name!r}: {_PEERS[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'torchload' has no attribute {name!r}")
    from torchload.core.collector import collector_paused

    with collector_paused():  # a tenth of the time: modules are many objects, and no garbage
        value = getattr(_importlib.import_module(f"torchload.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
