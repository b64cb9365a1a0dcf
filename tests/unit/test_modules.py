"""Whole pickled modules: the container is what `state_dict()` was, whatever the classes were."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.entries import assert_holds
from torchload.core.checkpoint import Container, Record, record_fields
from torchload.core.source import MemorySource
from torchload.errors import CorruptCheckpointError
from torchload.formats.files import archives
from torchload.formats.pickles.unpickle import read_pickle


def reopened(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return archives.open(MemorySource(file.getvalue()), "test.pt").root


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.again = self.head


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("transient", torch.arange(4.0), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("none", None)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.plain_attribute = torch.ones(100)
        self.child = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2))
        self.missing_child = None
        self.add_module("none_child", None)


class SharedBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([block, nn.Linear(2, 2), block])
        self.tables = nn.ModuleDict({"a": block})
        self.values = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(1))])
        self.named = nn.ParameterDict({"x": nn.Parameter(torch.ones(3))})


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.spectral_norm(nn.Conv2d(2, 3, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "nested": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.PReLU())),
    "tied": Tied,
    "buffers": Buffers,
    "shared": SharedBlocks,
    "recurrent": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "spectral": Spectral,
    "half": lambda: nn.Linear(3, 2).half(),
    "parallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(2, 2))),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager"),  # type: ignore[return-value]
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    "traced graph": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))),
    "empty": lambda: nn.ReLU(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(MODELS))
def test_a_module_is_its_state_dict(name: str) -> None:
    model = MODELS[name]()
    tree = reopened({"model": model, "epoch": 1})
    container = tree["model"]
    assert type(container) is Container
    assert container.origin == f"{type(model).__module__}.{type(model).__qualname__}" or name == "traced graph"
    assert_holds(container, model.state_dict())
    parameters = {id(value) for value in model.parameters()}
    for key, value in model.state_dict(keep_vars=True).items():
        assert container[key].is_parameter == (id(value) in parameters)


def test_ties_are_the_same_entry() -> None:
    container = reopened(Tied())
    assert container["head.weight"] is container["embedding.weight"] is container["again.weight"]
    shared = reopened(SharedBlocks())
    assert shared["blocks.0.weight"] is shared["blocks.2.weight"] is shared["tables.a.weight"]
    assert shared["blocks.1.weight"] is not shared["blocks.0.weight"]


def test_the_classes_need_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("gone_package")
    exec("from torch import nn\nclass Net(nn.Sequential):\n    pass", vars(module))
    monkeypatch.setitem(sys.modules, "gone_package", module)
    module.Net.__module__ = "gone_package"
    model = module.Net(nn.Linear(2, 2))
    file = io.BytesIO()
    torch.save(model, file)
    monkeypatch.delitem(sys.modules, "gone_package")
    container = archives.open(MemorySource(file.getvalue()), "test.pt").root
    assert container.origin == "gone_package.Net"
    assert_holds(container, model.state_dict())
    assert "gone_package" not in sys.modules


def test_a_module_in_several_places_is_one_container() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    tree = reopened({"model": model, "ema": model, "layer": model[0], "children": [model[1]]})
    assert tree["model"] is tree["ema"]
    assert_holds(tree["layer"], model[0].state_dict())
    assert tree["layer"]["weight"] is tree["model"]["0.weight"]
    assert tree["children"][0]["weight"] is tree["model"]["1.weight"]


@pytest.mark.parametrize("first", ["children", "model"])
def test_a_module_met_before_or_after_its_parent(first: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 1))
    values = {"children": model._modules, "model": model}
    tree = reopened({name: values[name] for name in sorted(values, key=lambda name: name != first)})
    assert_holds(tree["model"], model.state_dict())
    assert_holds(tree["children"]["0"], model[0].state_dict())


class Learner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.best = torch.ones(2)


def test_a_module_that_is_an_attribute_is_found_there() -> None:
    model = nn.Linear(2, 3)
    record = reopened(Learner(model))
    assert type(record) is Record
    assert_holds(record_fields(record)["model"], model.state_dict())
    assert_holds(record_fields(record)["best"], torch.ones(2))


def test_a_model_and_its_half_precision_average() -> None:
    model, ema = nn.Linear(2, 3), nn.Linear(2, 3).half()
    tree = reopened({"model": None, "ema": ema, "also": model, "updates": 7})
    assert tree["model"] is None
    assert_holds(tree["ema"], ema.state_dict())
    assert_holds(tree["also"], model.state_dict())


def test_old_pickles_know_no_transient_buffers() -> None:
    model = Buffers()
    for module in model.modules():
        del module.__dict__["_non_persistent_buffers_set"]
    assert "transient" in reopened(model)


def test_a_version_in_the_pickle_becomes_metadata() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].__dict__["_version"] = 2
    assert reopened(model).metadata == {"0": {"version": 2}}
    assert reopened(nn.Linear(2, 2)).metadata is None


def test_modules_in_every_protocol() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for protocol in (2, 3, 4, 5):
        file = io.BytesIO()
        torch.save(model, file, pickle_protocol=protocol)
        assert_holds(archives.open(MemorySource(file.getvalue()), "test.pt").root, model.state_dict())


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).mT


def test_parametrizations_keep_their_names() -> None:
    # torch refuses to pickle the class that it makes for such a module; frameworks get around that.
    model = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(model, "weight", Symmetric())
    made: Any = type(model)
    made.__reduce_ex__ = lambda self, protocol: (Remade, (), self.__dict__)
    container = reopened(model)
    assert list(container) == ["bias", "parametrizations.weight.original"]
    assert_holds(container, model.state_dict())


class Remade:
    pass


class Odd:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {"_parameters": {}, "_modules": []},
        {"_parameters": None, "_modules": {}},
        {"_modules": {}},
        {"_parameters": {}, "_buffers": {}},
    ],
)
def test_what_only_resembles_a_module_stays_a_record(attributes: dict[str, Any]) -> None:
    assert type(read_pickle(pickle.dumps(Odd(**attributes)), name="test")) is Record


def test_values_that_do_not_belong_in_a_module_are_left_out() -> None:
    odd = Odd(_parameters={"a": 1, 2: None, "b": None}, _buffers=None, _modules={"c": 3, "d": None, 5: Odd()})
    tree = read_pickle(pickle.dumps(odd), name="test")
    assert type(tree) is Container
    assert tree == {}


def test_a_module_within_itself_is_refused() -> None:
    odd = Odd(_parameters={}, _modules={})
    odd._modules["self"] = odd  # type: ignore[attr-defined]
    with pytest.raises(CorruptCheckpointError, match="contains itself"):
        read_pickle(pickle.dumps(odd), name="test")


def test_no_record_of_a_module_is_read_that_its_state_dict_does_not_need() -> None:
    """Attributes stay unread: one that lies outside its storage does no harm."""
    model = Buffers()
    file = io.BytesIO()
    torch.save(model, file)
    names = zipfile.ZipFile(file).namelist()
    expected = model.state_dict()
    container = archives.open(MemorySource(file.getvalue()), "test.pt").root
    used = {container[key].boxes[0].extent.offset for key in expected}
    assert len(used) == len(expected)
    assert sum("/data/" in name for name in names) > len(expected)
