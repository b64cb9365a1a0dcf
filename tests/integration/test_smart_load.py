"""smart_load on real files: the whole way from bytes to model."""

from __future__ import annotations

import argparse
import ast
import copy
import io
import logging
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.versions import can_pickle, register_pre_hook
from torchload import errors, smart_load


class Net(nn.Module):
    """Convolution, batch norm (int64 counter), linear, a tie, a persistent and a transient buffer."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.embed = nn.Embedding(16, 8)
        self.out = nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(8, classes)
        self.register_buffer("scale", torch.rand(()))
        self.register_buffer("scratch", torch.rand(2), persistent=False)


def bits(model):
    return {
        name: value.detach().reshape(-1).view(torch.uint8).clone() if value.numel() else value.shape
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }


def assert_same(model, other, cast=None):
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        want = theirs[name].to(cast) if cast and theirs[name].is_floating_point() else theirs[name]
        assert value.dtype == want.dtype, name
        assert torch.equal(value.cpu(), want.cpu()), name


@pytest.fixture
def trained():
    torch.manual_seed(3)
    return Net()


@pytest.fixture
def model():
    torch.manual_seed(4)
    return Net()


@pytest.fixture
def path(tmp_path, trained):
    file = tmp_path / "net.pth"
    torch.save(
        {
            "epoch": 3,
            "state_dict": nn.DataParallel(trained).state_dict(),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(8, 3, 3, 3)}}},
            "args": argparse.Namespace(lr=0.1),
            "best": np.float64(0.5),
        },
        file,
    )
    return file


def test_the_usual_training_checkpoint(path, model, trained):
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = smart_load(model, path, "cpu")
    assert_same(model, trained)
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert optimizer.param_groups[0]["params"][0] is model.conv.weight
    assert model.out.weight is model.embed.weight
    assert (report.tensors, report.total, report.key) == (11, 11, "state_dict")
    assert report.beside["epoch"] == 3
    assert report.ties == (("embed.weight", "out.weight"),)
    assert report.missing_keys == report.unexpected_keys == []
    text = str(report)
    assert "all 11 tensors loaded" in text
    assert "removed 'module.' from every name" in text
    assert "'epoch' = 3" in text
    assert "model.eval()" in text
    assert "model.eval()" not in str(smart_load(model.eval(), path))


def test_memory_is_written_in_place(path, model):
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    smart_load(model, path, "cpu")
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before


def test_the_report_is_logged_and_nothing_printed(path, model, caplog, capfd):
    with caplog.at_level(logging.INFO, "torchload"):
        report = smart_load(model, path)
    assert [record.getMessage() for record in caplog.records] == [str(report)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_on_the_way(path, model, trained, dtype):
    report = smart_load(model, path, dtype=dtype)
    assert_same(model, trained, cast=dtype)
    assert model.bn.num_batches_tracked.dtype == torch.int64
    assert model.scratch.dtype == dtype
    assert sum(report.casts.values()) == 10
    assert model.out.weight is model.embed.weight


def test_keep_fp32_and_the_models_own_dtype(path, model, trained):
    smart_load(model, path, dtype=torch.float16, keep_fp32=["bn.*"])
    assert model.bn.weight.dtype == model.bn.running_mean.dtype == torch.float32
    assert model.conv.weight.dtype == torch.float16
    half = Net().half()
    smart_load(half, path)
    assert_same(half, trained, cast=torch.float16)
    smart_load(half, path, dtype="auto")
    assert_same(half, trained)


def test_overflow_is_named_and_nothing_changes(tmp_path, trained, model):
    trained.bn.running_var[3] = 1e9
    torch.save(trained.state_dict(), tmp_path / "big.pth")
    before = bits(model)
    with pytest.raises(errors.CastOverflowError, match=r"bn\.running_var") as caught:
        smart_load(model, tmp_path / "big.pth", dtype=torch.float16)
    assert caught.value.tensor == "bn.running_var"
    assert caught.value.largest == pytest.approx(1e9)
    assert caught.value.written == ()
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    smart_load(model, tmp_path / "big.pth", dtype=torch.bfloat16)


def test_what_an_overflow_advises_loads_all_that_would_overflow_and_runs(tmp_path):
    trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    for norm in (trained[1], trained[3]):
        norm.running_var.fill_(1e5)
        norm.running_mean[1] = -1e6
    torch.save(trained.state_dict(), tmp_path / "big.pth")
    model = copy.deepcopy(trained)
    with pytest.raises(errors.CastOverflowError) as caught:
        smart_load(model, tmp_path / "big.pth", dtype=torch.float16)
    for name in ("1.running_mean", "1.running_var", "3.running_mean", "3.running_var"):
        assert name in re.sub(r"(\d)\.\{(\w+), (\w+)\}", r"\1.\2 \1.\3", str(caught.value))
    advised = re.search(r"keep_fp32=(\[.*?\])", str(caught.value))
    smart_load(model, tmp_path / "big.pth", dtype=torch.float16, keep_fp32=ast.literal_eval(advised[1]))
    assert model[0].weight.dtype is torch.float16
    assert model(torch.randn(2, 3, 8, 8).half()).isfinite().all()


@pytest.mark.parametrize(
    ("value", "dtype", "advised", "is_kept"),
    [(1e30, torch.float16, "(bfloat16 or float32)", True), (1e300, torch.float16, "(float64)", False),
     (1e300, torch.float32, "(float64)", False)],
)  # fmt: skip
def test_an_overflow_advises_no_dtype_that_overflows_as_well(tmp_path, value, dtype, advised, is_kept):
    torch.save({"weight": torch.full((2, 2), value, dtype=torch.float64)}, tmp_path / "big.pth")
    with pytest.raises(errors.CastOverflowError) as caught:
        smart_load(nn.Linear(2, 2, bias=False), tmp_path / "big.pth", dtype=dtype)
    assert f"Load in a wider dtype {advised}" in str(caught.value)
    assert ("keep_fp32=['weight']" in str(caught.value)) is is_kept


def test_overflow_in_place_says_what_was_written_and_atomic_writes_nothing(tmp_path, trained):
    trained.head.bias.data[0] = 1e30
    torch.save(trained.state_dict(), tmp_path / "big.pth")
    half = Net().half()
    before = bits(half)
    with pytest.raises(errors.CastOverflowError) as caught:
        smart_load(half, tmp_path / "big.pth", atomic=True)
    assert caught.value.written == ()
    assert all(torch.equal(value, before[name]) for name, value in bits(half).items())
    with pytest.raises(errors.CastOverflowError) as caught:
        smart_load(half, tmp_path / "big.pth")
    changed = {name for name, value in bits(half).items() if not torch.equal(value, before[name])}
    assert changed <= set(caught.value.written)


def test_meta_models_are_materialised_with_their_ties(path, trained):
    class Persistent(Net):
        def __init__(self):
            super().__init__()
            del self.scratch

    with torch.device("meta"):
        model = Persistent()
    parameter = model.conv.weight
    smart_load(model, path)
    assert_same(model, trained)
    assert model.conv.weight is parameter
    assert model.out.weight is model.embed.weight
    assert isinstance(model.conv.weight, nn.Parameter)
    assert model.conv.weight.requires_grad
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])


def test_a_transient_buffer_left_on_meta_is_refused_by_name(path):
    with torch.device("meta"):
        model = Net()
    with pytest.raises(errors.IncompatibleCheckpointError, match="scratch is on the meta device") as caught:
        smart_load(model, path)
    assert all(value.is_meta for value in model.parameters())
    assert len(caught.value.problems) == 1


def test_a_transient_buffer_that_an_old_file_still_has_is_harmless_and_fills_a_meta_model(tmp_path, trained, model):
    torch.save({**trained.state_dict(), "scratch": torch.tensor([1.5, 2.5])}, tmp_path / "old.pth")
    kept = model.scratch.clone()
    with pytest.warns(errors.CheckpointWarning, match=r"scratch in the file is not .* file \[1.5, 2.5\], model"):
        report = smart_load(model, tmp_path / "old.pth")
    assert report.ignored == ("scratch",)
    assert torch.equal(model.scratch, kept)
    with torch.device("meta"):
        empty = Net()
    report = smart_load(empty, tmp_path / "old.pth")
    assert empty.scratch.tolist() == [1.5, 2.5]
    assert report.tensors == report.total == 11
    torch.save({**trained.state_dict(), "scratch": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(errors.IncompatibleCheckpointError, match="scratch"):
        smart_load(model, tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["net.safetensors", "misleading.pth"])
def test_safetensors_whatever_the_suffix(tmp_path, trained, model, name):
    state = trained.state_dict()
    del state["out.weight"]
    save_file(state, tmp_path / name)
    report = smart_load(model, tmp_path / name)
    assert report.format == "safetensors"
    assert_same(model, trained)


def test_every_problem_is_reported_at_once_and_nothing_changes(tmp_path, trained, model):
    state = trained.state_dict()
    state["head.weight"] = torch.zeros(7, 8)
    state["conv.wieght"] = state.pop("conv.weight")
    state["bn.extra"] = torch.zeros(3)
    torch.save(state, tmp_path / "bad.pth")
    before = bits(model)
    with pytest.raises(errors.IncompatibleCheckpointError) as caught:
        smart_load(model, tmp_path / "bad.pth")
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.missing_keys == ["conv.weight"]
    assert error.unexpected_keys == ["conv.wieght", "bn.extra"]
    assert error.mismatched == {"head.weight": ((7, 8), (5, 8))}
    text = str(error)
    assert "did you mean conv.wieght" in text
    assert "file (7, 8)    model (5, 8)" in text
    assert "the model is unchanged" in text
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_skip_names_a_replaced_head(path, trained):
    model = Net(classes=9)
    head = model.head.weight.detach().clone()
    report = smart_load(model, path, skip=["head.*"])
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.conv.weight, trained.conv.weight)
    assert report.skipped == ("head.weight", "head.bias")
    assert report.outside == ()
    with pytest.raises(errors.IncompatibleCheckpointError, match=r"skip=\['head\.\*'\]"):
        smart_load(Net(classes=9), path)


def test_not_strict_warns_of_what_stays_and_refuses_another_model(path, trained):
    model = Net(classes=9)
    with pytest.warns(UserWarning, match=r"kept initial values: head\.\{weight, bias\}"):
        report = smart_load(model, path, strict=False)
    assert list(report.mismatched) == ["head.weight", "head.bias"]
    assert torch.equal(model.conv.weight, trained.conv.weight)
    other = nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)])
    other.bn = nn.BatchNorm2d(8)
    before = bits(other)
    with pytest.raises(errors.IncompatibleCheckpointError, match="this is another model"):
        smart_load(other, path, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in bits(other).items())


def test_wrapped_models_take_plain_checkpoints(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "plain.pth")
    for wrap in (
        nn.DataParallel,
        AveragedModel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    ):
        inner = Net()
        wrapped = wrap(inner)
        smart_load(wrapped, tmp_path / "plain.pth")
        core = wrapped.module if isinstance(wrapped, AveragedModel) else inner
        assert_same(core, trained)


def test_a_device_that_is_not_there_is_refused_before_the_file_is_opened(tmp_path, model):
    with pytest.raises(errors.DeviceError, match="isn't there") as caught:
        smart_load(model, tmp_path / "does-not-exist.pth", "cuda:97")
    assert "cpu" in caught.value.available
    with pytest.raises(errors.DeviceError, match="names no device"):
        smart_load(model, "x", "gpu0")
    with pytest.raises(TypeError):
        smart_load(model, "x", 1.5)


def test_a_mapping_places_parts_and_knows_the_models_parts(path, model):
    smart_load(model, path, {"conv": "cpu", "": "cpu"})
    with pytest.raises(errors.IncompatibleCheckpointError, match="'decoder'"):
        smart_load(model, path, {"decoder": "cpu"})


def test_views_strides_and_odd_shapes(tmp_path):
    base = torch.randn(6, 4)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.transposed = nn.Parameter(torch.zeros(4, 6))
            self.row = nn.Parameter(torch.zeros(4))
            self.expanded = nn.Parameter(torch.zeros(3, 5))
            self.scalar = nn.Parameter(torch.zeros(()))
            self.empty = nn.Parameter(torch.zeros(0, 7))
            self.channels_last = nn.Parameter(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
            self.overlapping = nn.Parameter(torch.zeros(3, 3))

    state = {
        "transposed": base.t(),
        "row": base[2],
        "expanded": torch.randn(5).expand(3, 5),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 7),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "overlapping": torch.as_strided(torch.randn(5), (3, 3), (1, 1)),
    }
    torch.save(state, tmp_path / "odd.pth")
    for dtype in (None, torch.float64):
        model = Odd()
        smart_load(model, tmp_path / "odd.pth", dtype=dtype)
        for name, value in state.items():
            assert torch.equal(getattr(model, name).float(), value), name
        assert model.channels_last.is_contiguous(memory_format=torch.channels_last)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
    torch.uint32, torch.uint64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_every_dtype_arrives_bit_for_bit(tmp_path, dtype, suffix):
    if suffix == "safetensors" and dtype is torch.complex128:
        pytest.skip("safetensors has no complex128")
    if suffix == "pth" and not can_pickle(dtype):
        pytest.skip("this torch can't save it")
    raw = torch.randint(0, 2 if dtype is torch.bool else 100, (3, 2, dtype.itemsize), dtype=torch.uint8)
    value = raw.view(dtype).reshape(3, 2)
    (torch.save if suffix == "pth" else save_file)({"value": value}, tmp_path / f"x.{suffix}")
    model = nn.Module()
    model.register_buffer("value", torch.zeros(3, 2).to(dtype))
    smart_load(model, tmp_path / f"x.{suffix}")
    assert model.value.dtype is dtype
    assert torch.equal(model.value.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize(
    ("stored", "held", "words"),
    [
        (torch.complex64, torch.float32, "imaginary"),
        (torch.float32, torch.int64, "fractions"),
        (torch.int64, torch.int8, "out of range"),
        (torch.int64, torch.bool, "out of range"),
    ],
)
def test_casts_that_lose_meaning_are_refused(tmp_path, stored, held, words):
    torch.save({"value": torch.tensor([1.0, 300.5]).to(stored)}, tmp_path / "x.pth")
    model = nn.Module()
    model.register_buffer("value", torch.zeros(2).to(held))
    with pytest.raises(errors.IncompatibleCheckpointError, match=words):
        smart_load(model, tmp_path / "x.pth")


@pytest.mark.parametrize(("stored", "held"), [(torch.uint8, torch.bool), (torch.int32, torch.int64)])
def test_casts_that_keep_meaning_are_made(tmp_path, stored, held):
    torch.save({"value": torch.tensor([0, 1]).to(stored)}, tmp_path / "x.pth")
    model = nn.Module()
    model.register_buffer("value", torch.tensor([1, 0]).to(held))
    smart_load(model, tmp_path / "x.pth")
    assert model.value.tolist() == [0, 1]


def test_one_element_of_an_old_file_fills_a_scalar_and_more_do_not(tmp_path):
    model = nn.Module()
    model.register_buffer("value", torch.zeros(()))
    torch.save({"value": torch.tensor([2.5])}, tmp_path / "one.pth")
    smart_load(model, tmp_path / "one.pth")
    assert model.value.item() == 2.5
    torch.save({"value": torch.tensor([1.0, 2.0])}, tmp_path / "two.pth")
    with pytest.raises(errors.IncompatibleCheckpointError, match="another shape"):
        smart_load(model, tmp_path / "two.pth")


def test_tied_names_that_differ_in_the_file_are_refused(tmp_path, trained, model):
    state = trained.state_dict()
    state["out.weight"] = state["embed.weight"] + 1
    torch.save(state, tmp_path / "untied.pth")
    before = bits(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="differ in the file, but the model ties them"):
        smart_load(model, tmp_path / "untied.pth")
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    state["out.weight"] = state["embed.weight"].clone()  # equal copies are fine
    torch.save(state, tmp_path / "copied.pth")
    smart_load(model, tmp_path / "copied.pth")
    assert_same(model, trained)


def test_verify_finds_a_flipped_bit_before_anything_is_written(path, model):
    data = bytearray(path.read_bytes())
    where = data.find(
        model_bytes := bytes(
            torch.load(path, weights_only=False)["state_dict"]["module.conv.weight"]
            .reshape(-1)
            .view(torch.uint8)
            .tolist()
        )
    )
    assert where > 0
    data[where + len(model_bytes) // 2] ^= 1
    path.write_bytes(data)
    before = bits(model)
    with pytest.raises(errors.CorruptCheckpointError, match="checksum"):
        smart_load(model, path, verify=True)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_verify_of_a_sound_file(path, model, trained):
    smart_load(model, path, verify=True)
    assert_same(model, trained)


def test_atomic_leaves_parameters_the_same_objects(path, model, trained):
    parameters = dict(model.named_parameters())
    smart_load(model, path, atomic=True)
    assert_same(model, trained)
    assert all(parameters[name] is value for name, value in model.named_parameters())


def test_mmap_shares_the_file_and_writes_stay_private(path, model, trained):
    smart_load(model, path, mmap=True)
    assert_same(model, trained)
    with torch.no_grad():
        model.conv.weight.zero_()
    again = Net()
    smart_load(again, path)
    assert_same(again, trained)


def test_progress_reaches_the_total(path, model):
    seen = []
    smart_load(model, path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    smart_load(model, path, progress=True)


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), lambda: torch.autocast("cpu", torch.bfloat16)],
)
def test_the_callers_modes_change_nothing(path, trained, mode):
    model = Net()
    with mode():
        smart_load(model, path)
    assert_same(model, trained)
    assert not model.conv.weight.is_inference()
    assert model.conv.weight.requires_grad


def test_extra_state_and_hooks_are_honoured(tmp_path):
    class Stateful(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.tag = {"version": 0}

        def get_extra_state(self):
            return dict(self.tag)

        def set_extra_state(self, state):
            self.tag = state

    class Renamed(nn.Module):
        def __init__(self, old=False):
            super().__init__()
            self.fc = nn.Linear(2, 3)
            register_pre_hook(self, self._upgrade)
            self.seen = None
            self.register_load_state_dict_post_hook(self._done)

        @staticmethod
        def _upgrade(module, state, prefix, metadata, *_):
            if prefix + "linear.w" in state:
                state[prefix + "fc.weight"] = state.pop(prefix + "linear.w").t()
                state[prefix + "fc.bias"] = state.pop(prefix + "linear.b")

        @staticmethod
        def _done(module, incompatible):
            module.seen = incompatible

    first = Stateful()
    first.tag = {"version": 3, "scale": torch.ones(2)}
    torch.save({"model": first.state_dict()}, tmp_path / "state.pth")
    second = Stateful()
    smart_load(second, tmp_path / "state.pth")
    assert second.tag["version"] == 3
    assert torch.equal(second.tag["scale"], torch.ones(2))

    old = {"sub.linear.w": torch.randn(2, 3), "sub.linear.b": torch.randn(3), "other.weight": torch.randn(1, 2)}
    model = nn.ModuleDict({"sub": Renamed(), "other": nn.Linear(2, 1, bias=False)})
    torch.save(old, tmp_path / "old.pth")
    smart_load(model, tmp_path / "old.pth")
    assert torch.equal(model["sub"].fc.weight, old["sub.linear.w"].t())
    assert torch.equal(model["sub"].fc.bias, old["sub.linear.b"])
    assert model["sub"].seen.missing_keys == []


def test_a_module_that_loads_itself_is_left_as_it_was_when_it_refuses(tmp_path):
    class Own(nn.Linear):
        refuse = False

        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
            super()._load_from_state_dict(state_dict, prefix, *args)
            if self.refuse:
                args[-1].append("no")

    source = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "x.pth")
    model = nn.ModuleDict({"a": Own(2, 2), "b": nn.Linear(2, 2)})
    smart_load(model, tmp_path / "x.pth")
    assert torch.equal(model["a"].weight, source["a"].weight * 2)
    assert torch.equal(model["b"].weight, source["b"].weight)
    refusing = copy.deepcopy(nn.ModuleDict({"a": Own(2, 2), "b": nn.Linear(2, 2)}))
    refusing["a"].refuse = True
    before = bits(refusing)
    with pytest.raises(errors.IncompatibleCheckpointError, match="loads itself, and refused"):
        smart_load(refusing, tmp_path / "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in bits(refusing).items())


def test_lazy_modules_take_the_files_shapes(tmp_path):
    source = nn.Linear(4, 3)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    lazy = nn.LazyLinear(3)
    smart_load(lazy, tmp_path / "x.pth")
    assert torch.equal(lazy(torch.ones(1, 4)), source(torch.ones(1, 4)))


def test_bytes_in_memory(trained, model):
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    smart_load(model, file)
    assert_same(model, trained)


def test_wrong_arguments_are_told_apart(path, model):
    for call in (
        lambda: smart_load(path, model),
        lambda: smart_load(model, path, dtype=torch.int64),
        lambda: smart_load(model, path, dtype="half"),
        lambda: smart_load(model, path, skip="head.*"),
    ):
        with pytest.raises(TypeError):
            call()


def test_metadata_reaches_version_upgrades(tmp_path):
    source = nn.utils.spectral_norm(nn.Linear(3, 3))
    state = source.state_dict()
    wrapped = OrderedDict(("module." + name, value) for name, value in state.items())
    wrapped._metadata = OrderedDict(("module." + name if name else "module", v) for name, v in state._metadata.items())
    torch.save({"state_dict": wrapped}, tmp_path / "sn.pth")
    model = nn.utils.spectral_norm(nn.Linear(3, 3))
    smart_load(model, tmp_path / "sn.pth")
    assert_same(model, source)


def test_a_missing_file_names_its_neighbours(path, model):
    with pytest.raises(errors.CheckpointNotFoundError, match="net.pth"):
        smart_load(model, path.parent / "nte.pth")
