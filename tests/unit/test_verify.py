"""verify_weights: yes, or what differs and by how much."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.versions import can_pickle
from torchload import errors, smart_load, smart_save, verify_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight
        self.fc = nn.Linear(4, 4)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("scratch", torch.randn(2), persistent=False)


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def path(tmp_path, model):
    torch.save({"state_dict": nn.DataParallel(model).state_dict(), "epoch": 3}, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_yes(path, model):
    report = verify_weights(model, path)
    assert report
    assert report.ok
    assert report.differing == ()
    assert report.key == "state_dict"
    assert report.tensors == len(model.state_dict())
    assert "yes: all 10 tensors of the file are in the model" in str(report)


def test_wrapped_models_and_other_files(tmp_path, model):
    smart_save(model, tmp_path / "model.safetensors")
    assert verify_weights(nn.DataParallel(model), tmp_path / "model.safetensors")


def test_no_and_by_how_much(path, model):
    with torch.no_grad():
        model.fc.weight[1, 2] += 0.5
        model.fc.weight[0, 0] -= 2.0
        model.turned[4, 1] += 1.0
        model.norm.num_batches_tracked += 3
    report = verify_weights(model, path)
    assert not report
    found = {difference.name: (difference.count, difference.numel) for difference in report.differing}
    assert found == {"norm.num_batches_tracked": (1, 1), "fc.weight": (2, 16), "turned": (1, 15)}
    largest = {difference.name: difference.largest for difference in report.differing}
    assert largest == pytest.approx({"norm.num_batches_tracked": 3, "fc.weight": 2, "turned": 1})
    assert "NO: 3 of 10 tensors differ" in str(report)
    assert "fc.weight: 2 of 16 elements differ, by 2 at most" in str(report)


def test_the_model_stays_as_it_was(path, model):
    before = copy.deepcopy(model.state_dict())
    verify_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.fc.weight.grad is None


def holder(values):
    model = nn.Module()
    model.register_buffer("values", values)
    return model


def compared(tmp_path, theirs, ours):
    torch.save({"values": theirs}, tmp_path / "values.pth")
    report = verify_weights(holder(ours), tmp_path / "values.pth")
    return report.differing[0] if report.differing else None


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ([1.0, NAN, INF, -INF], [1.0, NAN, INF, -INF], None),
        ([0.0, 1.0], [-0.0, 1.0], (1, 0.0, 0)),
        ([NAN, 1.0], [2.0, 1.0], (1, 0.0, 1)),
        ([NAN, 1.0], [2.0, 4.0], (2, 3.0, 1)),
        ([INF, 1.0], [5.0, 1.0], (1, INF, 0)),
        ([INF, 1.0], [-INF, 1.0], (1, INF, 0)),
    ],
)
def test_odd_numbers(tmp_path, theirs, ours, expected):
    found = compared(tmp_path, torch.tensor(theirs), torch.tensor(ours))
    assert (found and (found.count, found.largest, found.nans)) == expected


def test_bits_of_nan_count_but_not_across_a_cast(tmp_path):
    quiet, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32).split(1)
    found = compared(tmp_path, quiet, other)
    assert (found.count, found.largest, found.nans) == (1, 0.0, 0)
    assert compared(tmp_path, quiet, torch.tensor([NAN], dtype=torch.float16)) is None


@pytest.mark.parametrize(
    "dtype",
    "bool uint8 uint16 int64 float8_e5m2 bfloat16 float64 complex64 complex128".split(),
)
def test_every_kind_of_element(tmp_path, dtype):
    dtype = getattr(torch, dtype)
    if not can_pickle(dtype):
        pytest.skip("this torch can't save it")
    theirs = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    ours = torch.tensor([1.0, 1.0, 1.0]).to(dtype)
    assert compared(tmp_path, theirs, theirs) is None
    found = compared(tmp_path, theirs, ours)
    assert (found.count, found.largest) == (1, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_as_cast(path, model, dtype):
    model.to(dtype)
    report = verify_weights(model, path)
    assert report.ok
    assert report.casts == {("float32", str(dtype).removeprefix("torch.")): 9}
    assert "as cast" in str(report)
    with torch.no_grad():
        model.fc.bias[0] += 1
    assert [difference.name for difference in verify_weights(model, path).differing] == ["fc.bias"]


def test_a_value_lost_to_infinity_is_a_difference(tmp_path):
    theirs = torch.tensor([1.0, 1e6])
    found = compared(tmp_path, theirs, theirs.half())
    assert (found.count, found.largest) == (1, INF)


def test_names_and_shapes(path, model):
    model.fc = nn.Linear(4, 7)
    model.extra = nn.Linear(2, 2)
    del model.norm
    report = verify_weights(model, path)
    assert {difference.name: difference.reason for difference in report.differing} == {
        "fc.weight": "file (4, 4), model (7, 4)",
        "fc.bias": "file (4,), model (7,)",
    }
    assert report.missing_keys == ["extra.weight", "extra.bias"]
    assert "missing extra.{weight, bias}" in str(report)
    assert not report
    left = verify_weights(model, path, skip=["fc.*", "extra.*"])
    assert (left.differing, left.missing_keys) == ((), [])
    assert left.skipped == ("fc.weight", "fc.bias", "extra.weight", "extra.bias")


def test_missing_alone_is_no(path, model):
    model.extra = nn.Linear(2, 2)
    report = verify_weights(model, path)
    assert report.differing == ()
    assert not report.ok


def test_no_values_yet(path):
    with torch.device("meta"):
        model = Net()
    report = verify_weights(model, path)
    assert not report
    assert {difference.reason for difference in report.differing} == {"the model has no values for it yet"}


def test_choosing_what_is_compared(tmp_path, model):
    other = Net()
    torch.save({"model": model.state_dict(), "ema": other.state_dict()}, tmp_path / "both.pth")
    assert verify_weights(other, tmp_path / "both.pth")
    assert not verify_weights(model, tmp_path / "both.pth")
    assert verify_weights(model, tmp_path / "both.pth", key="model")
    torch.save({f"old.{name}": value for name, value in model.state_dict().items()}, tmp_path / "old.pth")
    assert verify_weights(model, tmp_path / "old.pth", prefix="old.")
    assert verify_weights(model, tmp_path / "old.pth", rename={r"^old\.": ""})


def test_wrong_arguments(path, model):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        verify_weights(model.state_dict(), path)
    with pytest.raises(TypeError, match="list of globs"):
        verify_weights(model, path, skip="fc.*")
    with pytest.raises(errors.IncompatibleCheckpointError, match="not one name in common"):
        verify_weights(holder(torch.ones(3)), path)


def test_every_name_of_a_tie_is_compared(tmp_path, model):
    state = dict(model.state_dict())
    state["out.weight"] = state["out.weight"] + 1
    torch.save(state, tmp_path / "untied.pth")
    report = verify_weights(model, tmp_path / "untied.pth")
    assert [difference.name for difference in report.differing] == ["out.weight"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    code = """
