"""DeepSpeed and rank-file folders that are damaged or made to do harm."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.security._hostile import contained
from tests.unit.test_deepspeed import PARAMETERS, module_state, zero3
from tests.unit.test_rank_files import Sharded
from torchload.errors import CheckpointFormatError, TorchLoadError
from torchload.formats import open_checkpoint


class Marker:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("field", ["module", "param_shapes", "shared_params", "buffer_names", "frozen_param_shapes"])
def test_nothing_in_a_deepspeed_file_is_called(tmp_path: Path, field: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    zero3(folder, module_state(), PARAMETERS, 1)
    file = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    held = torch.load(file, weights_only=False)
    held[field] = Marker(tmp_path / "called")
    torch.save(held, file)
    with contextlib.suppress(TorchLoadError):
        open_checkpoint(folder).close()
    assert not (tmp_path / "called").exists()


def test_truncations_of_any_file_are_found(tmp_path: Path) -> None:
    zero3(tmp_path, module_state(), PARAMETERS, 2)
    for file in tmp_path.glob("*_states.pt"):
        if "rank_1_mp_rank_00_model" in file.name:
            continue  # holds nothing that is needed
        data = file.read_bytes()
        for size in (0, 10, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:size])
            with pytest.raises(TorchLoadError):
                open_checkpoint(tmp_path)
        file.write_bytes(data)
    open_checkpoint(tmp_path).close()


@pytest.mark.parametrize("pointer", ["latest", "latest_checkpointed_iteration.txt"])
def test_pointers_that_are_no_files_are_not_waited_for(tmp_path: Path, pointer: str) -> None:
    os.mkfifo(tmp_path / pointer)
    (tmp_path / "global_step1").mkdir()
    with pytest.raises(CheckpointFormatError, match="FIFO"):
        open_checkpoint(tmp_path)


def test_a_group_in_many_places_costs_nothing(tmp_path: Path) -> None:
    zero3(tmp_path, module_state(), PARAMETERS, 1)
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    held = torch.load(file, weights_only=False)
    group = {f"w{number}": (0,) for number in range(20_000)}
    held["param_shapes"] = [group] * 20_000
    torch.save(held, file)
    assert "is in two groups" in contained(lambda: open_checkpoint(tmp_path))


def test_a_tree_in_many_places_costs_nothing(tmp_path: Path) -> None:
    for rank in range(2):
        level: Any = {"w": Sharded((2,), ((rank,), torch.ones(1)))}
        for _ in range(40):
            level = {"a": level, "b": level}
        torch.save(level, tmp_path / f"rank{rank}.pt")
    assert contained(lambda: open_checkpoint(tmp_path))
