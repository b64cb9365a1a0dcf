"""Each bomb is refused or read soon, and in little memory, whichever function is given it.

Bombs of opcodes (`test_pickle_bounds`) come inside the formats that embed pickles, each in one of them here; the others
(`_bombs`) are files of their own. All of them through every entrance: ``python -m tests.security.fuzz bombs``, which
prints the figures that the promise's page states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.security._bombs import BOMBS as FILES
from tests.security._hostile import contained
from tests.security._payloads import CONTAINERS
from tests.security._seeds import MAKERS
from tests.security.test_pickle_bounds import BOMBS
from torchload import inspect_checkpoint, read_state_dict, smart_load, smart_resume, verify_weights

CASES = [(bomb, list(CONTAINERS)[number % len(CONTAINERS)]) for number, bomb in enumerate(BOMBS)]
# What only looking for weights in the finished tree made large, or slow.
CASES += [(bomb, "zip") for bomb in ("tuples", "a wide tuple in many places", "records by NEWOBJ")]
CASES = list(dict.fromkeys(CASES))


def _model() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


def _resume(path: str) -> object:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return smart_resume(model, path, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3), strict=False)


ENTRANCES: dict[str, Callable[[str], object]] = {
    "inspect_checkpoint": inspect_checkpoint,
    "smart_load": lambda path: smart_load(_model(), path),
    "smart_load, strict=False": lambda path: smart_load(_model(), path, strict=False, verify=True),
    "read_state_dict": lambda path: len(read_state_dict(path)),
    "verify_weights": lambda path: verify_weights(_model(), path),
    "smart_resume": _resume,
}


@cache
def _all_is_imported() -> None:
    """What the first use of a function imports is not the bomb's doing."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        path = f"{folder}/training.pth"
        training = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**training, "rng_state": {"torch": torch.get_rng_state()}}, path)
        for enter in ENTRANCES.values():
            str(enter(path))
        for name, maker in MAKERS.items():
            (Path(folder) / name).mkdir()
            inspect_checkpoint(maker(Path(folder) / name).path)


def endure(path: str, entrance: str) -> str:
    """What comes of a bomb, within the promised bounds; a report or an error is printed, too."""
    _all_is_imported()

    def action() -> None:
        warnings.simplefilter("ignore")
        str(ENTRANCES[entrance](path))

    return contained(action)


def write(bomb: str, container: str, folder: Path) -> str:
    """A bomb of opcodes as a file, or a folder, of a format."""
    content = CONTAINERS[container](BOMBS[bomb])
    path = folder / "bomb"
    for name, part in content.items() if isinstance(content, dict) else [("", content)]:
        file = path / name if name else path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(part)
    return str(path)


@pytest.mark.parametrize(("bomb", "container"), CASES)
def test_a_bomb_of_opcodes_in_a_file(bomb: str, container: str, tmp_path: Path) -> None:
    path = write(bomb, container, tmp_path)
    for entrance in ("inspect_checkpoint", "smart_load"):
        assert endure(path, entrance)


# Those that were found to be the worst go through every entrance, and each of the others through one.
_WORST = (
    "containers that double",
    "many names of tensors of their own",
    "a hundred thousand containers, each a model",
    "numbers that are none",
    "a number of ten million digits",
    "a huge tensor that is one number",
    "a wrapper a hundred thousand times in one name",
)
PASSAGES = [(bomb, entrance) for bomb in _WORST for entrance in ENTRANCES]
PASSAGES += [
    (
        bomb,
        "smart_resume" if bomb.startswith(("training", "random state")) else list(ENTRANCES)[number % len(ENTRANCES)],
    )
    for number, bomb in enumerate(FILES)
    if bomb not in _WORST
]


@pytest.mark.parametrize(("bomb", "entrance"), PASSAGES)
def test_a_bomb_in_a_file(bomb: str, entrance: str, tmp_path: Path) -> None:
    assert endure(FILES[bomb](tmp_path), entrance)
