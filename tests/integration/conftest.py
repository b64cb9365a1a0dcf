"""Fixtures of more than one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes its argument to a file, and gives the path."""

    def save(content: Any) -> Path:
        torch.save(content, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    return save
