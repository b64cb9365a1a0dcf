"""Quantized modules: they pack their weights, save them by names of their own, and load themselves."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.law import same_bits
from torchload import errors, inspect_checkpoint, read_state_dict, smart_load, smart_resume, verify_weights

quantization = pytest.importorskip("torch.ao.quantization")
nnq = pytest.importorskip("torch.ao.nn.quantized")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch's own, that all of this moves to torchao
    pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="this torch has no quantized kernels"),
]
IMAGES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)  # warns once in each process


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 2)
    )


def dynamic(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return quantization.quantize_dynamic(network().eval(), {nn.Linear}, dtype=torch.qint8)


def half_dynamic(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return quantization.quantize_dynamic(network().eval(), {nn.Linear}, dtype=torch.float16)


def prepared(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(quantization.QuantStub(), *network(), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    model = quantization.prepare(model)
    model(IMAGES * seed)
    return model


def static(seed: int) -> nn.Module:  # weights quantized per channel where the kernels are x86's
    return quantization.convert(prepared(seed))


def trained_aware(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(quantization.QuantStub(), *network(), quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
    return quantization.prepare_qat(model)


def observed(seed: int) -> nn.Module:  # its observers have grown to their final shapes
    model = trained_aware(seed)
    model(IMAGES * seed)
    return model


def packed(cls: Any, *shape: int, **options: Any) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        module = cls(*shape, **options)
        if hasattr(module, "set_weight_bias"):
            weight = torch.randn(tuple(module.weight().shape))
            module.set_weight_bias(torch.quantize_per_tensor(weight, 0.1 * seed, 0, torch.qint8), torch.randn(shape[1]))
            module.scale, module.zero_point = 0.5 * seed, seed
        else:
            scales, offsets = torch.rand(shape[0]) + 0.5, torch.rand(shape[0])
            dtype = options.get("dtype", torch.quint8)
            weight = torch.quantize_per_channel(torch.rand(shape), scales, offsets, 0, dtype)
            module.set_weight(weight)
        return module

    return build


WHOLE: dict[str, Callable[[int], nn.Module]] = {
    "dynamic": dynamic,
    "float16": half_dynamic,
    "static": static,
    "prepared": prepared,
    "quantization-aware": observed,
}
MODULES: dict[str, Callable[[int], nn.Module]] = {
    "Linear": packed(nnq.Linear, 4, 3),
    "Conv1d": packed(nnq.Conv1d, 2, 3, 3),
    "Conv2d": packed(nnq.Conv2d, 2, 3, 3),
    "ConvTranspose2d": packed(nnq.ConvTranspose2d, 2, 3, 3),
    "Embedding": packed(nnq.Embedding, 5, 8),
    "EmbeddingBag of 4 bits": packed(nnq.EmbeddingBag, 5, 7, dtype=torch.quint4x2),
}


def state_of(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict())


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    have, want = state_of(one), state_of(other)
    assert list(have) == list(want)
    assert all(same_bits(have[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_models(tmp_path, kind):
    trained, want = WHOLE[kind](1), WHOLE[kind](2)
    model = trained_aware(2) if kind == "quantization-aware" else WHOLE[kind](2)
    want.load_state_dict(trained.state_dict())
    wrapped = {f"module.{name}": value for name, value in trained.state_dict().items()}
    metadata = {f"module.{name}" if name else "module": value for name, value in trained.state_dict()._metadata.items()}
    state = OrderedDict(wrapped)
    state._metadata = OrderedDict({"": {"version": 1}, **metadata})
    torch.save(
        {"epoch": 3, "scale": 2.0, "model": state, "args": {"dtype": "half", "bias": [1, 2]}}, tmp_path / "x.pth"
    )
    assert not verify_weights(model, tmp_path / "x.pth")
    report = smart_load(model, tmp_path / "x.pth", verify=True)
    assert (report.key, report.tensors) == ("model", len(trained.state_dict()))
    assert_same_state(model, want)
    found = verify_weights(model, tmp_path / "x.pth")
    assert found.ok, str(found)
    assert found.tensors == report.tensors
    assert torch.equal(model(IMAGES), want(IMAGES))


@pytest.mark.parametrize("kind", MODULES)
def test_single_modules(tmp_path, kind):
    trained, model = MODULES[kind](1), MODULES[kind](2)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    report = verify_weights(model, tmp_path / "x.pth")
    assert not report
    assert any("weight" in difference.name or "packed" in difference.name for difference in report.differing)
    smart_load(model, tmp_path / "x.pth")
    assert_same_state(model, trained)
    assert verify_weights(model, tmp_path / "x.pth")


def test_the_weights_do_not_depend_on_the_file_afterwards(tmp_path):
    trained, model = dynamic(1), dynamic(2)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"\0" * (tmp_path / "x.pth").stat().st_size)
    assert torch.equal(model(IMAGES), trained(IMAGES))


@pytest.mark.parametrize("version", [1, 2])
def test_versions_of_long_ago(tmp_path, version):
    trained, model = MODULES["Linear"](1), MODULES["Linear"](2)
    now = trained.state_dict()
    weight, bias = now["_packed_params._packed_params"]
    prefix = "" if version == 1 else "_packed_params."
    state = OrderedDict({"scale": now["scale"], "zero_point": now["zero_point"]})
    state.update({f"{prefix}weight": weight, f"{prefix}bias": bias})
    state._metadata = OrderedDict({"": {"version": version}, "_packed_params": {"version": 1}})
    torch.save(state, tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth")
    assert_same_state(model, trained)
    assert verify_weights(model, tmp_path / "x.pth")


def test_another_shape_is_refused_although_torch_would_take_it(tmp_path):
    torch.save(MODULES["Linear"](1).state_dict(), tmp_path / "x.pth")
    model = packed(nnq.Linear, 6, 3)(2)
    before = copy.deepcopy(state_of(model))
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_load(model, tmp_path / "x.pth")
    assert caught.value.mismatched == {"_packed_params._packed_params": ((3, 4), (3, 6))}
    assert all(same_bits(value, before[name]) for name, value in state_of(model).items())


def test_one_module_that_refuses_takes_back_the_packed_weights_of_others(tmp_path):
    trained = nn.Sequential(MODULES["Linear"](1), MODULES["Conv2d"](1), nn.Linear(2, 2))
    state = trained.state_dict()
    state["1.zero_point"] = "not a number"
    torch.save(state, tmp_path / "x.pth")
    model = nn.Sequential(MODULES["Linear"](2), MODULES["Conv2d"](2), nn.Linear(2, 2))
    before = copy.deepcopy(state_of(model))
    with pytest.raises(errors.IncompatibleCheckpointError, match="Conv2d at '1' loads itself, and refused"):
        smart_load(model, tmp_path / "x.pth")
    assert all(same_bits(value, before[name]) for name, value in state_of(model).items())


class Refusing:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        if state:
            raise ValueError("no")


def test_resuming_takes_packed_weights_back_too(tmp_path):
    trained, model = (nn.Sequential(MODULES["Linear"](seed), nn.Linear(2, 2)) for seed in (1, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.save({"model": trained.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pth")
    before = copy.deepcopy(state_of(model))
    torch.save(
        {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": {"a": 1}}, tmp_path / "y.pth"
    )
    with pytest.raises(errors.IncompatibleCheckpointError, match="did not accept"):
        smart_resume(model, tmp_path / "y.pth", optimizer, Refusing())
    assert all(same_bits(value, before[name]) for name, value in state_of(model).items())
    smart_resume(model, tmp_path / "x.pth", optimizer)
    assert_same_state(model, trained)


def test_a_quantized_head_may_be_left_alone(tmp_path):
    trained, model = dynamic(1), dynamic(2)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    head = copy.deepcopy(state_of(model[5]))
    report = smart_load(model, tmp_path / "x.pth", skip=["5.*"])
    assert report.tensors == len(trained.state_dict()) - 4
    assert all(same_bits(value, head[name]) for name, value in state_of(model[5]).items())
    assert_same_state(model[4], trained[4])
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("5.")}
    torch.save(state, tmp_path / "rest.pth")
    with pytest.raises(errors.IncompatibleCheckpointError, match=r"5\.\{scale, zero_point\}"):
        smart_load(model, tmp_path / "rest.pth")


def test_float_weights_and_quantized_ones_are_different_models(tmp_path):
    torch.save(MODULES["Linear"](1).state_dict(), tmp_path / "quantized.pth")
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "float.pth")
    with pytest.raises(errors.IncompatibleCheckpointError, match="_packed_params"):
        smart_load(nn.Linear(4, 3), tmp_path / "quantized.pth")
    with pytest.raises(errors.IncompatibleCheckpointError, match="_packed_params"):
        smart_load(MODULES["Linear"](2), tmp_path / "float.pth")


def test_packed_recurrent_weights_are_objects_that_only_code_could_build(tmp_path):
    lstm = pytest.importorskip("torch.ao.nn.quantized.dynamic").LSTM
    torch.save(nn.Sequential(lstm(3, 4)).state_dict(), tmp_path / "x.pth")
    with pytest.raises(errors.IncompatibleCheckpointError, match=r"param is torch\.ScriptObject in the file"):
        smart_load(nn.Sequential(lstm(3, 4)), tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_whole_pickled_modules_are_refused_by_name(tmp_path, kind):
    torch.save(nn.Sequential(MODULES[kind](1)), tmp_path / "x.pth")
    with pytest.raises(errors.IncompatibleCheckpointError, match=r"pickled as a whole \(save its state_dict"):
        smart_load(nn.Sequential(MODULES[kind](2)), tmp_path / "x.pth")
    assert "pickled as a whole" in inspect_checkpoint(tmp_path / "x.pth").tensors[0].kind


# --- without a model ---

per_tensor = torch.quantize_per_tensor(torch.arange(12.0).view(3, 4), 0.1, 5, torch.quint8)
per_channel = torch.quantize_per_channel(torch.randn(3, 4), torch.rand(4) + 0.1, torch.arange(4), 1, torch.qint8)
TENSORS = {
    "per tensor": per_tensor,
    "per channel": per_channel,
    "wide": torch.quantize_per_tensor(torch.randn(5), 0.01, -7, torch.qint32),
    "channels last": torch.quantize_per_tensor(torch.randn(2, 3, 4, 4), 0.1, 0, torch.qint8).to(
        memory_format=torch.channels_last
    ),
    "a view": per_tensor[1:, ::2],
    "empty": torch.quantize_per_tensor(torch.empty(0, 3), 0.1, 0, torch.qint8),
    "no dimensions": torch.quantize_per_tensor(torch.tensor(3.0), 0.1, 0, torch.qint8),
    "float zero points": torch.quantize_per_channel(
        torch.rand(3, 4), torch.rand(3) + 1, torch.rand(3), 0, torch.quint8
    ),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reading(tmp_path, name, zipped):
    torch.save({"w": TENSORS[name], "n": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    want = torch.load(tmp_path / "x.pth", weights_only=True)
    read = read_state_dict(tmp_path / "x.pth")
    assert list(read) == ["w", "n"]
    assert same_bits(read["w"], want["w"])
    assert read["w"].qscheme() == want["w"].qscheme()
    assert name == "a view" or read["w"].stride() == want["w"].stride()
    (info, _) = inspect_checkpoint(tmp_path / "x.pth").tensors
    assert (info.dtype, info.shape) == (want["w"].dtype, tuple(want["w"].shape))
    assert "quantized" in info.kind


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.qint8, torch.quint8, torch.qint32]),
    data=st.data(),
)
def test_law_reading_is_what_torch_reads(tmp_path_factory, shape, dtype, data):
    values = torch.randn(shape)
    if data.draw(st.booleans(), "per channel"):
        axis = data.draw(st.integers(0, len(shape) - 1), "axis")
        size = shape[axis]
        tensor = torch.quantize_per_channel(values, torch.rand(size) + 0.01, torch.arange(size), axis, dtype)
    else:
        tensor = torch.quantize_per_tensor(values, data.draw(st.floats(1e-3, 10)), data.draw(st.integers(0, 9)), dtype)
    order = data.draw(st.permutations(range(len(shape))), "order")
    path = tmp_path_factory.mktemp("law") / "x.pth"
    torch.save({"w": tensor if not data.draw(st.booleans(), "turned") else turned(tensor, order)}, path)
    assert same_bits(read_state_dict(path)["w"], torch.load(path, weights_only=True)["w"])


def turned(tensor: torch.Tensor, order: list[int]) -> torch.Tensor:
    return tensor.permute(order) if tensor.qscheme() == torch.per_tensor_affine else tensor


def test_a_packed_pair_has_a_name_for_each(tmp_path):
    trained = MODULES["Linear"](1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    read = read_state_dict(tmp_path / "x.pth")
    weight, bias = trained._weight_bias()
    assert same_bits(read["_packed_params._packed_params.0"], weight)
    assert same_bits(read["_packed_params._packed_params.1"], bias.detach())
    assert inspect_checkpoint(tmp_path / "x.pth").dtypes["qint8"] == (1, 12)


# --- files that lie ---


def forged(quantizer: tuple[Any, ...], shape: tuple[int, ...] = (3, 4), tensor: torch.Tensor = per_tensor) -> bytes:
    """A checkpoint with a quantized tensor of which the parameters were made up."""

    class Forged:
        def __reduce__(self):
            storage = tensor._typed_storage()
            return torch._utils._rebuild_qtensor, (storage, 0, shape, (shape[-1], 1), quantizer, False, OrderedDict())

    file = io.BytesIO()
    torch.save({"w": Forged(), "n": torch.ones(2)}, file)
    return file.getvalue()


LIES = {
    "too large": forged((torch.per_tensor_affine, 0.1, 0), (3000, 4)),
    "negative": forged((torch.per_tensor_affine, 0.1, 0), (-3, 4)),
    "scale": forged((torch.per_tensor_affine, "0.1", 0)),
    "zero point": forged((torch.per_tensor_affine, 0.1, 1 << 70)),
    "short": forged((torch.per_tensor_affine, 0.1)),
    "nothing": forged(()),
    "no quantizer": forged(None),
    "axis": forged((torch.per_channel_affine, torch.ones(3), torch.zeros(3), 7)),
    "negative axis": forged((torch.per_channel_affine, torch.ones(3), torch.zeros(3), -1)),
    "too few scales": forged((torch.per_channel_affine, torch.ones(2), torch.zeros(3), 0)),
    "too many scales": forged((torch.per_channel_affine, torch.ones(3), torch.zeros(900), 0)),
    "scales of another shape": forged((torch.per_channel_affine, torch.ones(3, 1), torch.zeros(3), 0)),
    "scales of words": forged((torch.per_channel_affine, ["a", "b", "c"], [0, 0, 0], 0)),
    "complex scales": forged((torch.per_channel_affine, torch.ones(3, dtype=torch.complex64), torch.zeros(3), 0)),
    "scales that are none": forged((torch.per_channel_affine, None, torch.zeros(3), 0)),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_found_before_anything_is_built(tmp_path, lie):
    (tmp_path / "x.pth").write_bytes(LIES[lie])
    for function in (inspect_checkpoint, read_state_dict):
        with pytest.raises(errors.CorruptCheckpointError):
            function(tmp_path / "x.pth")


def test_scales_in_lists_as_old_files_have_them(tmp_path):
    (tmp_path / "x.pth").write_bytes(forged((torch.per_channel_affine, [0.5, 1.0, 2.0], [0, 1, 2], 0)))
    want = torch.load(tmp_path / "x.pth", weights_only=True)["w"]
    assert same_bits(read_state_dict(tmp_path / "x.pth")["w"], want)


def test_a_scheme_that_torch_does_not_load_either_is_named(tmp_path):
    (tmp_path / "x.pth").write_bytes(forged((torch.per_channel_symmetric, torch.ones(3), torch.zeros(3), 0)))
    with pytest.raises(errors.IncompatibleCheckpointError, match="quantized"):
        read_state_dict(tmp_path / "x.pth")


def test_nothing_that_a_quantizer_names_is_called(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("ran",)

    for quantizer in ((Trap(), 0.1, 0), (torch.per_tensor_affine, Trap(), 0), Trap()):
        (tmp_path / "x.pth").write_bytes(forged(quantizer))
        with pytest.raises((errors.CorruptCheckpointError, errors.IncompatibleCheckpointError)):
            read_state_dict(tmp_path / "x.pth")


def test_reports_of_quantized_tensors_can_be_pickled(tmp_path):
    torch.save({"w": per_channel}, tmp_path / "x.pth")
    info = inspect_checkpoint(tmp_path / "x.pth")
    assert pickle.loads(pickle.dumps(info)).tensors == info.tensors
