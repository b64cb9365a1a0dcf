"""smart_save on real files, read back by torch, by safetensors, and by torchload itself."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import zipfile

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from tests.versions import can_pickle
from torchload import errors, read_state_dict, smart_load, smart_save, verify_weights

SUFFIXES = [".pth", ".safetensors"]


class Net(nn.Module):
    """A child that is really called `module`, a tie, odd layouts, and buffers of many kinds."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.embed = nn.Embedding(6, 3)
        self.out = nn.Linear(3, 6, bias=False)
        self.out.weight = self.embed.weight
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer(
            "small", torch.tensor([1, 2, 3], dtype=torch.uint16 if can_pickle(torch.uint16) else torch.int16)
        )
        self.register_buffer("coarse", torch.randn(4).to(torch.float8_e4m3fn))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


def read(path):
    return load_file(path) if str(path).endswith(".safetensors") else torch.load(path, weights_only=True)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_holds(state, model, dtype=None):
    for name, value in state.items():
        want = model.state_dict()[name]
        want = want.to(dtype) if dtype is not None and want.is_floating_point() else want
        assert value.dtype == want.dtype, name
        assert value.shape == want.shape, name
        assert torch.equal(bits(value), bits(want)), name


# --- what others read ---


@pytest.mark.parametrize("mmap", [False, True])
def test_pth_is_what_torch_load_reads(tmp_path, mmap):
    model = Net()
    smart_save(model, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True, mmap=mmap)
    assert list(state) == list(model.state_dict())
    assert state._metadata == model.state_dict()._metadata
    assert_holds(state, model)
    assert all(value.stride() == model.state_dict()[name].stride() for name, value in state.items())
    Net().load_state_dict(state)


def test_records_are_aligned_and_carry_checksums(tmp_path):
    smart_save(Net(), tmp_path / "model.pth")
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        assert archive.testzip() is None
        data = [record for record in archive.infolist() if "/data/" in record.filename]
        assert len(data) > 10
        assert all(record.CRC for record in data if record.file_size)
        content = (tmp_path / "model.pth").read_bytes()
        for record in data:
            names = int.from_bytes(content[record.header_offset + 26 :][:2], "little")
            extra = int.from_bytes(content[record.header_offset + 28 :][:2], "little")
            assert (record.header_offset + 30 + names + extra) % 64 == 0


