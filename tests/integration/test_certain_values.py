"""Values that a load depends on: whole numbers kept as floats, quantized weights, constants; patterns and arguments."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import torchload
from tests.certainty import loads
from torchload import errors, read_state_dict, smart_load, smart_resume, verify_weights

HALVES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Net(nn.Module):
    """Weights, a counter and constants."""

    def __init__(self, positions: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)
        self.register_buffer("position_ids", torch.arange(positions))
        self.register_buffer("flags", torch.tensor([True, False]))


def refused(model, path, words, **arguments):
    """It is refused in these words, with the model unchanged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(errors.IncompatibleCheckpointError, match=words) as caught:
        smart_load(model, path, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


# --- whole numbers kept as floats ---


@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_dict_that_was_cast_as_a_whole_loads(save, dtype):
    saved = Net()
    saved.bn.num_batches_tracked.fill_(37)
    saved.position_ids.add_(3)
    path = save({name: value.to(dtype) for name, value in saved.state_dict().items()})
    model = Net()
    assert loads(model, path).tensors == len(saved.state_dict())
    assert model.bn.num_batches_tracked == 37
    assert torch.equal(model.position_ids, saved.position_ids)
    assert model.flags.tolist() == [True, False]
    assert verify_weights(model, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_above_what_a_dtype_counts_are_the_models_own_or_refused(save, tmp_path, dtype):
    count = {torch.bfloat16: 600, torch.float16: 5_000}[dtype]
    state = {name: value.to(dtype) for name, value in Net(count).state_dict().items()}
    assert not torch.equal(state["position_ids"].long(), torch.arange(count))  # whole, in range, and wrong
    model = Net(count)
    report = loads(model, save(state))
    assert torch.equal(model.position_ids, torch.arange(count))
    assert "position_ids" in report.ignored
    assert verify_weights(model, tmp_path / "x.pth")
    renamed = {("table" if name == "position_ids" else name): value for name, value in state.items()}

    class Other(Net):
        def __init__(self) -> None:
            super().__init__(count)
            del self.position_ids
            self.register_buffer("table", torch.zeros(count, dtype=torch.int64))

    refused(Other(), save(renamed), "table is .* can't tell whole numbers above")


@pytest.mark.parametrize("value", [0.5, 70_000.0, float("inf"), float("nan")])
def test_a_counter_never_stops_a_load(save, value):
    state = Net().state_dict()
    state["bn.num_batches_tracked"] = torch.tensor(value).half()
    model = Net()
    model.bn.num_batches_tracked.fill_(5)
    report = loads(model, save(state))
    assert model.bn.num_batches_tracked == 5
    assert "bn.num_batches_tracked" in report.ignored


def test_fractions_and_what_is_out_of_range_are_refused(save):
    state = {**Net().state_dict(), "flags": torch.tensor([1.0, 2.0])}
    refused(Net(), save(state), "flags is float32 in the file, with numbers that bool")
    model = nn.Module()
    model.register_buffer("table", torch.zeros(2, dtype=torch.uint8))
    refused(model, save({"table": torch.tensor([1.0, -1.0])}), "out of range")
    refused(model, save({"table": torch.tensor([1.0, 1.5])}), "fractions")


# --- quantized weights ---


def model(**names):
    return nn.ModuleDict(names or {"body": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})


def float8(state, name="fc.weight"):
    return {**state, name: (state[name] * 100).to(torch.float8_e4m3fn)}


def int8(state, name="fc.weight"):
    return {**state, name: (state[name] * 100).to(torch.int8)}


def scaled(quantize, **scales):
    state = quantize(model().state_dict())
    return {**state, **{f"fc.{name}": value for name, value in scales.items()}}


ONE = torch.tensor([0.01])
QUANTIZED = {
    "int8 alone": lambda: int8(model().state_dict()),
    "int8 in a container beside scales": lambda: {"state_dict": int8(model().state_dict()), "scales": {"fc": ONE}},
    "bitsandbytes 8 bit": lambda: scaled(int8, SCB=torch.ones(4)),
    "compressed-tensors": lambda: scaled(float8, weight_scale=ONE),
    "DeepSeek": lambda: scaled(float8, weight_scale_inv=ONE),
    "scale": lambda: scaled(float8, scale=ONE),
    "beside in a container": lambda: {"model": float8(model().state_dict()), "weight_scales": {"fc": ONE}},
    "zero points": lambda: scaled(int8, zero_point=torch.zeros(1)),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_are_named_and_their_scales_never_advised_away(save, case):
    path = save(QUANTIZED[case]())
    message = refused(model(), path, "dequantize them first")
    assert "fc.weight" in message
    assert "skip=" not in message
    refused(model(), path, "dequantize them first", skip=["*scale*", "*SCB", "*zero_point", "body.bias"])


@pytest.mark.parametrize("packed", ["qweight", "weight_packed", "weight.absmax"])
def test_packed_weights_are_named(save, packed):
    state = model().state_dict()
    del state["fc.weight"]
    state |= {f"fc.{packed}": torch.ones(2, 4, dtype=torch.int32), "fc.scales": torch.ones(4)}
    assert "skip=" not in refused(model(), save(state), "the file holds .*(packed|4-bit)")


def test_a_header_and_a_config_beside_the_file_say_so(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = float8(model().state_dict())
    path = tmp_path / "x.safetensors"
    safetensors.save_file(state, path, {"quantization": '{"quant_method": "fp8"}'})
    refused(model(), path, "header's 'quantization'")
    safetensors.save_file(state, path, {"format": "pt"})
    with pytest.warns(errors.CheckpointWarning, match="no scale"):
        smart_load(model(), path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    refused(model(), path, "config.json")


def test_plain_8_bit_floats_are_cast_with_a_warning(save):
    state = {name: value.to(torch.float8_e4m3fn) for name, value in model().state_dict().items()}
    loaded = model()
    with pytest.warns(errors.CheckpointWarning, match="4 tensors of the file are 8-bit floats"):
        smart_load(loaded, save(state))
    assert torch.equal(loaded["fc"].weight, state["fc.weight"].float())
    assert loads(model(), save(state), dtype="auto").tensors == 4


def test_observers_beside_float_weights_and_models_that_own_their_scales_load(save):
    class Scaled(nn.Linear):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
            self.register_buffer("weight_scale", torch.ones(1))

    for dtype in (torch.float32, torch.int8, torch.float8_e4m3fn):
        saved, loaded = model(fc=Scaled(dtype)), model(fc=Scaled(dtype))
        loads(loaded, save(saved.state_dict()))
    loads(model(fc=Scaled(torch.float32)), save({**model(fc=Scaled(torch.int8)).state_dict()}))


# --- constants ---


class Rotary(nn.Module):
    def __init__(self, base: float = 1e4, mean: float = 0.5, *, persistent: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.register_buffer("inv_freq", base ** -(torch.arange(0, 8, 2) / 8), persistent=persistent)
        self.register_buffer("pixel_mean", torch.full((3,), mean), persistent=persistent)


@pytest.mark.parametrize("change", [{"base": 1e6}, {"mean": 123.0}])
def test_a_constant_that_differs_is_a_warning_with_both_values(save, change):
    path = save(Rotary(persistent=True).state_dict())
    model = Rotary(**change)
    name = "inv_freq" if "base" in change else "pixel_mean"
    with pytest.warns(errors.CheckpointWarning, match=rf"{name} in the file is not what the model computes: file \["):
        smart_load(model, path)
    own = Rotary(**change)
    assert torch.equal(getattr(model, name), getattr(own, name))  # kept
    before = model.q.weight.clone()
    torch.nn.init.zeros_(model.q.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(errors.CheckpointWarning):
            smart_load(model, path)
    assert not model.q.weight.any()  # refused before the first byte
    assert before.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_constants_are_ignored_to_rounding(save, dtype):
    state = {name: value.to(dtype) for name, value in Rotary(persistent=True).state_dict().items()}
    state["inv_freq"] = (1.0 / (1e4 ** (torch.arange(0, 8, 2).float() / 8))).to(dtype)  # the formula's other spelling
    assert set(loads(Rotary(), save(state)).ignored) == {"inv_freq", "pixel_mean"}


def test_old_llama_has_one_constant_per_layer(save):
    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.rotary = Rotary()
            del self.rotary.q, self.rotary.pixel_mean

    own = Llama()
    old = {f"layers.{index}.rotary_emb.inv_freq": own.rotary.inv_freq.half() for index in range(3)}
    assert set(loads(Llama(), save({**own.state_dict(), **old})).ignored) == set(old)
    other = {name: value * 2 for name, value in old.items()}
    with pytest.warns(errors.CheckpointWarning) as caught:
        smart_load(Llama(), save({**own.state_dict(), **other}))
    assert len(caught) == 1  # one layer speaks for the others


# --- strict=False ---


def test_no_layer_is_half_old_and_half_new(save):
    saved = model(body=nn.Linear(4, 4), fc=nn.Linear(3, 4), norm=nn.LayerNorm(4))
    loaded = model(body=nn.Linear(4, 4), fc=nn.Linear(5, 4), norm=nn.LayerNorm(4))
    before = loaded["fc"].bias.clone()
    with pytest.warns(errors.CheckpointWarning, match=r"kept initial values: fc.\{bias, weight\}"):
        report = smart_load(loaded, save(saved.state_dict()), strict=False)
    assert torch.equal(loaded["fc"].bias, before)
    assert torch.equal(loaded["body"].weight, saved["body"].weight)
    assert set(report.missing_keys) | set(report.mismatched) == {"fc.weight", "fc.bias"}


def test_an_absent_tensor_and_parameters_of_the_root_hold_nothing_back(save):
    class Vit(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(size, 4))
            self.fc = nn.Linear(4, 4)

    saved, loaded = Vit(3), Vit(5)
    state = saved.state_dict()
    del state["fc.bias"]
    with pytest.warns(errors.CheckpointWarning):
        smart_load(loaded, save(state), strict=False)
    assert torch.equal(loaded.cls_token, saved.cls_token)
    assert torch.equal(loaded.fc.weight, saved.fc.weight)


def test_a_layer_of_a_recurrent_module_holds_back_no_other(save):
    saved, loaded = model(rnn=nn.LSTM(3, 4, 2)), model(rnn=nn.LSTM(5, 4, 2))
    with pytest.warns(errors.CheckpointWarning):
        smart_load(loaded, save(saved.state_dict()), strict=False)
    assert torch.equal(loaded["rnn"].weight_ih_l1, saved["rnn"].weight_ih_l1)
    assert not torch.equal(loaded["rnn"].bias_ih_l0, saved["rnn"].bias_ih_l0)


def test_a_transposed_matrix_refuses(save):
    saved = model(up=nn.Linear(4, 6), square=nn.Linear(4, 4))
    state = {name: value.T.contiguous() if value.dim() == 2 else value for name, value in saved.state_dict().items()}
    refused(model(up=nn.Linear(4, 6), square=nn.Linear(4, 4)), save(state), "the other way round", strict=False)


def test_a_small_file_that_is_used_up_loads(save):
    def large() -> nn.ModuleDict:
        return model(body=nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)]), prompt=nn.Linear(2, 2))

    adapter = {name: value for name, value in large().state_dict().items() if name.startswith("prompt")}
    loaded = large()
    with pytest.warns(errors.CheckpointWarning, match="60 tensors of the model kept initial values"):
        smart_load(loaded, save({"model": adapter}), strict=False)
    assert torch.equal(loaded["prompt"].weight, adapter["prompt.weight"])
    refused(large(), save({**adapter, "other.weight": torch.ones(2)}), "another model", strict=False)


def test_an_average_under_strict_false_is_a_warning(save):
    state = model().state_dict()
    path = save({"model": state, "ema": {name: value + 1 for name, value in state.items()}})
    loads(model(), path)
    with pytest.warns(errors.CheckpointWarning, match="averaged weights, 'ema'"):
        smart_load(model(), path, strict=False)


def test_it_is_never_less_than_strict_would_be(save):
    state = model().state_dict()
    extra = {f"head{index}.weight": torch.ones(2) for index in range(9)}
    loaded = model()
    loads(loaded, save({"large": {**extra, "fc.weight": torch.ones(4, 4)}, "whole": state}), strict=False)
    assert torch.equal(loaded["body"].weight, state["body.weight"])


# --- patterns ---


@pytest.mark.parametrize(
    "arguments",
    [{"skip": ["classifier.*"]}, {"dtype": torch.float16, "keep_fp32": ["*.nrom*"]}, {"rename": {"^bakcbone": "body"}}],
)
@pytest.mark.parametrize("strict", [True, False])
def test_patterns_of_which_none_matches_are_an_error(save, arguments, strict):
    refused(model(), save(model().state_dict()), "matches no name", strict=strict, **arguments)


def test_one_among_others_is_a_warning_with_near_names(save):
    path = save(model().state_dict())
    with pytest.warns(errors.CheckpointWarning, match=r"'fcc\.\*', which matches no name .* Near it: 'fc\."):
        smart_load(model(), path, skip=["fc.*", "fcc.*"])
    with pytest.warns(errors.CheckpointWarning, match="rename= has 'old'"):
        smart_load(model(), save({f"net.{name}": value for name, value in model().state_dict().items()}),
                   rename={"^net[.]": "", "old": "new"})  # fmt: skip


@pytest.mark.parametrize("skip", [["fc.*"], ["module.fc.*"]])
def test_globs_apply_to_the_bare_names_of_a_wrapped_model(save, skip):
    wrapped = nn.DataParallel(model())
    before = wrapped.module["fc"].weight.clone()
    report = loads(wrapped, save(model().state_dict()), skip=skip)
    assert torch.equal(wrapped.module["fc"].weight, before)
    assert set(report.skipped) == {"module.fc.weight", "module.fc.bias"}
    report = loads(nn.DataParallel(model()), save(model().state_dict()), dtype=torch.float16, keep_fp32=["fc.*"])
    assert report.casts == {("float32", "float16"): 2}


def test_a_child_that_is_called_module_is_no_wrapper(save):
    own = nn.ModuleDict({"module": model(), "fc": nn.Linear(4, 4)})
    report = loads(own, save(own.state_dict()), skip=["fc.*"])
    assert set(report.skipped) == {"fc.weight", "fc.bias"}


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"rename": [("a", "b")]}, TypeError, "rename is a mapping"),
        ({"rename": {"(": "b"}}, ValueError, "rename has '\\('"),
        ({"rename": {"a": r"\2"}}, ValueError, "rename has 'a'"),
        ({"rename": {"a": 3}}, TypeError, "rename maps text"),
        ({"prefix": 3}, TypeError, "prefix is"),
        ({"key": ["a"]}, TypeError, "key is"),
        ({"strict": "no"}, TypeError, "strict is"),
        ({"skip": [3]}, TypeError, "skip is a list of globs"),
        ({"map_location": "cpu"}, TypeError, "give device="),
        ({"weights_only": True}, TypeError, "leave it out"),
        ({"fp16": True}, TypeError, r"give dtype=torch\.float16"),
        ({"exclude": ["fc"]}, TypeError, "give skip="),
        ({"Skip": []}, TypeError, r"did you mean skip=\?"),
        ({"learning": 1}, TypeError, "it takes model, path, "),
    ],
)
def test_arguments_that_no_file_could_make_right(save, arguments, kind, words):
    path = save(model().state_dict())
    for call in (smart_load, smart_resume):
        with pytest.raises(kind, match=words):
            call(model(), path, **arguments)
    if "map_location" in arguments:
        with pytest.raises(kind, match=words):
            read_state_dict(path, **arguments)


def test_names_of_torch_lead_to_those_of_torchload():
    with pytest.raises(AttributeError, match="smart_load"):
        torchload.load  # noqa: B018


def test_a_device_mapping_the_wrong_way_round(save):
    path = save(model().state_dict())
    refused(model(), path, "names of modules", device={"cuda:0": "cpu"})
