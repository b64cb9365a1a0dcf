"""Each bomb, inside each format that embeds pickles: refused or read soon, and in little memory.

The bombs are those of `test_pickle_bounds`; here they come as files, and go all the way that a load takes.
Each bomb in each format: ``python -m tests.security.fuzz bombs``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.security._hostile import contained
from tests.security._payloads import CONTAINERS
from tests.security.test_pickle_bounds import BOMBS
from torchload import inspect_checkpoint, smart_load

CASES = [(bomb, list(CONTAINERS)[number % len(CONTAINERS)]) for number, bomb in enumerate(BOMBS)]
# What only looking for weights in the finished tree made large, or slow.
CASES += [(bomb, "zip") for bomb in ("tuples", "a wide tuple in many places", "records by NEWOBJ")]
CASES = list(dict.fromkeys(CASES))


def write(bomb: str, container: str, folder: Path) -> Path:
    """A bomb as a file, or a folder, of a format."""
    content = CONTAINERS[container](BOMBS[bomb])
    path = folder / "bomb"
    for name, part in content.items() if isinstance(content, dict) else [("", content)]:
        file = path / name if name else path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(part)
    return path


@pytest.mark.parametrize(("bomb", "container"), CASES)
def test_a_bomb_in_a_file_is_read_or_refused_within_bounds(bomb: str, container: str, tmp_path: Path) -> None:
    path = write(bomb, container, tmp_path)
    model = torch.nn.Linear(3, 2)
    assert contained(lambda: inspect_checkpoint(path))
    assert contained(lambda: smart_load(model, path))