def test_safetensors_is_what_safetensors_reads(tmp_path):
    model = Net()
    smart_save(model, tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert set(model.state_dict()) - set(state) == {"out.weight"}
    assert_holds(state, model)
    other = Net()
    load_model(other, tmp_path / "model.safetensors")
    assert verify_weights(other, tmp_path / "model.safetensors").ok
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "out.weight": "embed.weight"}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".PTH"])
def test_the_suffix_decides(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    report = smart_save(Net(), str(path))
    assert report.format == ("safetensors" if suffix == ".safetensors" else "zip checkpoint")
    other = Net()
    smart_load(other, path, verify=True)
    assert verify_weights(other, path).ok


@pytest.mark.parametrize("name", ["model.onnx", "model.pth.gz", "step.5"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.safetensors"):
        smart_save(Net(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"weight": torch.ones(1)}, "x.pth"), "an nn.Module, not dict"),
        ((Net(), 3), "name of the file"),
        ((Net(), b"x.pth"), "name of the file to write, not bytes"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(TypeError, match=words):
        smart_save(*arguments)


def test_wrong_dtypes(tmp_path):
    with pytest.raises(TypeError, match="floating-point"):
        smart_save(Net(), tmp_path / "x.pth", dtype=torch.int8)
    with pytest.raises(TypeError, match="list of globs"):
        smart_save(Net(), tmp_path / "x.pth", keep_fp32="norm.*")


# --- names ---


class Outer(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child
        self.module = nn.Linear(2, 2)


def wrapped_models():
    def compiled(model):
        return torch.compile(model, backend="eager")

    yield "plain", Net, lambda model: model
    yield "data parallel", Net, nn.DataParallel
    yield "twice", Net, lambda model: nn.DataParallel(nn.DataParallel(model))
    yield "compiled", Net, compiled
    yield "compiled inside data parallel", Net, lambda model: nn.DataParallel(compiled(model))
    yield "data parallel inside compiled", Net, lambda model: compiled(nn.DataParallel(model))
    yield "averaged", Net, AveragedModel
    yield "checkpointed", Net, checkpoint_wrapper


WRAPPED = list(wrapped_models())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("build", "wrap"), [case[1:] for case in WRAPPED], ids=[case[0] for case in WRAPPED])
def test_wrappers_leave_no_trace_at_the_top_and_inside(tmp_path, suffix, build, wrap):
    path = tmp_path / f"model{suffix}"
    model = build()
    smart_save(wrap(model), path)
    assert set(read_state_dict(path)) == set(model.state_dict())
    assert_holds(read(path), model)
    outer = Outer(build())
    plain = outer.state_dict()
    outer.child = wrap(outer.child)
    smart_save(outer, path)
    assert set(read_state_dict(path)) == set(plain)


def test_module_versions_follow_the_names(tmp_path):
    model = nn.Sequential(nn.DataParallel(nn.BatchNorm1d(2)), nn.Linear(2, 2))
    smart_save(model, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert state._metadata["0"] == {"version": 2}
    assert set(state._metadata) == {"", "0", "1"}


def test_without_wrappers_names_may_collide(tmp_path):
    class Odd(nn.DataParallel):
        def __init__(self, module):
            super().__init__(module)
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="two tensors called '0.weight'"):
        smart_save(nn.Sequential(Odd(nn.Linear(2, 2))), tmp_path / "model.pth")


# --- ties ---


def test_ties_share_storage_in_pth_and_data_in_safetensors(tmp_path):
    model = Net()
    report = smart_save(model, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert state["embed.weight"].data_ptr() == state["out.weight"].data_ptr()
    assert report.ties == (("embed.weight", "out.weight"),)
    assert "tied    embed.weight = out.weight" in str(report)
    other = Net()
    smart_load(other, tmp_path / "model.pth")
    assert other.embed.weight is other.out.weight


def test_views_of_one_another_stay_so_in_pth(tmp_path):
    model = nn.Module()
    whole = torch.arange(12.0)
    model.register_buffer("whole", whole)
    model.register_buffer("rows", whole[4:].view(2, 4))
    smart_save(model, tmp_path / "model.pth", dtype=torch.float16)
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    state["rows"].zero_()
    assert state["whole"].tolist() == [0, 1, 2, 3, *[0] * 8]


def test_a_slice_is_stored_without_the_rest(tmp_path):
    model = nn.Module()
    model.register_buffer("slice", torch.zeros(1_000_000)[10:20])
    smart_save(model, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").stat().st_size < 4000


# --- casting ---


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_happen_in_the_file_only(tmp_path, suffix, dtype):
    model = Net()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    report = smart_save(model, tmp_path / f"model{suffix}", dtype=dtype)
    assert_holds(read(tmp_path / f"model{suffix}"), model, dtype)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(bits(value), bits(before[name][1]))
    assert ("float32", str(dtype).removeprefix("torch.")) in report.casts


def test_keep_fp32(tmp_path):
    smart_save(Net(), tmp_path / "model.pth", dtype=torch.float16, keep_fp32=["norm.*"])
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert state["norm.weight"].dtype is torch.float32
    assert state["module.weight"].dtype is torch.float16
    assert state["norm.num_batches_tracked"].dtype is torch.int64


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_overflow_is_named_and_leaves_what_was_there(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    model = Net()
    smart_save(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        model.norm.running_var[1] = 1e9
    with pytest.raises(errors.CastOverflowError, match=r"norm\.running_var.*Nothing was saved") as caught:
        smart_save(model, path, dtype=torch.float16)
    assert caught.value.tensor == "norm.running_var"
    assert caught.value.largest == 1e9
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    smart_save(model, path, dtype=torch.float16, keep_fp32=["norm.*"])


@pytest.mark.parametrize("suffix", [*SUFFIXES, ""])
def test_all_that_overflows_is_named_and_the_advice_saves(tmp_path, suffix):
    model = Net()
    with torch.no_grad():
        model.norm.running_var[1] = 1e9
        model.norm.running_mean[0] = -1e6
        model.module.weight[0, 0] = 1e5
    with pytest.raises(errors.CastOverflowError) as caught:
        smart_save(model, tmp_path / f"model{suffix}", dtype=torch.float16)
    for name in ("norm", "running_var", "running_mean", "module.weight"):
        assert name in str(caught.value)
    assert not list(tmp_path.iterdir())
    [advice] = re.findall(r"(keep_fp32=\[.*\])\.$", str(caught.value))
    smart_save(model, tmp_path / f"model{suffix}", dtype=torch.float16, **eval(f"dict({advice})"))


def test_large_tensors_go_through_small_memory(tmp_path):
    code = """
import resource, sys, torch
from torch import nn
from torchload import smart_save
model = nn.Linear(4096, 12288, bias=False)
smart_save(nn.Linear(2, 2), sys.argv[1] + "/warm.pth", dtype=torch.float16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
smart_save(model, sys.argv[1] + "/model.pth", dtype=torch.float16)
smart_save(model, sys.argv[1] + "/model.safetensors", dtype=torch.float16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024  # KiB; the model in half precision has 96 MiB


# --- what can't be saved ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_without_values_are_refused(tmp_path, suffix):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"meta device.*0\.\{weight, bias\}") as caught:
        smart_save(model, tmp_path / f"model{suffix}")
    assert "not initialised yet" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatched", "loaded so", "nested"])
def test_what_accelerate_offloads_is_taken_from_where_it_lives(tmp_path, how):
    accelerate = pytest.importorskip("accelerate")
    trained = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    torch.save(trained.state_dict(), tmp_path / "pytorch_model.bin")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.load_state_dict(trained.state_dict())
    places = {"0": "cpu", "1": "disk"}
    if how == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path / "off"), execution_device="cpu")
    elif how == "dispatched":
        accelerate.dispatch_model(model, places, "cpu", offload_dir=str(tmp_path / "off"))
    elif how == "loaded so":
        with accelerate.init_empty_weights():
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        source = str(tmp_path / "pytorch_model.bin")
        accelerate.load_checkpoint_and_dispatch(model, source, places, offload_folder=str(tmp_path / "off"))
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    if how == "nested":
        accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook(), append=True)
    smart_save(model, tmp_path / "x.pth")
    saved = torch.load(tmp_path / "x.pth", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in trained.state_dict().items())
    assert list(saved) == list(trained.state_dict())


def test_what_deepspeed_spreads_is_refused_by_name(tmp_path):
    model = nn.Linear(2, 3)
    model.weight.ds_id, model.weight.data = 0, torch.empty(0)
    with pytest.raises(ValueError, match="DeepSpeed.*save_checkpoint.*weight"):
        smart_save(model, tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []


def test_sparse_tensors_are_refused(tmp_path):
    model = nn.Module()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="sparse_coo, not dense: adjacency"):
        smart_save(model, tmp_path / "model.pth")


def test_dtypes_that_safetensors_lacks(tmp_path):
    model = nn.Module()
    model.register_buffer("wave", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"wave is complex128.*\.pth"):
        smart_save(model, tmp_path / "model.safetensors")
    smart_save(model, tmp_path / "model.pth")
    assert torch.load(tmp_path / "model.pth", weights_only=True)["wave"].dtype is torch.complex128


class Stateful(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_plain_extra_state_is_kept_and_objects_are_refused(tmp_path):
    smart_save(Stateful({"scale": [1.5, None]}), tmp_path / "model.pth")
    assert torch.load(tmp_path / "model.pth", weights_only=True) == {"_extra_state": {"scale": [1.5, None]}}
    with pytest.raises(ValueError, match=r"_extra_state\.0 is of type .*Stateful"):
        smart_save(Stateful([Stateful(1)]), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="safetensors holds only tensors"):
        smart_save(Stateful(1), tmp_path / "model.safetensors")


# --- metadata ---


def test_metadata_beside_the_weights(tmp_path):
    model = nn.Linear(2, 2)
    smart_save(model, tmp_path / "model.pth", metadata={"epoch": 3, "classes": ["cat", "dog"]})
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert (saved["epoch"], saved["classes"]) == (3, ["cat", "dog"])
    assert_holds(saved["state_dict"], model)
    assert verify_weights(model, tmp_path / "model.pth").ok
    smart_save(model, tmp_path / "model.safetensors", metadata={"licence": "MIT"})
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "licence": "MIT"}


@pytest.mark.parametrize(
    ("suffix", "metadata", "words"),
    [
        (".pth", {"state_dict": 1}, "where the weights go"),
        (".pth", {"args": Stateful(1)}, r"args is of type .*Stateful"),
        (".pth", {"mean": [torch.ones(1).to_sparse()]}, "sparse_coo, not dense: mean.0"),
        (".safetensors", {"epoch": 3}, "holds only text"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, suffix, metadata, words):
    with pytest.raises(ValueError, match=words):
        smart_save(nn.Linear(1, 1), tmp_path / f"model{suffix}", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


# --- the file as a whole ---


def test_permissions_are_those_of_a_new_file(tmp_path):
    old = os.umask(0o027)
    try:
        smart_save(nn.Linear(1, 1), tmp_path / "model.pth")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model.pth").stat().st_mode) == 0o640


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    smart_save(nn.Linear(1, 1), tmp_path / "real" / "model.pth")
    (tmp_path / "latest.pth").symlink_to("real/model.pth")
    model = nn.Linear(3, 3)
    smart_save(model, tmp_path / "latest.pth")
    assert (tmp_path / "latest.pth").is_symlink()
    assert verify_weights(model, tmp_path / "real" / "model.pth").ok


def test_folders_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        smart_save(nn.Linear(1, 1), tmp_path / "missing" / "model.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        smart_save(nn.Linear(1, 1), tmp_path / "folder.pth")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_room_leaves_what_was_there(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    smart_save(nn.Linear(1, 1), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="unchanged") as caught:
            smart_save(nn.Linear(300, 300), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_interruption_leaves_nothing(tmp_path):
    class Interrupting(nn.Module):
        def get_extra_state(self):
            raise KeyboardInterrupt

        def set_extra_state(self, state):
            pass

    with pytest.raises(KeyboardInterrupt):
        smart_save(Interrupting(), tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


def test_the_report(tmp_path):
    report = smart_save(nn.DataParallel(nn.Linear(256, 256)), tmp_path / "model.pth", dtype=torch.float16)
    assert (report.tensors, report.nbytes) == (2, (256 * 256 + 256) * 2)
    assert report.path == str(tmp_path / "model.pth")
    assert report.casts == {("float32", "float16"): 2}
    assert "2 tensors saved as zip checkpoint (128.5 KiB in " in str(report)
    assert "float32 → float16 in 2 tensors" in str(report)


# --- laws ---

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def models(draw):
    """Modules with random tensors: shapes, dtypes, layouts, ties, names."""
    model = nn.Module()
    known = []
    for index in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        tensor = (torch.randn([*shape, 2]) * 10).to(dtype)
        kind = draw(st.sampled_from(["whole", "turned", "part", "expanded", "tied"]))
        if kind == "turned":
            tensor = tensor.transpose(0, -1)
        elif kind == "part":
            tensor = tensor[..., 1]
        elif kind == "expanded":
            tensor = tensor[..., :1].expand(*shape, 3)
        elif kind == "tied" and known:
            tensor = draw(st.sampled_from(known))
        known.append(tensor)
        parent = model
        for name in draw(st.lists(st.sampled_from(["module", "a", "_orig_mod"]), max_size=2)):
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent._modules[name]
        parent.register_buffer(f"t{index}", tensor)
    return model


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(model=models())
def test_law_what_is_saved_is_what_is_read(tmp_path_factory, suffix, model):
    path = tmp_path_factory.mktemp("law") / f"model{suffix}"
    state = model.state_dict()
    report = smart_save(model, path)
    read_back = read_state_dict(path)
    assert set(read_back) == set(state)
    for name, value in state.items():
        assert read_back[name].dtype == value.dtype
        assert torch.equal(read_back[name], value)
    for first in state:
        for second in state:
            tied = state[first].numel() and state[first].data_ptr() == state[second].data_ptr()
            if tied and state[first].stride() == state[second].stride():
                assert read_back[first].data_ptr() == read_back[second].data_ptr()
    assert report.tensors == len(state)
    others = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in others.items())
