"""Runs every example of the README, the docs and the docstrings as a test.

Each page and each module's docstrings run in a folder of their own that holds `model.pth`, a training checkpoint, with
these names defined: `torch`, `nn`, `model` (a plain model of the same kind), and `Net` (its class).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from doctest import ELLIPSIS
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest._code import Traceback
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.integration.pytest import SybilItem
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser
from torch import nn


class Net(nn.Module):
    """The model that the examples load: a backbone and a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.fc = nn.Linear(16, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(self.backbone(inputs))


def set_the_stage(namespace: dict[str, Any]) -> None:
    """Make the folder, the checkpoint and the names."""
    folder = tempfile.TemporaryDirectory()
    namespace["_stage"] = (folder, Path.cwd())
    os.chdir(folder.name)
    torch.manual_seed(0)
    trained = nn.DataParallel(Net())
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.randn(8, 8)).sum().backward()
    optimizer.step()
    training = {
        "state_dict": trained.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 37,
        "args": argparse.Namespace(lr=1e-3),
    }
    torch.save(training, "model.pth")
    namespace.update(torch=torch, nn=nn, Net=Net, model=Net().eval())


def clear_the_stage(namespace: dict[str, Any]) -> None:
    """Go back, and remove the folder."""
    folder, before = namespace.pop("_stage")
    os.chdir(before)
    folder.cleanup()


pages = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS), SkipParser()],
    patterns=["*.md"],
    setup=set_the_stage,
    teardown=clear_the_stage,
)
docstrings = Sybil(
    parsers=[DocTestParser(ELLIPSIS)],
    path="torchload",
    patterns=["*.py"],
    document_types={".py": PythonDocStringDocument},
    setup=set_the_stage,
    teardown=clear_the_stage,
)
pytest_collect_file = (pages + docstrings).pytest()


def pytest_itemcollected(item: pytest.Item) -> None:
    """A failure outside the example's own code, such as a file left open, keeps its whole traceback."""
    narrow = getattr(item, "_traceback_filter", None)
    if not isinstance(item, SybilItem) or narrow is None:
        return

    def narrow_where_possible(failure: pytest.ExceptionInfo[BaseException]) -> Traceback:
        try:
            return narrow(failure)
        except IndexError:
            return failure.traceback

    item._traceback_filter = narrow_where_possible


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a page goes to one process as a whole: its examples build on each other."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
