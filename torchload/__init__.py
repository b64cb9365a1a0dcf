"""Load any PyTorch checkpoint into any model with one line: safely, verified, at the speed of the machine.

from torchload import smart_load

report = smart_load(model, "model.pth", "cuda:0")
"""

from torchload import errors
from torchload.api import smart_load
from torchload.placement import best_device
from torchload.report import LoadReport

__all__ = ["LoadReport", "__version__", "best_device", "errors", "smart_load"]

__version__ = "0.1.0"
