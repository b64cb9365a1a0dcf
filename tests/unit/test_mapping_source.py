"""A mapping in memory as source: everything as from a file, and no value ever aliased."""

from __future__ import annotations

import argparse
import gc
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
from torch import nn

from tests.law import assert_equal_bits, randomise, snapshot
from torchload import errors, inspect_checkpoint, read_state_dict, smart_load, verify_weights


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def trained() -> nn.Sequential:
    return randomise(net(), 1)


def addresses(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}


def test_a_state_dict(trained) -> None:
    model = net()
    report = smart_load(model, trained.state_dict())
    assert (report.tensors, report.total, report.format) == (7, 7, "a mapping in memory")
    assert_equal_bits(snapshot(model), snapshot(trained))
    assert verify_weights(model, trained.state_dict())


@pytest.mark.parametrize("options", [{}, {"atomic": True}, {"mmap": True}, {"verify": True}])
def test_into_a_meta_model_values_are_copied(trained, options) -> None:
    with torch.device("meta"):
        model = net()
    smart_load(model, trained.state_dict(), **options)
    assert_equal_bits(snapshot(model), snapshot(trained))
    assert addresses(model).isdisjoint(addresses(trained))


def test_a_dictionary_around_one(trained) -> None:
    checkpoint = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
        "optimizer": torch.optim.Adam(trained.parameters()).state_dict(),
        "state_dict": {f"module.{name}": value for name, value in trained.state_dict().items()},
    }
    model = net()
    report = smart_load(model, checkpoint)
    assert (report.key, report.beside["epoch"], report.beside["args"]) == ("state_dict", 3, "Namespace")
    assert report.rewrites == ("removed 'module.' from every name",)
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_a_whole_module_in_a_dictionary(trained) -> None:
    model = net()
    assert smart_load(model, {"model": trained}).key == "model"
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_any_mapping_of_arrays_will_do(trained) -> None:
    model = net()
    smart_load(model, UserDict({name: value.numpy() for name, value in trained.state_dict().items()}))
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_casts_and_strides_and_ties(trained) -> None:
    weight = torch.randn(6, 8)[::2, ::2]
    model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 3, bias=False)})
    report = smart_load(model, {"a.weight": weight.t().contiguous().t(), "b.weight": weight}, dtype=torch.float16)
    assert report.casts == {("float32", "float16"): 2}
    assert torch.equal(model["a"].weight, weight.half())
    assert torch.equal(model["b"].weight, weight.half())
    tied = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 3, bias=False)})
    tied["b"].weight = tied["a"].weight
    smart_load(tied, {"a.weight": weight, "b.weight": weight})
    with pytest.raises(errors.IncompatibleCheckpointError, match="differ in the file, but the model ties them"):
        smart_load(tied, {"a.weight": weight, "b.weight": weight + 1})


def test_all_or_nothing(trained) -> None:
    model, weights = net(), trained.state_dict()
    del weights["1.bias"]
    before = snapshot(model)
    with pytest.raises(errors.IncompatibleCheckpointError, match="<mapping> does not fit this Sequential"):
        smart_load(model, weights)
    assert_equal_bits(snapshot(model), before)


def test_a_models_own_tensors_under_exchanged_names() -> None:
    # The source is the memory that is written to: what is read second would be what was written first.
    model = randomise(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), 3)
    wanted = {f"{'ba'['ab'.index(name[0])]}{name[1:]}": value.clone() for name, value in model.state_dict().items()}
    exchanged = {f"{'ba'['ab'.index(name[0])]}{name[1:]}": value for name, value in model.state_dict().items()}
    smart_load(model, exchanged)
    assert_equal_bits(snapshot(model), {name: wanted[name] for name in model.state_dict()})


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "sparse"),
        (nn.UninitializedParameter(), "uninitialized"),
    ],
)
def test_tensors_without_values_are_refused_by_name(tensor, reason) -> None:
    with pytest.raises(errors.IncompatibleCheckpointError, match=rf"weight.*{reason}"):
        smart_load(nn.Linear(2, 2), {"weight": tensor, "bias": torch.zeros(2)})


def test_extra_state_is_a_copy() -> None:
    class Counter(nn.Linear):
        state: object = None

        def get_extra_state(self) -> object:
            return self.state

        def set_extra_state(self, state: object) -> None:
            self.state = state

    given = OrderedDict(Counter(2, 2).state_dict())
    given["_extra_state"] = {"amax": torch.ones(3), "history": [1, 2], "of": argparse.Namespace(x=[1])}
    model = Counter(2, 2)
    smart_load(model, given)
    given["_extra_state"]["amax"].zero_()
    given["_extra_state"]["history"].append(3)
    given["_extra_state"]["of"].x.append(2)
    assert torch.equal(model.state["amax"], torch.ones(3))
    assert (model.state["history"], model.state["of"]) == ([1, 2], argparse.Namespace(x=[1]))


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantized modules
def test_quantized_modules() -> None:
    modules = [torch.ao.nn.quantized.Linear(3, 2) for _ in range(2)]
    weights = torch.quantize_per_tensor(torch.randn(2, 3), 0.1, 0, torch.qint8)
    modules[0].set_weight_bias(weights, torch.ones(2))
    smart_load(modules[1], modules[0].state_dict())
    assert torch.equal(modules[1].weight().int_repr(), weights.int_repr())
    assert torch.equal(modules[1].bias(), torch.ones(2))


def test_a_mapping_that_holds_itself(trained) -> None:
    around: dict[str, object] = {"state_dict": trained.state_dict()}
    around["me"] = around
    model = net()
    smart_load(model, around)
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_values_that_are_made_when_they_are_asked_for(trained) -> None:
    class Lazy(UserDict):
        def __getitem__(self, name: str) -> torch.Tensor:
            gc.collect()
            return super().__getitem__(name).clone()

    model = net()
    smart_load(model, {"state_dict": Lazy(trained.state_dict())})
    assert_equal_bits(snapshot(model), snapshot(trained))


def test_many_tiny_tensors() -> None:
    names = [f"t{number}" for number in range(120_000)]
    model = nn.Module()
    model.register_buffer("t7", torch.zeros(()))
    one = torch.ones(())
    smart_load(model, dict.fromkeys(names, one), skip=["t[0-689]*", "t7?*"])
    assert model.t7 == 1


def test_other_functions_take_mappings(trained) -> None:
    info = inspect_checkpoint({"state_dict": trained.state_dict(), "epoch": 3})
    assert [container.path for container in info.containers] == ["state_dict"]
    assert info.values == {"epoch": 3}
    read = read_state_dict(trained.state_dict())
    assert_equal_bits(dict(read), snapshot(trained))
    assert not {t.data_ptr() for t in read.values()} & {t.data_ptr() for t in trained.state_dict().values()}


def test_numbers_of_numpy_are_values_not_tensors(trained) -> None:
    report = smart_load(net(), {"state_dict": trained.state_dict(), "step": np.int64(3)})
    assert "step" in report.beside
