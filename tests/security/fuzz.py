"""What takes longer than a test may: ``python -m tests.security.fuzz {mutate,exhaustive,bombs}``.

``mutate`` changes sound checkpoints of every format at random, and hostile ones too, until the time is up: whatever
comes out that is neither a load nor a `TorchLoadError`, or takes too long, is kept in ``--keep`` with a traceback.
``exhaustive`` flips a bit in every byte, and cuts every file at every length. ``bombs`` puts every bomb of opcodes into
every format, sends every other bomb through every public function, and prints the most that any took. Seeds are made,
never stored.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from tests.security._bombs import BOMBS as FILES
from tests.security._hostile import ACCOUNTS
from tests.security._payloads import CALLABLES, CONTAINERS, calls
from tests.security._seeds import MAKERS, Seed, model
from tests.security.test_damage import cut, flips, judge, outcome
from tests.security.test_pickle_bounds import BOMBS
from tests.security.test_promise_bounds import ENTRANCES, endure, write
from torchload import inspect_checkpoint, read_state_dict, smart_load, smart_resume, verify_weights
from torchload.errors import TorchLoadError

SLOW_SECONDS = 5.0
TOKENS = (b"\x00", b"\xff", b"\x7f", b"\x80", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x80\x02", b"}", b"q\x00")
TOKENS += (
    b"cos\nsystem\n",
    b"(",
    b"t",
    b"R",
    b"Q",
    b".",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b'"shape"',
    b"-1",
    b"9" * 20,
)


def _mutated(content: bytes, others: list[bytes], chooser: random.Random) -> bytes:
    data = bytearray(content or b"\0")
    for _ in range(chooser.choice((1, 1, 1, 2, 4, 16))):
        place = chooser.randrange(len(data) + 1)
        width = chooser.choice((1, 2, 4, 8, 64))
        kind = chooser.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << chooser.randrange(8)
        elif kind == 1:
            data[place : place + width] = chooser.randbytes(width)
        elif kind == 2:
            data[place:place] = chooser.choice(TOKENS)
        elif kind == 3:
            del data[place : place + width]
        elif kind == 4:
            other = chooser.choice(others)
            start = chooser.randrange(len(other) + 1)
            data[place : place + width] = other[start : start + 8 * width]
        else:
            value = chooser.choice((0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, len(data)))
            size = chooser.choice((2, 4, 8))
            data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, chooser.choice(("little", "big")))
    return bytes(data)


def _try(path: Path) -> str:
    whole = model()
    optimizer = torch.optim.AdamW(whole.parameters())
    ways: tuple[Callable[[], object], ...] = (
        lambda: str(inspect_checkpoint(path)),
        lambda: read_state_dict(path),
        lambda: str(verify_weights(model(), path)),
        lambda: smart_load(model(), path, strict=False),
        lambda: str(smart_resume(whole, path, optimizer, strict=False)),
    )
    for way in ways:
        with contextlib.suppress(TorchLoadError):
            way()
    try:
        smart_load(torch.nn.Linear(3, 2), path, verify=True)
    except TorchLoadError as error:
        return type(error).__name__
    return outcome(path)


def mutate(minutes: float, chooser: random.Random, keep: Path) -> int:
    """Returns how many failures were kept."""
    ends, failures = time.monotonic() + 60 * minutes, 0
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        seeds = {name: maker(Path(folder) / name.replace(" ", "_")) for name, maker in _made(Path(folder))}
        sound = {file: file.read_bytes() for seed in seeds.values() for file in seed.files}
        others = list(sound.values())
        while time.monotonic() < ends:
            name = chooser.choice(list(seeds))
            file = chooser.choice(seeds[name].files)
            file.write_bytes(_mutated(sound[file], others, chooser))
            started = time.process_time()
            try:
                result = _try(seeds[name].path)
            except Exception:  # noqa: BLE001 - what is looked for
                result = traceback.format_exc()
            seconds = time.process_time() - started
            if "Traceback" in result or seconds > SLOW_SECONDS:
                failures += 1
                target = keep / f"{failures:04}-{file.name}"
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                target.with_suffix(".txt").write_text(f"{name}, {seconds:.1f} s\n{result}")
                result = "failure"
            outcomes[result] += 1
            file.write_bytes(sound[file])
    print(f"{sum(outcomes.values())} files: {dict(outcomes)}")
    return failures


def _made(folder: Path) -> Iterator[tuple[str, object]]:
    for name, maker in MAKERS.items():
        (folder / name.replace(" ", "_")).mkdir()
        yield name, maker
    for container, build in CONTAINERS.items():
        name = f"hostile {container}"
        content = build(next(calls(CALLABLES[0], "true")))

        def make(path: Path, content: bytes | dict[str, bytes] = content) -> Seed:
            files = content if isinstance(content, dict) else {"file": content}
            for inner, part in files.items():
                (path / inner).parent.mkdir(parents=True, exist_ok=True)
                (path / inner).write_bytes(part)
            return Seed(path if isinstance(content, dict) else path / "file")

        yield name, make


def exhaustive(chooser: random.Random) -> int:
    """A bit in every byte, and every length."""
    for name, maker in MAKERS.items():
        with tempfile.TemporaryDirectory() as folder:
            seed = maker(Path(folder))
            places = ((file, at, chooser.randrange(8)) for file in seed.files for at in range(file.stat().st_size))
            outcomes = flips(seed, places)
            judge(name, outcomes)
            for file in seed.files:
                content = file.read_bytes()
                for length in range(len(content)):
                    cut(name, seed, file, content, length)
                file.write_bytes(content)
            print(f"{name}: {dict(outcomes)}; every cut found")
    return 0


def bombs() -> int:
    """Every bomb of opcodes in every format, every other bomb through every entrance."""
    passages: list[tuple[Callable[[Path], str], str]] = [
        (partial(write, bomb, container), "smart_load") for bomb in BOMBS for container in CONTAINERS
    ]
    passages += [(bomb, entrance) for bomb in FILES.values() for entrance in ENTRANCES]
    for make, entrance in passages:
        with tempfile.TemporaryDirectory() as folder:
            endure(make(Path(folder)), entrance)
    seconds = max(account.cpu_seconds for account in ACCOUNTS)
    peak = max(account.peak_bytes for account in ACCOUNTS) >> 20
    print(f"{len(ACCOUNTS)} passages; the slowest took {seconds:.1f} s of CPU time, the largest {peak} MiB")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("mutate", "exhaustive", "bombs"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    chooser = random.Random(options.seed)
    warnings.simplefilter("ignore")  # of a load in part
    if options.what == "mutate":
        return mutate(options.minutes, chooser, options.keep)
    return exhaustive(chooser) if options.what == "exhaustive" else bombs()


if __name__ == "__main__":
    sys.exit(min(main(), 1))
