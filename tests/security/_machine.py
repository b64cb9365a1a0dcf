"""What a process holds, and models small enough to compare bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")


def descriptors() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def anonymous_bytes() -> int:
    """Memory of this process that is no file's (``RssAnon``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("/proc/self/status has no RssAnon")


def in_child(script: str, *arguments: str, seconds: float = 100) -> str:
    """What a script prints in a process of its own, which has to end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tower(value: float | None = None, layers: int = 4, width: int = 32) -> nn.Sequential:
    """A stack of layers, each of which adds `value` (or random numbers) to what it is given."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    if value is not None:
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(torch.eye(width))
                layer.bias.fill_(value)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in a model."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are no longer, bit for bit, what they were."""
    bits = torch.uint8
    return {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value.reshape(-1).view(bits), before[name].reshape(-1).view(bits))
    }
