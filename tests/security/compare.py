"""The same hostile and damaged files, read by others and by torchload: ``python -m tests.security.compare``.

Each file is read in a process of its own, whose CPU time and memory the kernel measures; more than the promise allows
is out of bounds. Prints a table for ``docs/explanation/security.md``.
"""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from tests.security._hostile import measured, text
from tests.security._payloads import CALLABLES, CONTAINERS, _zip, calls
from tests.security._seeds import MAKERS, model
from tests.security.test_pickle_bounds import BOMBS
from torchload import read_state_dict

EXPECTED = model().state_dict()
OUTCOMES = ("loaded right", "refused", "loaded wrong", "ran code", "crashed or out of bounds")
RIGHT, REFUSED, WRONG, RAN, CRASHED = range(len(OUTCOMES))

Case = tuple[str, bytes, str]
"""What it is, its content, its suffix."""


def _attacks(marker: str) -> Iterator[Case]:
    """A call, alone and beside the right weights, by each opcode."""
    for payload in calls("os.system", f"touch {marker}"):
        for name in ("zip", "legacy", "plain pickle", "TorchScript constants"):
            content = CONTAINERS[name](payload)
            if isinstance(content, bytes):
                yield "calls os.system", content, ".pth"
    for payload in calls("os.system", f"touch {marker}"):
        if payload.startswith((b"\x80\x02c", b"\x80\x04\x58")):
            yield "right weights beside a call", _beside(payload), ".pth"


def _beside(payload: bytes) -> bytes:
    """The sound checkpoint with one more entry in its pickle."""
    import io
    import zipfile

    with tempfile.TemporaryDirectory() as folder:
        content = MAKERS["zip"](Path(folder)).path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in members if name.endswith("data.pkl")]
    body = payload[2:] if payload[:1] == b"\x80" else payload
    members[name] = members[name][:-1] + text("extra") + body[:-1] + b"s."
    return _zip(members)


def _damaged(name: str, suffix: str, chooser: random.Random) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        content = MAKERS[name](Path(folder)).path.read_bytes()
    for _ in range(100):
        damaged = bytearray(content)
        damaged[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
        yield f"{name}: a flipped bit anywhere", bytes(damaged), suffix
    weight = content.find(EXPECTED["0.weight"].numpy().tobytes())
    for position in range(weight, weight + 24):
        damaged = bytearray(content)
        damaged[position] ^= 1 << chooser.randrange(8)
        yield f"{name}: a flipped bit in a weight", bytes(damaged), suffix
    for length in chooser.sample(range(len(content)), 40):
        yield f"{name}: cut off", content[:length], suffix


def cases(marker: str) -> Iterator[Case]:
    """All of them."""
    chooser = random.Random(0)
    yield from _attacks(marker)
    for name, suffix in (("zip", ".pth"), ("legacy", ".pth"), ("safetensors", ".safetensors")):
        yield from _damaged(name, suffix, chooser)
    for bomb in BOMBS.values():
        content = CONTAINERS["zip"](bomb)
        assert isinstance(content, bytes)
        yield "bombs", content, ".pth"


def _weights(loaded: Any) -> dict[str, Any]:
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _torchload(path: str) -> Any:
    from torchload import smart_load

    target = model(fill=0)
    smart_load(target, path, verify=True)
    return target.state_dict()


READERS: dict[str, Callable[[str], Any]] = {
    "torch.load": lambda path: torch.load(path, weights_only=True),
    "torch.load, weights_only=False": lambda path: torch.load(path, weights_only=False),
    "safetensors": load_file,
    "torchload": read_state_dict,
    "torchload, verify=True": _torchload,
}


def judge(reader: Callable[[str], Any], path: str, marker: str) -> int:
    """What becomes of one file in the hands of one reader."""

    def work() -> str:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        return str(_outcome(reader, path))

    found = measured(work)
    if os.path.exists(marker):
        os.unlink(marker)
        return RAN
    return int(found.outcome) if found.outcome and found.status == 0 and found.within_bounds else CRASHED


def _outcome(reader: Callable[[str], Any], path: str) -> int:
    warnings.simplefilter("ignore")
    try:
        weights = _weights(reader(path))
    except (MemoryError, RecursionError, SystemExit):
        return CRASHED
    except Exception as error:  # noqa: BLE001 - a refusal, of whatever kind
        return CRASHED if "alloc" in str(error).lower() and "memory" in str(error).lower() else REFUSED
    same = weights.keys() >= EXPECTED.keys() and all(torch.equal(weights[name], EXPECTED[name]) for name in EXPECTED)
    return RIGHT if same else WRONG


def main() -> None:
    table: dict[str, dict[str, Counter[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        marker = f"{folder}/marker"
        for kind, content, suffix in cases(marker):
            path = f"{folder}/file{suffix}"
            Path(path).write_bytes(content)
            for name, reader in READERS.items():
                if (name == "safetensors") is (suffix == ".safetensors") or "torchload" in name:
                    table.setdefault(kind, {}).setdefault(name, Counter())[judge(reader, path, marker)] += 1
    print(f"torch {torch.__version__}, safetensors {safetensors.__version__}, {len(CALLABLES)} callables known\n")
    print("| files | reader | " + " | ".join(OUTCOMES) + " |\n|---|---|" + "---:|" * len(OUTCOMES))
    for kind, readers in table.items():
        for name, found in readers.items():
            print(f"| {kind} ({found.total()}) | {name} | " + " | ".join(str(found[i] or "") for i in range(5)) + " |")


if __name__ == "__main__":
    main()
