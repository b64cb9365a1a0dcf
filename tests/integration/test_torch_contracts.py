"""What torch and its companions promise about modules, kept: hooks, private memory, shared memory, placeholders."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.law import assert_equal_bits, randomise, snapshot
from torchload import errors, smart_load, smart_resume, smart_save, verify_weights

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what is mapped")


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


# --- post-hooks have the last word ---


class Adapted(nn.Module):
    def __init__(self, hook: Any, *, on: str = "") -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Sequential(nn.Linear(3, 3))
        self.adapter = nn.Parameter(torch.zeros(3))
        self.get_submodule(on).register_load_state_dict_post_hook(hook)


def forgive(module: nn.Module, keys: Any) -> None:
    keys.missing_keys.clear()
    keys.unexpected_keys.clear()


def accuse(module: nn.Module, keys: Any) -> None:
    keys.missing_keys.append("a.weight")


def passes(module: nn.Module, keys: Any) -> None:
    pass


@pytest.mark.parametrize("atomic", [False, True])
def test_a_post_hook_forgives_what_is_missing_and_unexpected(tmp_path: Path, atomic: bool) -> None:
    weights = randomise(Adapted(forgive), 1).state_dict()
    del weights["adapter"]
    weights["b.odd"] = torch.ones(1)
    torch.save(weights, tmp_path / "x.pth")
    model = Adapted(forgive)
    report = smart_load(model, tmp_path / "x.pth", atomic=atomic)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert torch.equal(model.b[0].weight, weights["b.0.weight"])


def test_a_post_hook_that_forgives_nothing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    weights = randomise(Adapted(passes), 1).state_dict()
    del weights["adapter"]
    torch.save(weights, tmp_path / "x.pth")
    model = Adapted(passes)
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(errors.IncompatibleCheckpointError, match="adapter") as caught:
        smart_load(model, tmp_path / "x.pth")
    assert (caught.value.missing_keys, caught.value.written) == (["adapter"], ())
    assert_equal_bits(snapshot(model), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("atomic", [False, True])
def test_a_post_hook_that_accuses(tmp_path: Path, atomic: bool) -> None:
    torch.save(randomise(Adapted(accuse), 1).state_dict(), tmp_path / "x.pth")
    model = Adapted(accuse)
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="a.weight") as caught:
        smart_load(model, tmp_path / "x.pth", atomic=atomic)
    assert caught.value.missing_keys == ["a.weight"]
    if atomic:
        assert_equal_bits(snapshot(model), before)
        assert caught.value.written == ()
    else:
        assert set(caught.value.written) == set(model.state_dict())


def test_post_hooks_hear_what_torch_would_tell_them(tmp_path: Path) -> None:
    def build(heard: list[Any]) -> nn.Module:
        def hook(name: str) -> Any:
            def listen(module: nn.Module, keys: Any) -> None:
                heard.append((name, sorted(keys.missing_keys), sorted(keys.unexpected_keys)))
                if name == "1.0":
                    keys.missing_keys.clear()

            return listen

        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
        for name in ("1", "", "2", "1.0", "0"):
            model.get_submodule(name).register_load_state_dict_post_hook(hook(name))
        return model

    weights = build([]).state_dict()
    for name in ("0.bias", "1.0.bias", "1.1.bias", "2.bias"):
        del weights[name]
    weights["0.odd"] = weights["1.1.odd"] = weights["1.odd.odd"] = torch.ones(1)
    torch.save(weights, tmp_path / "x.pth")
    ours: list[Any] = []
    theirs: list[Any] = []
    build(theirs).load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=False)
    with pytest.warns(UserWarning, match="in part"):
        smart_load(build(ours), tmp_path / "x.pth", strict=False)
    assert ours == theirs


# --- pre-hooks, and modules that load themselves, rename and drop names ---


class Part(nn.Module):
    """Drops a name of older versions, in one of the two ways that modules have; maybe renames others."""

    def __init__(self, how: str, junk: str, renames: bool) -> None:
        super().__init__()
        self.a, self.lora = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))
        self.how, self.junk, self.calls = how, junk, 0
        if renames:
            self._register_load_state_dict_pre_hook(self.rename)
        if how == "pre-hook":
            self._register_load_state_dict_pre_hook(self.drop)

    def rename(self, state_dict: Any, prefix: str, *_: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix + "old.")]:
            state_dict[prefix + "a." + name[len(prefix) + 4 :]] = state_dict.pop(name)

    def drop(self, state_dict: Any, prefix: str, *_: Any) -> None:
        self.calls += any(not value.is_meta for value in state_dict.values())
        state_dict.pop(prefix + self.junk, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.how == "override":
            self.drop(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ByHook(Part):
    _load_from_state_dict = nn.Module._load_from_state_dict


@pytest.mark.parametrize("wrapped", ["", "file", "model", "both"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("renames", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("junk", ["junk", "a.junk", "old_part.junk"])
@pytest.mark.parametrize("how", ["pre-hook", "override"])
def test_hooks_that_rename_and_drop(
    tmp_path: Path, how: str, junk: str, nested: bool, renames: bool, strict: bool, wrapped: str
) -> None:
    def build() -> nn.Module:
        part = ByHook(how, junk, renames) if how == "pre-hook" else Part(how, junk, renames)
        return nn.Sequential(part, nn.Linear(3, 3)) if nested else part

    trained, prefix = randomise(build(), 1), "0." if nested else ""
    state = {**trained.state_dict(), prefix + junk: torch.ones(2)}
    if renames:
        new = {name: name.replace(prefix + "a.", prefix + "old.") for name in state if name != prefix + junk}
        state = {new.get(name, name): value for name, value in state.items()}
    in_file = {f"module.{name}" if wrapped in ("file", "both") else name: value for name, value in state.items()}
    torch.save({"epoch": 1, "state_dict": in_file}, tmp_path / "x.pth")
    plain = build()
    plain.load_state_dict(state)  # it loads as torch does, from what torch would be given
    model = build()
    report = smart_load(
        nn.DataParallel(model) if wrapped in ("model", "both") else model, tmp_path / "x.pth", strict=strict
    )
    assert_equal_bits(snapshot(model), snapshot(plain))
    assert (report.missing_keys, report.unexpected_keys, report.key) == ([], [], "state_dict")
    assert not report.outside
    if how == "pre-hook":
        assert (model[0] if nested else model).calls == 1  # type: ignore[index]


@pytest.mark.parametrize("how", ["pre-hook", "override"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_renamed_submodule(tmp_path: Path, how: str, strict: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.fc = nn.Linear(4, 2)
            if how == "pre-hook":
                self._register_load_state_dict_pre_hook(self.rename, with_module=True)  # public since torch 2.5

        @staticmethod
        def rename(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
            for name in [name for name in state_dict if name.startswith(prefix + "encoder.")]:
                state_dict[prefix + "backbone." + name[len(prefix) + 8 :]] = state_dict.pop(name)

    class Overriding(Net):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            self.rename(self, state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args)

    build = Net if how == "pre-hook" else Overriding
    trained = randomise(build(), 1)
    old = {name.replace("backbone.", "encoder."): value for name, value in trained.state_dict().items()}
    torch.save({"model": old, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "x.pth")
    model = build()
    report = smart_load(model, tmp_path / "x.pth", strict=strict)
    assert (report.tensors, report.total, report.outside, report.rivals) == (6, 6, (), ())
    assert_equal_bits(snapshot(model), snapshot(trained))
    assert verify_weights(model, tmp_path / "x.pth")


class Scales(nn.Parameter):
    """A parameter with an attribute, as bitsandbytes has."""

    scale: torch.Tensor

    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Scales:
        tensor = torch.Tensor._make_subclass(cls, data, False)
        tensor.scale = scale
        return tensor

    def __deepcopy__(self, memo: Any) -> Scales:
        return Scales(self.data.clone(), self.scale.clone())


class EightBit(nn.Module):
    """Built as `bitsandbytes.nn.Linear8bitLt` is: a pre-hook takes a name away, then a loader looks at an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Scales(torch.zeros(3, 3, dtype=torch.int8), torch.ones(3))
        self._register_load_state_dict_pre_hook(lambda state, prefix, *_: state.pop(prefix + "fmt", None))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.weight.scale
        destination[prefix + "fmt"] = torch.tensor(0, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected = args[3]
        if prefix + "scale" in state_dict:
            self.weight.scale.copy_(state_dict[prefix + "scale"])
            unexpected.remove(prefix + "scale")


def test_a_module_as_bitsandbytes_has_it(tmp_path: Path) -> None:
    trained = nn.Sequential(EightBit(), nn.Linear(3, 3))
    trained[0].weight.scale.fill_(7)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model = nn.Sequential(EightBit(), nn.Linear(3, 3))
    smart_load(model, tmp_path / "x.pth")
    assert model[0].weight.scale.tolist() == [7, 7, 7]
    assert torch.equal(model[1].weight, trained[1].weight)
    assert verify_weights(model, tmp_path / "x.pth")
    trained[0].weight.scale.fill_(8)
    assert not verify_weights(model, trained.state_dict())


def test_hooks_that_accept_two_sets_of_weights_ask(tmp_path: Path) -> None:
    def build() -> Part:
        return ByHook("pre-hook", "junk", renames=True)

    def old(seed: int) -> dict[str, Any]:
        return {name.replace("a.", "old."): value for name, value in randomise(build(), seed).state_dict().items()}

    torch.save({"first": old(1), "second": old(2)}, tmp_path / "x.pth")
    with pytest.raises(errors.AmbiguousCheckpointError, match="key='second'"):
        smart_load(build(), tmp_path / "x.pth")
    model = build()
    smart_load(model, tmp_path / "x.pth", key="second")
    assert torch.equal(model.lora, old(2)["lora"])


# --- memory is private ---


class Keeps(nn.Linear):
    """Takes over the tensors that it is given, as some quantized layers do."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.weight.data, self.bias.data = state_dict[prefix + "weight"], state_dict[prefix + "bias"]


class Scaled(nn.Linear):
    """Has tensors in its extra state."""

    amax: Any = None

    def get_extra_state(self) -> Any:
        return {"amax": torch.ones(4096) if self.amax is None else self.amax}

    def set_extra_state(self, state: Any) -> None:
        self.amax = state["amax"]


@linux
@pytest.mark.parametrize("kind", [Keeps, Scaled])
@pytest.mark.parametrize("mmap", [False, True])
def test_only_mmap_shares_pages_with_the_file(tmp_path: Path, kind: Any, mmap: bool) -> None:
    path = tmp_path / "x.pth"
    trained = nn.Sequential(randomise(kind(64, 64), 1))
    torch.save(trained.state_dict(), path)
    model = nn.Sequential(kind(64, 64))
    smart_load(model, path, mmap=mmap)
    assert is_mapped(path) == mmap
    if not mmap:
        torch.save({"epoch": 1}, path)  # the next save to the same name
        assert torch.equal(model[0].weight, trained[0].weight)
        assert kind is Keeps or torch.equal(model[0].amax, torch.ones(4096))


KEPT = {
    "itself": lambda tensor: tensor,
    "a row of it": lambda tensor: tensor[1],
    "transposed": lambda tensor: tensor.detach().t(),
    "in a list": lambda tensor: [tensor, tensor[2:]],
    "a copy": lambda tensor: tensor.clone(),
}


@linux
@pytest.mark.parametrize("pops", [True, False])
@pytest.mark.parametrize("renames", [True, False])
@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_what_a_pre_hook_keeps_is_private_memory(tmp_path: Path, keep: Any, renames: bool, pops: bool) -> None:
    """Also where nothing fits without the hook, which is tried first with tensors without memory."""
    kept: list[Any] = []

    def hook(state: Any, prefix: str, *args: Any) -> None:
        if (name := f"{prefix}extra") in state:
            kept[:] = [keep(state.pop(name) if pops else state[name])]
            state.setdefault(f"{prefix}extra", torch.zeros(64, 64)[:1])
            del state[f"{prefix}extra"]
        for old in [name for name in state if name.startswith(f"{prefix}old_")]:
            state[prefix + old[len(prefix) + 4 :]] = state.pop(old)

    path = tmp_path / "x.pth"
    trained = randomise(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 1)
    state = {f"0.old_{name}" if renames else f"0.{name}": t for name, t in trained[0].state_dict().items()}
    extra = torch.randn(64, 64)
    torch.save({**state, "0.extra": extra, **{f"1.{name}": t for name, t in trained[1].state_dict().items()}}, path)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0]._register_load_state_dict_pre_hook(hook)
    smart_load(model, path)
    assert_equal_bits(snapshot(model), snapshot(trained))
    with open(path, "r+b") as file:  # the same file, changed in place and cut short
        file.write(bytes(path.stat().st_size))
        file.truncate(16)
    expected = keep(extra)
    for found, wanted in zip(kept[0], expected) if isinstance(expected, list) else [(kept[0], expected)]:
        assert torch.equal(found, wanted)


# --- shared memory ---


def _see(model: nn.Module, ready: Any, answer: Any) -> None:
    ready.wait()
    answer.put([tensor.sum().item() for tensor in model.state_dict().values()])


@linux
@pytest.mark.parametrize("options", [{}, {"atomic": True}, {"verify": True, "atomic": True}], ids=str)
def test_a_model_in_shared_memory_stays_shared(tmp_path: Path, options: dict[str, Any]) -> None:
    trained = randomise(nn.Linear(3, 3), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model = nn.Linear(3, 3).share_memory()
    addresses = [p.data_ptr() for p in model.parameters()]
    context = multiprocessing.get_context("fork")
    ready, answer = context.Event(), context.Queue()
    other = context.Process(target=_see, args=(model, ready, answer))
    other.start()
    smart_load(model, tmp_path / "x.pth", **options)
    ready.set()
    assert answer.get() == [tensor.sum().item() for tensor in trained.state_dict().values()]
    other.join()
    assert all(p.is_shared() for p in model.parameters())
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_shared_memory_is_all_or_nothing_under_atomic(tmp_path: Path) -> None:
    def refuse(module: nn.Module, keys: Any) -> None:
        raise RuntimeError("not today")

    torch.save(randomise(nn.Linear(3, 3), 1).state_dict(), tmp_path / "x.pth")
    model = nn.Linear(3, 3).share_memory()
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    model.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match="not today"):
        smart_load(model, tmp_path / "x.pth", atomic=True)
    assert_equal_bits(snapshot(model), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"mmap": True}, "mmap=True"),
        ({"dtype": torch.float16}, "another dtype or device"),
        ({"dtype": torch.float16, "skip": ["bias"]}, "another dtype or device"),
        ({"dtype": "auto", "atomic": True}, "another dtype or device"),
    ],
    ids=str,
)
def test_what_would_end_sharing_is_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    stored = {name: tensor.to(torch.float64) for name, tensor in nn.Linear(3, 3).state_dict().items()}
    torch.save(nn.Linear(3, 3).state_dict() if what == "mmap=True" else stored, tmp_path / "x.pth")
    model = nn.Linear(3, 3).share_memory()
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(errors.IncompatibleCheckpointError, match=f"bias is in memory .*which {what} would replace"):
        smart_load(model, tmp_path / "x.pth", **options)
    assert_equal_bits(snapshot(model), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


# --- weights that live elsewhere ---


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model", "nested"])
def test_a_model_that_accelerate_offloads_is_refused_by_name(tmp_path: Path, how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    trained = randomise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path / "off"), execution_device="cpu")
    elif how == "dispatch_model":
        accelerate.dispatch_model(model, {"0": "cpu", "1": "disk"}, "cpu", offload_dir=str(tmp_path / "off"))
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
        accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook(), append=True)
    before = model(torch.ones(1, 4))
    for call in (smart_load, verify_weights):
        with pytest.raises(errors.IncompatibleCheckpointError, match="offloaded by accelerate"):
            call(model, tmp_path / "x.pth")
    assert torch.equal(model(torch.ones(1, 4)), before)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)  # what the message says
    smart_load(model, tmp_path / "x.pth", "cpu")
    assert torch.equal(model(torch.ones(1, 4)), trained(torch.ones(1, 4)))


def test_hooks_of_accelerate_that_offload_nothing_are_no_obstacle(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    trained = randomise(nn.Sequential(nn.Linear(4, 4)), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model: Any = nn.Sequential(nn.Linear(4, 4))
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(model), snapshot(trained))


@pytest.mark.filterwarnings("ignore:FSDP")  # of one rank, or of its age
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_in_fsdp1_is_refused_by_its_type(tmp_path: Path, flat: bool, inside: bool) -> None:
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.save(nn.Sequential(nn.Linear(2, 2)).state_dict(), tmp_path / "x.pth")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        cpu = torch.device("cpu")
        model: nn.Module = FullyShardedDataParallel(nn.Linear(2, 2), use_orig_params=not flat, device_id=cpu)
        model = nn.Sequential(model) if inside else model
        where = "'0' is" if inside else "the model is"
        with pytest.raises(errors.IncompatibleCheckpointError, match=f"{where} wrapped in FullyShardedDataParallel"):
            smart_load(model, tmp_path / "x.pth")
    finally:
        distributed.destroy_process_group()


# --- odd models ---

SHADOWED = [
    *("modules", "children", "named_modules", "named_children", "parameters", "buffers", "named_parameters"),
    *("named_buffers", "apply", "train", "to", "type", "float"),
]


@pytest.mark.parametrize("attribute", SHADOWED)
def test_attributes_that_shadow_methods(tmp_path: Path, attribute: str) -> None:
    import torch.distributed.tensor  # other libraries import it, and then modules are looked through for its parts

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            setattr(self, attribute, [])

    trained = Net()
    torch.save({f"fc.{name}": value for name, value in trained.fc.state_dict().items()}, tmp_path / "x.pth")
    for options in ({}, {"dtype": torch.float16}, {"atomic": True}):
        model = Net()
        smart_load(model, tmp_path / "x.pth", "cpu", **options)
        assert verify_weights(model, tmp_path / "x.pth")
    smart_save(trained, tmp_path / "saved.pth")
    assert verify_weights(trained, tmp_path / "saved.pth")
    smart_resume(Net(), tmp_path / "saved.pth")


def test_a_model_without_state_loads_from_an_empty_state_dict(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x.pth")
    for model, source in itertools.product((nn.Softmax(), nn.Sequential(nn.ReLU())), (tmp_path / "x.pth", {})):
        report = smart_load(model, source)
        assert (report.tensors, report.total) == (0, 0)
        assert verify_weights(model, source)
    with pytest.raises(errors.IncompatibleCheckpointError, match="no place in the model"):
        smart_load(nn.Softmax(), {"weight": torch.ones(2)})
    with pytest.raises(errors.IncompatibleCheckpointError, match="no tensors"):
        smart_load(nn.Linear(2, 2), {})


@pytest.mark.parametrize("options", [{}, {"atomic": True}, {"strict": False}, {"mmap": True}, {"dtype": torch.float64}])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_in_file_and_model(tmp_path: Path, options: dict[str, Any], in_memory: bool) -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 2))

    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def load(source: nn.Module, model: nn.Module) -> None:
        torch.save(source.state_dict(), tmp_path / "x.pth")
        smart_load(model, source.state_dict() if in_memory else tmp_path / "x.pth", **options)

    trained, model = randomise(plain(), 1), lazy()
    load(trained, model)
    for (name, ours), theirs in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype)), name
    source, model = lazy(), lazy()
    load(source, model)
    assert model[0].has_uninitialized_params()  # type: ignore[index]
    assert model[1].has_uninitialized_params()  # type: ignore[index]
    assert torch.equal(model[2].weight, source[2].weight.to(model[2].weight.dtype))  # type: ignore[index]
    model = plain()
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="0.weight is an uninitialized parameter"):
        load(lazy(), model)
    assert_equal_bits(snapshot(model), before)
