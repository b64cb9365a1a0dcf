"""Legacy files that contradict themselves: keys, counts and sizes that lie."""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any

import pytest
import torch

from tests.unit.test_legacy import Rebuilt, Reference, floats, handmade, pickled, storage
from torchload.errors import CorruptCheckpointError
from torchload.formats import open_checkpoint

TENSOR = Rebuilt(storage("0", 2), 0, (2,), (1,))
BYTES = Reference("storage", torch.UntypedStorage, "0", "cpu", 12, None)


def named(**values: Any) -> bytes:
    return pickled(values)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "a storage that isn't there": (handmade(named(w=TENSOR), [], b""), "that it doesn't have"),
    "a key that nothing uses": (handmade(named(w=TENSOR), ["0", "1"], floats(1, 2)), "that nothing uses"),
    "a key listed twice": (handmade(named(w=TENSOR), ["0", "0"], floats(1, 2) * 2), "twice"),
    "a count that is larger": (handmade(named(w=TENSOR), ["0"], floats(1, 2, 3)), "its count says 3"),
    "a negative count": (handmade(named(w=TENSOR), ["0"], struct.pack("<q2f", -2, 1, 2)), "its count says"),
    "two sizes of one storage": (handmade(named(w=TENSOR, b=BYTES), ["0"], floats(1, 2)), "two types or lengths"),
    "more than the file has": (
        handmade(named(w=Rebuilt(storage("0", 99), 0, (2,), (1,))), ["0"], floats(1, 2)),
        "needs?",
    ),
    "keys that are no list": (handmade(named(w=TENSOR), {"0": 1}, floats(1, 2)), "list of storage keys is malformed"),  # type: ignore[arg-type]
    "keys that are no texts": (handmade(named(w=TENSOR), [None], floats(1, 2)), "list of storage keys is malformed"),  # type: ignore[list-item]
    "a tensor beyond its storage": (
        handmade(named(w=Rebuilt(storage("0", 2), 1, (2,), (1,))), ["0"], floats(1, 2)),
        "does not lie inside",
    ),
    "a negative stride": (
        handmade(named(w=Rebuilt(storage("0", 2), 1, (2,), (-1,))), ["0"], floats(1, 2)),
        "impossible",
    ),
    "an overflowing shape": (
        handmade(named(w=Rebuilt(storage("0", 2), 0, (1 << 40, 1 << 40), (0, 0))), ["0"], floats(1, 2)),
        "does not lie inside",
    ),
    "a view beyond its storage": (
        handmade(named(w=Rebuilt(storage("0", 2, ("v", 1, 2)), 0, (1,), (1,))), ["0"], floats(1, 2)),
        "outside",
    ),
    "another version": (handmade(named(), [], b"", version=-(1 << 70)), "first pickles"),
    "sys_info that is none": (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps([], 2) * 3,
        "first pickles",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_contradicts_itself_is_refused(name: str) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(CorruptCheckpointError, match=message):
        open_checkpoint(io.BytesIO(data))


def test_many_small_storages_are_each_compared() -> None:
    # Their counts are read many at a time; a lie in any of them is found.
    count = 3000
    root = named(**{f"w{number}": Rebuilt(storage(str(number), 3), 0, (3,), (1,)) for number in range(count)})
    keys = [str(number) for number in range(count)]
    sound = handmade(root, keys, floats(1, 2, 3) * count)
    open_checkpoint(io.BytesIO(sound)).close()
    start = len(sound) - count * 20
    for number in (0, 1, 1499, count - 1):
        damaged = bytearray(sound)
        damaged[start + number * 20] ^= 4
        with pytest.raises(CorruptCheckpointError, match=f"storage '{number}' should have 3 elements"):
            open_checkpoint(io.BytesIO(damaged))
