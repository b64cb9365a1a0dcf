"""What the tests of certainty share."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from torchload import LoadReport, smart_load


def loads(model: nn.Module, path: Path, **arguments: Any) -> LoadReport:
    """It loads without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return smart_load(model, path, **arguments)
