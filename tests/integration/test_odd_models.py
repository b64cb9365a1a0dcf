"""Users' setups: wrappers in any nesting, shared and tied parts, modules that torch or Python make unusual.

For each, smart_load leaves what load_state_dict leaves on the bare models, keeps every parameter the same object in the
same memory, and verify_weights agrees.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

from tests.integration.test_any_model import Shared, SpecialParameter
from tests.law import assert_equal_bits, identities, randomise, snapshot
from torchload import errors, smart_load, smart_save, verify_weights

Build = Callable[[], nn.Module]
pytestmark = pytest.mark.filterwarnings("ignore")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def bare(model: Any) -> nn.Module:
    """The module inside all wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            model = model.module
        else:
            return model


DDP = nn.parallel.DistributedDataParallel
WRAPPED: dict[str, tuple[Build, Build]] = {  # how the file's model is wrapped, and how the model is
    "compile of DDP": (net, lambda: torch.compile(DDP(net()))),
    "DDP of compile": (lambda: torch.compile(DDP(net())), lambda: DDP(torch.compile(net()))),
    "compiled in place": (net, lambda: _compiled_in_place(net())),
    "average of DDP": (net, lambda: AveragedModel(DDP(net()))),
    "average of compile of DDP": (lambda: nn.DataParallel(net()), lambda: AveragedModel(torch.compile(DDP(net())))),
    "bare, from an average of DDP": (lambda: AveragedModel(DDP(net())), net),
    "twice the same": (net, lambda: nn.DataParallel(nn.DataParallel(net()))),
    "shared parts, wrapped": (Shared, lambda: torch.compile(DDP(Shared()))),
}


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_in_any_nesting(tmp_path, name):
    make_trained, make_model = WRAPPED[name]
    trained, model, want = randomise(make_trained(), 1), randomise(make_model(), 2), randomise(make_model(), 3)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    bare(want).load_state_dict(bare(trained).state_dict())
    before = identities(model)
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(bare(model)), snapshot(bare(want)))
    assert identities(model) == before
    assert verify_weights(model, tmp_path / "x.pth")