import resource, sys, torch
from torch import nn
from torchload import smart_save, verify_weights
model = nn.Sequential(nn.Linear(4096, 12288, bias=False), nn.Linear(16, 16))
model[0].weight.data = model[0].weight.data.t()
path = sys.argv[1] + "/model.safetensors"
smart_save(model, path)
smart_save(model[1], sys.argv[1] + "/warm.safetensors")
verify_weights(model[1], sys.argv[1] + "/warm.safetensors")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert verify_weights(model, path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 128 * 1024  # KiB; the file has 192 MiB


@given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    place=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int32, torch.uint8, torch.bool]),
)
def test_law_exactly_what_was_changed_is_found(tmp_path_factory, shape, place, dtype):
    path = tmp_path_factory.mktemp("law") / "model.pth"
    values = (torch.rand(shape) > 0.5).to(dtype)
    model = nn.Module()
    model.register_buffer("values", values)
    model.register_buffer("others", torch.ones(3))
    smart_save(model, path)
    assert smart_load(model, path).tensors == 2
    assert verify_weights(model, path).ok
    flat = values.view(-1)
    flat[place % flat.numel()] = 1 - flat[place % flat.numel()].to(torch.int32)
    (difference,) = verify_weights(model, path).differing
    assert (difference.name, difference.count, difference.largest) == ("values", 1, 1.0)
