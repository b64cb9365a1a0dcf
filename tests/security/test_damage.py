"""Damage to a checkpoint of any format is found, or means nothing; where a format can't tell, the report says so.

Each file is loaded into a model from beginning to end, with ``verify=True``. The same at every byte of every format:
``python -m tests.security.fuzz exhaustive``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.security._seeds import MAKERS, Seed, data_ranges, model
from torchload import smart_load
from torchload.errors import TorchLoadError

# Checksums cover all that matters in these,
CHECKED = ("zip", "TorchScript", "npz", "nested zip", "tar", "distributed")
# in these a header says twice where everything lies, but nothing vouches for the data,
STRUCTURED = ("safetensors", "sharded")
# and these are bare pickles: what still reads as one is believed.
BARE = ("legacy", "numpy pickle")

SAMPLES = 150
EXPECTED = model().state_dict()


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def seed(name: str, tmp_path: Path) -> Seed:
    return MAKERS[name](tmp_path)


def outcome(path: Path) -> str:
    """``"refused"`` (and the model is unchanged), ``"same"`` values as before the damage, or ``"other"``.

    What the report names as tolerated or left out is no silent difference: a BatchNorm's counter may be absent.
    """
    target = model(fill=0)
    try:
        report = smart_load(target, path, verify=True)
    except TorchLoadError:
        assert not any(tensor.any() for tensor in target.state_dict().values())
        return "refused"
    loaded = target.state_dict()
    told = set(report.ignored)
    return "same" if all(torch.equal(loaded[key], EXPECTED[key]) for key in EXPECTED if key not in told) else "other"


def _flip(file: Path, content: bytes, position: int, bit: int) -> None:
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    file.write_bytes(damaged)


def flips(seed: Seed, places: Iterator[tuple[Path, int, int]]) -> Counter[tuple[str, str]]:
    """Outcomes of single flipped bits, told apart by where they are."""
    data = [(Path(file).name, first, last) for file, first, last in data_ranges(seed)]
    outcomes: Counter[tuple[str, str]] = Counter()
    for file, position, bit in places:
        content = file.read_bytes()
        _flip(file, content, position, bit)
        where = any(file.name == other and first <= position < last for other, first, last in data)
        outcomes[outcome(seed.path), "data" if where else "structure"] += 1
        file.write_bytes(content)
    return outcomes


def judge(name: str, outcomes: Counter[tuple[str, str]]) -> None:
    assert outcomes["refused", "structure"]
    if name in CHECKED:
        assert not outcomes["other", "data"]
    if name not in BARE:
        assert not outcomes["other", "structure"]


def test_the_sound_file_loads(name: str, seed: Seed) -> None:
    assert outcome(seed.path) == "same"


def test_a_flipped_bit_is_found_or_means_nothing(name: str, seed: Seed) -> None:
    chooser = random.Random(name)
    sizes = [file.stat().st_size for file in seed.files]

    def places() -> Iterator[tuple[Path, int, int]]:
        for file in chooser.choices(seed.files, sizes, k=SAMPLES):
            yield file, chooser.randrange(file.stat().st_size), chooser.randrange(8)

    judge(name, flips(seed, places()))


@pytest.mark.parametrize("name", CHECKED)
def test_every_flipped_bit_of_the_data_is_found(name: str, seed: Seed) -> None:
    data = [(Path(file).name, first, last) for file, first, last in data_ranges(seed)]
    found = 0
    for file in seed.files:
        content = file.read_bytes()
        weight = next(iter(EXPECTED.values())).numpy().tobytes()
        start = content.find(weight)
        if start < 0:
            continue
        for position in range(start, start + len(weight)):
            for bit in range(8):
                _flip(file, content, position, bit)
                assert outcome(seed.path) == "refused"
                found += 1
        file.write_bytes(content)
    assert found == 8 * len(weight)
    assert data


def test_the_report_says_where_nothing_vouches_for_the_data(name: str, seed: Seed) -> None:
    report = smart_load(model(), seed.path, verify=True)
    assert any("records no checksums" in note for note in report.notes) is (name not in CHECKED)
    assert not any("checksum" in note for note in smart_load(model(), seed.path).notes)


def test_a_cut_is_found(name: str, seed: Seed) -> None:
    for file in seed.files:
        content = file.read_bytes()
        step = max(1, len(content) // 100)
        for length in {*range(0, len(content), step), *range(max(0, len(content) - 20), len(content))}:
            cut(name, seed, file, content, length)
        file.write_bytes(content)


def cut(name: str, seed: Seed, file: Path, content: bytes, length: int) -> None:
    file.write_bytes(content[:length])
    found = outcome(seed.path)
    padding = name == "tar" and not content[length:].strip(b"\0")  # an archive ends in blocks of zeros
    assert found == "refused" or (found == "same" and padding), f"{found} at {length} of {len(content)}"


@pytest.mark.parametrize("kind", ["zeros", "swapped", "repeated", "appended"])
def test_blocks_that_went_wrong(name: str, seed: Seed, kind: str) -> None:
    # As disks and transfers do it: a block of zeros, two blocks exchanged, one sent twice, another file's end.
    chooser = random.Random(kind)
    outcomes: Counter[str] = Counter()
    for file in seed.files:
        content = file.read_bytes()
        size = max(16, len(content) // 16)
        for _ in range(12):
            first, second = (chooser.randrange(max(1, len(content) - size)) for _ in range(2))
            damaged = bytearray(content)
            if kind == "zeros":
                damaged[first : first + size] = bytes(size)
            elif kind == "swapped":
                damaged[first : first + size], damaged[second : second + size] = (
                    damaged[second : second + size],
                    damaged[first : first + size],
                )
            elif kind == "repeated":
                damaged[first:first] = damaged[first : first + size]
            else:
                damaged += damaged[first : first + size]
            file.write_bytes(damaged)
            outcomes[outcome(seed.path)] += 1
        file.write_bytes(content)
    if name in CHECKED:
        assert not outcomes["other"]


@given(st.sampled_from(sorted(MAKERS)), st.randoms(use_true_random=False), st.integers(1, 8))
def test_law_only_known_errors_come_out(
    tmp_path_factory: pytest.TempPathFactory, name: str, chooser: random.Random, count: int
) -> None:
    seed = MAKERS[name](tmp_path_factory.mktemp("law"))
    for _ in range(count):
        file = chooser.choice(seed.files)
        content = bytearray(file.read_bytes())
        place = chooser.randrange(len(content) + 1)
        noise = bytes(chooser.choices((0, 1, 0x7F, 0x80, 0xFF, 0x2E, chooser.randrange(256)), k=chooser.randint(1, 9)))
        content[place : place + chooser.choice((0, len(noise), 4))] = noise
        file.write_bytes(content or b"\0")
    outcome(seed.path)
