"""One budget for a whole load: what a file, an archive inside it and a stream inside that cost counts together.

Each of these was found by somebody who meant harm. Where a file is honest and merely large, the work may grow as its
size does; where it isn't, it is refused. Times are never compared with a number: twice the size, twice the time.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.security._bombs import BIAS, MODEL, WEIGHT, checkpoint, mapping
from tests.security._hostile import contained, named, text
from tests.versions import save_folder
from torchload import inspect_checkpoint, read_state_dict, smart_load, smart_resume
from torchload.errors import CorruptCheckpointError, IncompatibleCheckpointError


def archive(records: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name, data in records.items():
            packed.writestr(zipfile.ZipInfo(name), data, method, 9)
    return file.getvalue()


def squeezed(content: bytes) -> bytes:
    """A checkpoint whose pickle is compressed, as all that is said a million times can be."""
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        records = {info.filename: packed.read(info) for info in packed.infolist()}
    return archive(records, zipfile.ZIP_DEFLATED)


def beside(pickled: bytes) -> bytes:
    return mapping([text("state_dict") + mapping([MODEL]), text("x") + pickled])


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def view(shape: tuple[int, ...], strides: tuple[int, ...], key: str = "0", numel: int = 6, offset: int = 0) -> bytes:
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu") + number(numel) + b"tQ"
    sizes = pickle.dumps(shape, 2)[2:-1] + pickle.dumps(strides, 2)[2:-1]
    rebuild = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(offset) + sizes
    return rebuild + b"\x89" + named("collections", "OrderedDict") + b")RtR"


LISTS = beside(b"](" + b"]" * 400_000 + b"e")


def colliding(count: int) -> bytes:
    """Complex numbers that all have the hash 0."""
    pair = (struct.pack(">d", -1000003.0 * k) + b"G" + struct.pack(">d", float(k)) for k in range(1, count + 1))
    return named("builtins", "complex") + b"q\x200" + mapping(b"h\x20G" + numbers + b"\x86RN" for numbers in pair)


def exported(count: int) -> bytes:
    def one(value: int) -> dict[str, int]:
        return {"as_int": value}

    meta = {"dtype": 7, "sizes": [one(2)], "strides": [one(1)], "storage_offset": one(0), "layout": 7}
    config = {
        f"w{n}": {"path_name": f"weight_{n}", "is_param": True, "use_pickle": False, "tensor_meta": meta}
        for n in range(count)
    }
    weights = {f"m/data/weights/weight_{n}": bytes(16 << 20) for n in range(count)}
    names = {
        "m/archive_format": b"pt2",
        "m/data/weights/model_weights_config.json": json.dumps({"config": config}).encode(),
    }
    return archive({**names, **weights}, zipfile.ZIP_DEFLATED)


def test_archives_in_an_archive_share_one_budget(tmp_path: Path) -> None:
    one = squeezed(checkpoint(LISTS))
    (tmp_path / "one.pth").write_bytes(one)
    assert contained(lambda: inspect_checkpoint(tmp_path / "one.pth")) == "done"
    (tmp_path / "many.zip").write_bytes(archive({f"m{n}.pth": one for n in range(10)}))
    assert "would take more memory" in contained(lambda: inspect_checkpoint(tmp_path / "many.zip"))


def test_shards_share_one_budget(tmp_path: Path) -> None:
    one = squeezed(checkpoint(mapping([MODEL, text("x") + b"](" + b"]" * 400_000 + b"e"])))
    paths = [tmp_path / f"{n}.pth" for n in range(10)]
    for path in paths:
        path.write_bytes(one)
    assert "would take more memory" in contained(lambda: inspect_checkpoint(paths))


def test_items_of_a_distributed_checkpoint_share_one_budget(tmp_path: Path) -> None:
    save_folder({f"v{n}": {"a": n} for n in range(10)}, checkpoint_id=tmp_path)
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    item, content = squeezed(checkpoint(b"](" + b"]" * 400_000 + b"e")), b""
    for place in index.storage_data.values():
        place.offset, place.length = len(content), len(item)
        content += item
    (tmp_path / "__0_0.distcp").write_bytes(content)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    assert "would take more memory" in contained(lambda: inspect_checkpoint(tmp_path))


def test_compressed_weights_are_unpacked_when_they_are_read_and_only_so_many(tmp_path: Path) -> None:
    (tmp_path / "few.pt2").write_bytes(exported(2))
    assert contained(lambda: inspect_checkpoint(tmp_path / "few.pt2")) == "done"
    assert read_state_dict(tmp_path / "few.pt2")["w1"].tolist() == [0.0, 0.0]
    (tmp_path / "many.pt2").write_bytes(exported(40))
    assert "would take more memory" in contained(lambda: inspect_checkpoint(tmp_path / "many.pt2"))


@pytest.mark.parametrize(
    "body",
    [
        beside(b"(" + b"N" * 30_000_000 + b"t"),
        beside(b"](" + b"N" * 30_000_000 + b"e"),
        beside(b"(" + b"K\x01" * 15_000_000 + b"t"),
        beside(b"(" + b"\x8c\x02ab" * 7_000_000 + b"t"),
        beside(b"](](" + b"N" * 16 + b"eq\x20" + b"h\x20" * 4_000_000 + b"e"),
        beside(colliding(40_000)),
    ],
    ids=["nothing in a tuple", "nothing in a list", "numbers", "words", "one list many times", "keys of one hash"],
)
def test_what_is_small_and_cheap_to_say(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "bomb.pth").write_bytes(squeezed(checkpoint(body)))
    assert contained(lambda: smart_load(nn.Linear(3, 2), tmp_path / "bomb.pth"))


def test_an_expanded_tensor_takes_what_its_data_takes(tmp_path: Path) -> None:
    path = tmp_path / "expanded.pth"
    path.write_bytes(checkpoint(mapping([text("v") + view((1 << 40,), (0,))])))
    assert contained(lambda: read_state_dict(path)) == "done"
    weights = read_state_dict(path, dtype=torch.float64)
    assert (weights["v"].shape, weights["v"].stride()) == ((1 << 40,), (0,))
    assert weights["v"].untyped_storage().nbytes() == 8
    overlapping = tmp_path / "windows.pth"
    torch.save({"w": torch.arange(6.0).unfold(0, 4, 1)}, overlapping)
    found = read_state_dict(overlapping)["w"]
    assert torch.equal(found, torch.arange(6.0).unfold(0, 4, 1))
    assert found.untyped_storage().nbytes() == 24


def test_a_lazy_parameter_takes_no_shape_that_the_file_has_no_data_for(tmp_path: Path) -> None:
    path = tmp_path / "lazy.pth"
    bias = text("bias") + BIAS
    path.write_bytes(checkpoint(mapping([text("weight") + view((2, 1 << 30), (1, 0)), bias])))
    with pytest.raises(IncompatibleCheckpointError, match="more elements than there is data"):
        smart_load(nn.LazyLinear(2), path)


def test_views_in_an_optimizers_state_are_not_each_a_copy(tmp_path: Path) -> None:
    def training(views: int) -> Path:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        whole = torch.zeros(1_000_000)
        state = optimizer.state_dict()
        state["state"][0].update({f"v{n}": whole[n:] for n in range(views)})
        path = tmp_path / f"{views}.pth"
        torch.save({"state_dict": model.state_dict(), "optimizer": state}, path)
        return path

    def resume(path: Path) -> object:
        model = nn.Linear(3, 2)
        return smart_resume(model, path, torch.optim.AdamW(model.parameters()))

    few, many = training(4), training(200)
    assert contained(lambda: resume(few)) == "done"
    assert "would take more memory" in contained(lambda: resume(many))


def test_one_storage_of_two_types_is_refused(tmp_path: Path) -> None:
    half = view((2,), (1,), numel=12).replace(b"FloatStorage", b"HalfStorage")
    path = tmp_path / "two.pth"
    path.write_bytes(checkpoint(mapping([text("weight") + WEIGHT, text("bias") + half])))
    with pytest.raises(CorruptCheckpointError, match="two types"):
        smart_load(nn.Linear(3, 2), path)


# --- honest and large ---


def cpu_seconds(work: Callable[[], object]) -> float:
    """The least of three runs."""
    took = []
    for _ in range(3):
        begin = time.process_time()
        work()
        took.append(time.process_time() - begin)
    return min(took)


HONEST: dict[str, Callable[[int], object]] = {
    "tuples as keys": lambda count: {(n, "a"): n for n in range(count)},
    "complex numbers as keys": lambda count: {complex(n, 1): n for n in range(count)},
    "a set of tuples": lambda count: {(n, n) for n in range(count)},
    "floats": lambda count: [n / 3 for n in range(10 * count)],
    "nothing": lambda count: [None] * (20 * count),
    "pairs": lambda count: [(n, n / 3) for n in range(count)],
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_values_take_time_in_proportion(kind: str, tmp_path: Path) -> None:
    took = []
    for count in (20_000, 80_000):
        path = tmp_path / f"{count}.pth"
        torch.save({"state_dict": nn.Linear(3, 2).state_dict(), "x": HONEST[kind](count)}, path)
        took.append(cpu_seconds(lambda path=path: smart_load(nn.Linear(3, 2), path)))  # type: ignore[misc]
    assert took[1] < took[0] * 4 * 2, f"four times the values took {took[1] / took[0]:.1f} times as long"


def test_a_list_of_ten_million_numbers_is_honest(tmp_path: Path) -> None:
    path = tmp_path / "losses.pth"
    torch.save({"state_dict": nn.Linear(3, 2).state_dict(), "losses": [None] * 10_000_000}, path)
    assert smart_load(nn.Linear(3, 2), path).tensors == 2
