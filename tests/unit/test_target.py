"""A model as a set of slots."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from torchload.model.target import describe_model, own_loaders


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4)
        self.out.weight = self.embed.weight
        self.register_buffer("view", self.embed.weight.detach())
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_ties_by_object_and_by_memory_are_one_slot() -> None:
    target = describe_model(Tied())
    slot = target.by_name["embed.weight"]
    assert slot is target.by_name["out.weight"] is target.by_name["view"]
    assert len(slot.twins) == 1
    assert [slot.names for slot in target.slots] == [["view", "embed.weight", "out.weight"], ["scratch"], ["out.bias"]]


def test_names_are_those_of_the_state_dict() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"a": shared}), "c": Tied()})
    target = describe_model(model)
    assert set(target.by_name) == set(model.state_dict())
    assert target.by_name["a.weight"] is target.by_name["b.a.weight"]


def test_a_transient_buffer_has_a_slot_and_no_name() -> None:
    target = describe_model(Tied())
    assert "scratch" not in target.by_name
    assert [slot.name for slot in target.slots if not slot.persistent] == ["scratch"]


def test_a_module_that_contains_itself_ends() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1))
    model._modules["again"] = model
    assert list(describe_model(model).by_name) == ["weight"]


def test_new_memory_leaves_the_object_its_gradient_and_its_attributes() -> None:
    model = nn.Linear(3, 2)
    weight = model.weight
    weight.tag = "mine"
    weight.grad = torch.ones_like(weight)
    describe_model(model).by_name["weight"].install(torch.full((2, 3), 7.0, dtype=torch.float64))
    assert model.weight is weight
    assert (weight.dtype, weight.tag, weight.grad.dtype) == (torch.float64, "mine", torch.float64)
    assert weight.requires_grad
    assert weight.eq(7).all()


def test_meta_parameters_stay_the_same_objects_unless_something_watches_them() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    watched, free = model["a"].weight, model["b"].weight
    reference = weakref.ref(watched)
    target = describe_model(model)
    for name in ("a.weight", "b.weight"):
        target.by_name[name].install(torch.ones(2, 2))
    assert model["b"].weight is free
    assert isinstance(model["a"].weight, nn.Parameter)
    assert not model["a"].weight.is_meta
    assert reference() is watched
    gc.collect()


def test_lazy_parameters_have_no_shape() -> None:
    target = describe_model(nn.LazyLinear(3))
    assert {name: slot.shape for name, slot in target.by_name.items()} == {"weight": None, "bias": None}


def test_the_outermost_module_that_loads_itself_takes_all_below() -> None:
    class Own(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def _load_from_state_dict(self, *args: object) -> None:
            super()._load_from_state_dict(*args)

    model = nn.ModuleDict({"own": Own(Own(nn.Linear(2, 2))), "plain": nn.Linear(2, 2)})
    [(hooked, slots)] = own_loaders(describe_model(model))
    assert hooked.prefix == "own."
    assert [slot.name for slot in slots] == ["own.inner.inner.weight", "own.inner.inner.bias"]


def test_describing_changes_nothing() -> None:
    model = Tied()
    before = {name: (id(value), value._version) for name, value in model.named_parameters()}
    describe_model(model)
    assert {name: (id(value), value._version) for name, value in model.named_parameters()} == before
