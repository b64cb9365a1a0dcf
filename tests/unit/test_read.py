"""read_state_dict on real files: what torch.load would give, without its dangers."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchload import errors, read_state_dict, smart_load, verify_weights


def state(shift=0.0):
    torch.manual_seed(5)
    return {
        "module.fc.weight": torch.randn(3, 4) + shift,
        "module.fc.bias": torch.randn(3) + shift,
        "module.steps": torch.tensor(7),
    }


def saved(tmp_path, content, name="model.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def assert_equal(found, wanted):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# --- the weights as they are ---


@pytest.mark.parametrize("mmap", [False, True])
def test_names_and_values_are_those_of_the_file(tmp_path, mmap):
    path = saved(tmp_path, {"epoch": 3, "state_dict": state()})
    assert_equal(read_state_dict(path, mmap=mmap), state())


def test_versions_come_along(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(2))
    found = read_state_dict(saved(tmp_path, model.state_dict()))
    assert found._metadata == model.state_dict()._metadata
    model.load_state_dict(found)


def test_every_source_that_opens(tmp_path):
    save_file(state(), tmp_path / "model.safetensors")
    found = read_state_dict(tmp_path)
    assert sorted(found) == sorted(state())
    file = io.BytesIO()
    torch.save(state(), file)
    file.seek(0)
    assert_equal(read_state_dict(file), state())


def test_a_bare_tensor_has_no_name(tmp_path):
    assert_equal(read_state_dict(saved(tmp_path, torch.ones(2))), {"": torch.ones(2)})


def test_nothing_in_the_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    found = read_state_dict(saved(tmp_path, {"model": state(), "hyper": Trap()}))
    assert_equal(found, state())
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("mmap", [False, True])
def test_what_shares_memory_in_the_file_shares_it_here(tmp_path, mmap):
    base = torch.randn(20)
    weights = {"whole": base[:12].view(3, 4), "rows": base[4:8], "tied": base[:12].view(3, 4), "apart": base[12:]}
    found = read_state_dict(saved(tmp_path, weights), mmap=mmap)
    assert_equal(found, weights)
    found["whole"].zero_()
    assert not found["rows"].any()
    assert not found["tied"].any()
    assert torch.equal(found["apart"], base[12:])


def test_ties_survive_a_cast(tmp_path):
    weight = torch.randn(3)
    found = read_state_dict(saved(tmp_path, {"a": weight, "b": weight}), dtype=torch.float16)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert torch.equal(found["a"], weight.half())


@pytest.mark.parametrize("mmap", [False, True])
def test_layouts(tmp_path, mmap):
    weights = {
        "turned": torch.randn(4, 3).t(),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "gaps": torch.randn(5, 6)[:, 1:3],
        "expanded": torch.randn(1).expand(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
    }
    found = read_state_dict(saved(tmp_path, weights), mmap=mmap)
    assert_equal(found, weights)
    assert found["turned"].stride() == (1, 3)
    assert found["last"].is_contiguous(memory_format=torch.channels_last)


def test_tensors_can_be_trained_and_written(tmp_path):
    path = saved(tmp_path, state())
    before = path.read_bytes()
    for mmap in (False, True):
        found = read_state_dict(path, mmap=mmap)
        weight = found["module.fc.weight"].requires_grad_()
        weight.sum().backward()
        with torch.no_grad():
            weight.add_(weight.grad)
    assert path.read_bytes() == before


# --- casts, devices ---


def test_casts_touch_floating_tensors_only(tmp_path):
    found = read_state_dict(saved(tmp_path, state()), dtype=torch.bfloat16)
    assert {name: value.dtype for name, value in found.items()} == {
        "module.fc.weight": torch.bfloat16,
        "module.fc.bias": torch.bfloat16,
        "module.steps": torch.int64,
    }
    assert torch.equal(found["module.fc.weight"], state()["module.fc.weight"].bfloat16())


def test_overflow_is_an_error(tmp_path):
    path = saved(tmp_path, {"fine": torch.ones(2), "large": torch.tensor([1.0, -1e6])})
    with pytest.raises(errors.CastOverflowError, match=r"model.pth: large does not fit.*without dtype=") as caught:
        read_state_dict(path, dtype=torch.float16)
    assert (caught.value.tensor, caught.value.largest) == ("large", 1e6)
    assert pickle.loads(pickle.dumps(caught.value)).tensor == "large"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto"])
def test_devices(tmp_path, device):
    found = read_state_dict(saved(tmp_path, state()), device)
    assert_equal({name: value.cpu() for name, value in found.items()}, state())


def test_wrong_arguments(tmp_path):
    path = saved(tmp_path, state())
    with pytest.raises(errors.DeviceError):
        read_state_dict(path, "cuda:99")
    with pytest.raises(TypeError, match="one device"):
        read_state_dict(path, {"fc": "cpu"})
    with pytest.raises(TypeError, match="one device"):
        read_state_dict(path, None)
    with pytest.raises(TypeError, match="floating-point"):
        read_state_dict(path, dtype=torch.int8)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    found = read_state_dict(saved(tmp_path, {"a": state(), "optimizer": {}}), "cuda", dtype=torch.float16)
    assert found["module.fc.weight"].device.type == "cuda"
    assert torch.equal(found["module.fc.weight"].cpu(), state()["module.fc.weight"].half())


# --- which container ---

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 1.0}]}
PLAIN, OTHER = state(), state(1.0)
PART = {"module.fc.bias": OTHER["module.fc.bias"]}
UNWRAPPED = {name.removeprefix("module."): value for name, value in OTHER.items()}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (PLAIN, ""),
        ({"anything": PLAIN}, "anything"),
        ({"model": PLAIN, "optimizer": OPTIMIZER}, "model"),
        ({"weights": PLAIN, "opt_g": OPTIMIZER}, "weights"),
        ({"first": PLAIN, "opt_g": OPTIMIZER}, "first"),
        ({"model": PLAIN, "criterion": {"weight": torch.ones(3)}}, "model"),
        ({"state": {"model": PLAIN, "optimizers": OPTIMIZER}}, "state.model"),
        ({"state_dict": PLAIN, "mean": torch.ones(3), "loss": torch.tensor(0.5)}, "state_dict"),
        ({"model": PLAIN, "ema": OTHER}, "ema"),
        ({"model": PLAIN, "ema": UNWRAPPED}, "ema"),
        ({"model": PLAIN, "ema": {"module": OTHER}}, "ema.module"),
        ({"model": PLAIN, "ema": PART}, "model"),
        ({"model": PLAIN, "ema": {"shadow_params": [torch.ones(3)]}}, "model"),
        ({"model": None, "ema": OTHER}, "ema"),
        ({"student": PLAIN, "teacher": OTHER, "dino_loss": {}}, "teacher"),
        ({"state_dict": PLAIN, "ema_state_dict": OTHER, "message_hub": {}}, "state_dict"),
        ({"model": {"encoder": {"w": torch.ones(1)}, "decoder": {"w": torch.ones(1)}}}, "model"),
        ({"model": {"encoder": {"w": torch.ones(1)}}}, "model"),
        ({"model": PLAIN, "state_dict": PLAIN}, "model"),
    ],
)
def test_the_container_that_is_meant(tmp_path, content, key):
    path = saved(tmp_path, content)
    assert_equal(read_state_dict(path), read_state_dict(path, key=key))


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"generator": PLAIN, "net": OTHER}, ["generator", "net"]),
        ({"first": PLAIN, "second": OTHER}, ["first", "second"]),
        ({"ema_a": PLAIN, "ema_b": OTHER}, ["ema_a", "ema_b"]),
    ],
)
def test_several_are_a_question(tmp_path, content, keys):
    path = saved(tmp_path, content)
    with pytest.raises(errors.AmbiguousCheckpointError) as caught:
        read_state_dict(path)
    assert caught.value.candidates == tuple(keys)
    assert caught.value.argument == "key"
    for key in keys:
        assert f"key={key!r}" in str(caught.value)
        assert_equal(read_state_dict(path, key=key), content[key])
    assert len(read_state_dict(path, key="")) == 6


def test_keys_lead_anywhere(tmp_path):
    path = saved(tmp_path, {"model": PLAIN, "optimizer": OPTIMIZER})
    assert list(read_state_dict(path, key="optimizer.state")) == ["0.exp_avg"]
    [(name, value)] = read_state_dict(path, key="optimizer.state.0.exp_avg").items()
    assert name == "exp_avg"
    assert torch.equal(value, OPTIMIZER["state"][0]["exp_avg"])
    with pytest.raises(errors.IncompatibleCheckpointError, match="no container 'ema'"):
        read_state_dict(path, key="ema")


def test_files_without_tensors(tmp_path):
    with pytest.raises(errors.IncompatibleCheckpointError, match="no tensors"):
        read_state_dict(saved(tmp_path, {"epoch": 3}))


def test_what_is_no_dense_tensor_is_named(tmp_path):
    path = saved(tmp_path, {"dense": torch.ones(2), "adjacency": torch.eye(2).to_sparse()})
    with pytest.raises(errors.IncompatibleCheckpointError, match=r"adjacency"):
        read_state_dict(path)


LAZY = {
    "conjugated": torch.tensor([[1 + 2j, 3j], [4 - 1j, 5]]).conj(),
    "conjugated and transposed": torch.tensor([[1 + 2j, 3j], [4 - 1j, 5]]).mH,
    "one row": torch.tensor([[1 + 2j, 3j], [4 - 1j, 5]], dtype=torch.complex128).conj()[1],
    "negated": torch.tensor([[1 + 2j, 3j], [4 - 1j, 5]]).conj().imag,
    "negated whole numbers": torch._neg_view(torch.arange(6).view(2, 3)).t(),
    "negated scalar": torch._neg_view(torch.tensor(2.5)),
    "negated and expanded": torch._neg_view(torch.arange(3.0)).expand(2, 3),
    "both": torch._neg_view(torch.tensor([1 + 2j, 3j]).conj()),
    "nothing": torch.zeros(0, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", LAZY)
def test_what_torch_conjugates_or_negates_when_it_must(tmp_path, kind, zipped):
    path = tmp_path / "x.pth"
    torch.save({"lazy": LAZY[kind]}, path, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=True)["lazy"]
    found = read_state_dict(path)["lazy"]
    assert (found.is_conj(), found.is_neg()) == (False, False)
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected.resolve_conj().resolve_neg())
    model = nn.Module()
    model.lazy = nn.Parameter(torch.zeros_like(found), requires_grad=False)
    smart_load(model, path, verify=True)
    assert torch.equal(model.lazy, expected)
    assert verify_weights(model, path).ok


def test_a_lazy_conjugate_of_another_byte_order(tmp_path):
    lazy = LAZY["conjugated and transposed"]
    torch.save({"lazy": lazy}, tmp_path / "little.pth")
    swapped = bytearray()
    with zipfile.ZipFile(tmp_path / "little.pth") as old, zipfile.ZipFile(tmp_path / "big.pth", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if "/data/" in info.filename:
                swapped += b"".join(data[at : at + 4][::-1] for at in range(0, len(data), 4))
                data = bytes(swapped)
            new.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else data)
    assert len(swapped) == 32
    assert torch.equal(read_state_dict(tmp_path / "big.pth")["lazy"], lazy)
