"""The garbage collector belongs to the whole process: it is paused while objects are made, never while data is read."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchload import read_state_dict, smart_load, verify_weights
from torchload.core.collector import collector_paused, collector_running


class Remote:
    """A file system far away, which sees whether anybody collects while it is waited for."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self.seen: list[bool] = []

    def seek(self, *arguments: int) -> int:
        return self._data.seek(*arguments)

    def tell(self) -> int:
        return self._data.tell()

    def read(self, count: int = -1) -> bytes:
        self.seen.append(gc.isenabled())
        return self._data.read(count)


@pytest.mark.parametrize("function", ["load", "read", "verify"])
def test_the_collector_runs_while_a_stream_is_waited_for(function: str) -> None:
    model, file = nn.Linear(300, 300), io.BytesIO()
    torch.save(model.state_dict(), file)
    remote: Any = Remote(file.getvalue())
    if function == "load":
        smart_load(model, remote)
    elif function == "read":
        read_state_dict(remote)
    else:
        assert verify_weights(model, remote)
    assert remote.seen
    assert all(remote.seen)
    assert gc.isenabled()


def test_the_collector_runs_while_data_moves(tmp_path: Path) -> None:
    model, seen = nn.Linear(300, 300), []
    torch.save(model.state_dict(), tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth", progress=lambda done, total: seen.append(gc.isenabled()))
    assert seen
    assert all(seen)


def test_running_inside_paused_is_paused_again_afterwards() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_running():
            assert gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_the_caller_stopped_stays_stopped() -> None:
    gc.disable()
    try:
        with collector_paused(), collector_running():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