@pytest.mark.parametrize("compiled_when_saved", [False, True])
def test_a_compiled_child(tmp_path, compiled_when_saved):
    def with_compiled_child() -> nn.Module:
        model = net()
        model[0] = torch.compile(model[0])
        return model

    trained = randomise(with_compiled_child() if compiled_when_saved else net(), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    model = with_compiled_child()
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(dict(enumerate(snapshot(model).values())), dict(enumerate(snapshot(trained).values())))


class Symmetric(nn.Module):
    def forward(self, value):
        return value + value.t()

    def right_inverse(self, value):
        return value / 2


class Slotted(nn.Module):
    __slots__ = ("cache",)

    def __init__(self) -> None:
        super().__init__()
        self.cache = 1
        self.fc = nn.Linear(2, 2)


class Properties(nn.Module):
    """Its attributes are not what its children are called, and one must not be touched."""

    def __init__(self) -> None:
        super().__init__()
        self._fc, self.inner = nn.Linear(2, 2), nn.Linear(2, 2)

    @property
    def fc(self) -> nn.Module:
        return self._fc

    @property
    def module(self) -> nn.Module:
        return self._fc

    @property
    def weight(self) -> torch.Tensor:
        raise RuntimeError("not this one")


class BackReference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.child.parents = [self]
        object.__setattr__(self, "hidden", nn.Linear(2, 2))


class Hook:
    """A hook that is no function."""

    def __call__(self, state, prefix, *_):
        state[prefix + "weight"] = state[prefix + "weight"] + 1


def scaled(state, prefix, *_, scale=1.0):
    state[prefix + "weight"] = state[prefix + "weight"] * scale


def with_hook(hook: Any) -> nn.Module:
    model = nn.Linear(3, 2)
    model._register_load_state_dict_pre_hook(hook)
    return nn.Sequential(model, nn.Linear(2, 2))


def holder(**tensors: Any) -> nn.Module:
    module = nn.Module()
    for name, value in tensors.items():
        if isinstance(value, (nn.Parameter, nn.Module)):
            setattr(module, name, value)
        else:
            module.register_buffer(name, value)
    return module


def twice_parametrized() -> nn.Module:
    model = nn.Linear(3, 3)
    for _ in range(2):
        parametrize.register_parametrization(model, "weight", Symmetric())
    return model


def special() -> nn.Module:
    model = nn.Linear(3, 2)
    model.weight = SpecialParameter(torch.zeros(2, 3))
    return model


def halves() -> nn.Module:
    both = torch.zeros(6, 4)
    return holder(a=nn.Parameter(both[:3]), b=nn.Parameter(both[3:]))


def turned() -> nn.Module:
    weight = nn.Parameter(torch.zeros(3, 4))
    return holder(weight=weight, view=weight.detach().t())


def deep(levels: int) -> nn.Module:
    return nn.Sequential(deep(levels - 1)) if levels else nn.Linear(1, 1)


def checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(checkpoint_wrapper(nn.Linear(3, 2)), nn.Linear(2, 2))


ODD: dict[str, Build] = {
    "a child for every name of a wrapper": lambda: nn.ModuleDict(
        {name: nn.Linear(2, 2) for name in ("module", "_orig_mod", "model", "weight", "_forward_module")}
    ),
    "names of any kind": lambda: nn.ParameterDict({name: torch.zeros(2) for name in ("module", "0", "ünï", "a b")}),
    "nothing between": lambda: nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Sequential(), nn.ModuleList()),
    "no elements, no dimensions": lambda: holder(
        scale=nn.Parameter(torch.tensor(0.0)), none=torch.zeros(0, 3), count=torch.tensor(0)
    ),
    "complex": lambda: nn.Linear(3, 2, dtype=torch.complex128),
    "twice parametrized": twice_parametrized,
    "recurrent with weight_norm": lambda: nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
    "convolution with weight_norm": lambda: parametrizations.weight_norm(nn.Conv1d(3, 3, 2)),
    "parameter subclass": special,
    "two parameters in one piece of memory": halves,
    "a buffer that shows a parameter turned": turned,
    "slots": Slotted,
    "properties": Properties,
    "references back, and hidden modules": BackReference,
    "a partial as hook": lambda: with_hook(functools.partial(scaled, scale=2.0)),
    "an object as hook": lambda: with_hook(Hook()),
    "activation checkpointing": checkpointed,
    "shared memory": lambda: net().share_memory(),
    "channels last in three dimensions": lambda: nn.Conv3d(4, 8, 3).to(memory_format=torch.channels_last_3d),
    "three hundred levels": lambda: functools.reduce(
        lambda inner, _: nn.Sequential(inner), range(300), nn.Linear(1, 1)
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_torch_and_python_make_unusual(tmp_path, name):
    trained, model, want = (randomise(ODD[name](), seed) for seed in (1, 2, 3))
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    want.load_state_dict(trained.state_dict())
    before = identities(model)
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(model), snapshot(want))
    assert identities(model) == before
    assert verify_weights(model, tmp_path / "x.pth")


@pytest.mark.parametrize("mode", ["as it is", "half", "meta"])
def test_inside_inference_mode(tmp_path, mode):
    """What is loaded there can still be trained."""
    trained = randomise(net(), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    with torch.device("meta" if mode == "meta" else "cpu"):
        model = net()
    dtype = torch.bfloat16 if mode == "half" else None
    with torch.inference_mode():
        smart_load(model, tmp_path / "x.pth", dtype=dtype)
    assert_equal_bits(snapshot(model), snapshot(trained.to(dtype) if dtype else trained))
    model(torch.randn(2, 3, dtype=dtype)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("make", [torch.jit.script, torch.fx.symbolic_trace], ids=["scripted", "traced by fx"])
def test_models_that_torch_made_out_of_others(tmp_path, make):
    trained, model = randomise(net(), 1), make(net())
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(dict(model.state_dict()), dict(trained.state_dict()))


def test_heads_that_a_model_left_out(tmp_path):
    """As torchvision's GoogLeNet and Inception do with ``aux_logits=False``."""

    def model(auxiliary: bool) -> nn.Module:
        module = nn.Module()
        module.conv, module.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        module.aux1 = nn.Linear(4, 2) if auxiliary else None
        return module

    whole, without = randomise(model(True), 1), randomise(model(False), 2)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    torch.save(without.state_dict(), tmp_path / "without.pth")
    report = smart_load(without, tmp_path / "whole.pth")
    assert report.ignored == ("aux1.weight", "aux1.bias")
    assert torch.equal(without.fc.weight, whole.fc.weight)
    before = snapshot(whole)
    with pytest.raises(errors.IncompatibleCheckpointError, match=r"aux1\.\{weight, bias\}"):
        smart_load(whole, tmp_path / "without.pth")
    assert_equal_bits(snapshot(whole), before)


def test_a_tie_whose_other_name_safetensors_dropped_on_meta(tmp_path):
    def tied() -> nn.Module:
        module = nn.Module()
        module.embed, module.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        module.head.weight = module.embed.weight
        return module

    trained = randomise(tied(), 1)
    save_model(trained, str(tmp_path / "x.safetensors"))
    with torch.device("meta"):
        model = tied()
    smart_load(nn.DataParallel(model), tmp_path / "x.safetensors")
    assert model.head.weight is model.embed.weight
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_a_buffer_whose_elements_are_one_gets_memory_of_its_own(tmp_path):
    """Where load_state_dict fails half way."""
    model, trained = (holder(scale=nn.Parameter(torch.zeros(2)), grid=torch.zeros(1, 3).expand(4, 3)) for _ in "ab")
    trained.grid = torch.arange(12.0).reshape(4, 3)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    smart_load(model, tmp_path / "x.pth")
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_the_two_ways_of_weight_norm_are_one(tmp_path):
    inputs = torch.randn(2, 3)
    for first, second in itertools.permutations((nn.utils.weight_norm, parametrizations.weight_norm)):
        trained, model = first(nn.Linear(3, 3)), second(nn.Linear(3, 3))
        torch.save(randomise(trained, 1).state_dict(), tmp_path / "x.pth")
        smart_load(model, tmp_path / "x.pth")
        assert torch.equal(model(inputs), trained(inputs))


def fake() -> nn.Module:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return nn.Linear(3, 2)


def wrapping() -> nn.Module:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(TwoTensor(torch.zeros(2, 3), torch.zeros(2, 3)))
    return model


def given_back() -> nn.Module:
    model = nn.Linear(3, 2)
    model.weight.untyped_storage().resize_(0)
    return model


def sparse() -> nn.Module:
    model = nn.Linear(3, 2)
    weight = torch.zeros(2, 3).to_sparse()
    del model.weight
    model.register_buffer("weight", weight)
    return model


HOLLOW = {"fake": fake, "wrapping": wrapping, "given back": given_back, "sparse": sparse}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("name", HOLLOW)
def test_tensors_without_memory_are_refused(tmp_path, name, dtype):
    """To write where they say they are would end the process."""
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "x.pth")
    model = HOLLOW[name]()
    bias = model.bias
    with pytest.raises(errors.IncompatibleCheckpointError, match="weight is a .* without memory"):
        smart_load(model, tmp_path / "x.pth", dtype=dtype)
    assert model.bias is bias
    report = verify_weights(model, tmp_path / "x.pth")
    assert "without memory that could be compared" in str(report)
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(ValueError, match=r"(without memory|no plain tensor|not dense).*weight"):
            smart_save(model, tmp_path / f"y{suffix}")
        assert not (tmp_path / f"y{suffix}").exists()
