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
    from torchload.placement import best_device
    from torchload.report import LoadReport

__version__ = "0.1.0"

__all__ = ["LoadReport", "__version__", "best_device", "errors", "smart_load"]

_HOME = {
    "LoadReport": "report",
    "best_device": "placement",
    "smart_load": "api",
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
