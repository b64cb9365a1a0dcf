"""The laws of loading, over models that nobody thought of."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.law import assert_equal_bits, identities, randomise, snapshot
from torchload import errors, smart_load

# A model is described by plain data, so that it can be built any number of times.
Description = tuple[Any, ...]

NAMES = st.sampled_from(["module", "model", "_orig_mod", "net", "a", "b", "weight", "encoder", "ema", "0", "params"])
SIZES = st.integers(1, 3)
leaves = st.one_of(
    st.tuples(st.just("linear"), SIZES, SIZES, st.booleans()),
    st.tuples(st.just("norm"), SIZES),
    st.tuples(st.just("conv"), SIZES, SIZES),
    st.tuples(st.just("embedding"), SIZES, SIZES),
    st.tuples(st.just("buffers"), SIZES),
    st.tuples(st.just("parameters"), st.lists(SIZES, min_size=1, max_size=3)),
    st.tuples(st.just("named parameters"), st.dictionaries(NAMES, SIZES, min_size=1, max_size=3)),
    st.tuples(st.just("nothing")),
)
descriptions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.just("sequential"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("list"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("dict"), st.dictionaries(NAMES, inner, min_size=1, max_size=3)),
        st.tuples(st.just("shared"), inner),
        st.tuples(st.just("tied"), SIZES, SIZES),
    ),
    max_leaves=6,
)


class Buffers(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(size))
        self.register_buffer("transient", torch.zeros(size), persistent=False)
        self.register_buffer("flags", torch.zeros(size, dtype=torch.bool))


class Tied(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, columns)
        self.out = nn.Linear(columns, rows)
        self.out.weight = self.embed.weight


def build(description: Description) -> nn.Module:
    kind, *arguments = description
    if kind in ("sequential", "list"):
        parts = [build(part) for part in arguments[0]]
        return nn.Sequential(*parts) if kind == "sequential" else nn.ModuleList(parts)
    if kind == "dict":
        return nn.ModuleDict({name: build(part) for name, part in arguments[0].items()})
    if kind == "shared":
        part = build(arguments[0])
        return nn.ModuleDict({"one": part, "other": part})
    makers: dict[str, Callable[..., nn.Module]] = {
        "linear": nn.Linear,
        "norm": nn.BatchNorm1d,
        "conv": lambda inputs, outputs: nn.Conv1d(inputs, outputs, 2),
        "embedding": nn.Embedding,
        "buffers": Buffers,
        "parameters": lambda sizes: nn.ParameterList([torch.zeros(size) for size in sizes]),
        "named parameters": lambda sizes: nn.ParameterDict({name: torch.zeros(n) for name, n in sizes.items()}),
        "nothing": nn.Identity,
        "tied": Tied,
    }
    return makers[kind](*arguments)


def compiled(module: nn.Module) -> nn.Module:
    if type(module).__name__ == "OptimizedModule":  # a shared module comes by twice
        return module
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


WRAPS: list[Callable[[nn.Module], nn.Module]] = [nn.DataParallel, compiled, AveragedModel]


def wrap(module: nn.Module, choices: st.DataObject, depth: int = 0) -> nn.Module:
    """Wrap a model, and some of its children."""
    for name, child in list(module._modules.items()):
        if child is not None and depth < 3 and type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            wrap(child, choices, depth + 1)
            if choices.draw(st.integers(0, 3)) == 0:
                module._modules[name] = choices.draw(st.sampled_from([nn.DataParallel, compiled]))(child)
    if depth == 0:
        for wrapper in choices.draw(st.lists(st.sampled_from(WRAPS), max_size=2, unique=True)):
            module = wrapper(module)
    return module


def unwrap(module: nn.Module) -> nn.Module:
    """The model again, with its wrapped children taken out of their wrappers."""
    while True:
        if type(module).__name__ == "OptimizedModule":
            module = module._orig_mod
        elif isinstance(module, (nn.DataParallel, AveragedModel)):
            module = module.module
        else:
            break
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = unwrap(child)
    return module


def written(model: nn.Module, suffix: str) -> io.BytesIO:
    state = model.state_dict()
    if suffix == "safetensors":  # can't hold the same memory twice
        seen: set[int] = set()
        for name, value in list(state.items()):
            address = value.data_ptr()
            if address in seen and value.numel():
                del state[name]
            seen.add(address)
        return io.BytesIO(save({name: value.contiguous() for name, value in state.items()}))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@settings(max_examples=120)
@given(description=descriptions, suffix=st.sampled_from(["pth", "safetensors"]), half=st.booleans())
def test_a_load_is_what_load_state_dict_would_have_done(description, suffix, half):
    trained = randomise(build(description), 1)
    assume(trained.state_dict())
    want, model = randomise(build(description), 3), randomise(build(description), 3)
    want.load_state_dict(trained.state_dict())
    before = identities(model)
    smart_load(model, written(trained, suffix), dtype=torch.float16 if half else None)
    assert_equal_bits(snapshot(model), snapshot(want.half() if half else want))
    if not half:
        assert identities(model) == before


@settings(max_examples=120)
@given(description=descriptions, suffix=st.sampled_from(["pth", "safetensors"]), data=st.data())
def test_wrappers_on_either_side_change_nothing(description, suffix, data):
    trained = randomise(build(description), 1)
    assume(trained.state_dict())
    want = randomise(build(description), 3)
    want.load_state_dict(trained.state_dict())
    model = randomise(build(description), 3)
    saved = wrap(trained, data)
    wrapped = wrap(model, data)
    try:
        smart_load(wrapped, written(saved, suffix))
    except errors.TorchLoadError:
        # Refusing is right only where the names have more than one reading.
        assert _has_words_of_wrappers(description)
        return
    assert_equal_bits(snapshot(unwrap(wrapped)), snapshot(want))


def _has_words_of_wrappers(description: Description) -> bool:
    return any(word in repr(description) for word in ("'module'", "'_orig_mod'"))


PERTURBATIONS = ("drop", "add", "reshape", "rename")


@settings(max_examples=150)
@given(description=descriptions, how=st.sampled_from(PERTURBATIONS), data=st.data())
def test_what_does_not_fit_is_refused_and_changes_nothing(description, how, data):
    trained, model = randomise(build(description), 1), randomise(build(description), 3)
    state = trained.state_dict()
    slots = {value.data_ptr() for value in state.values()}
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    assume(names and len(slots) == len(state))  # the name of a tie may be absent
    name = data.draw(st.sampled_from(names))
    if how == "drop":
        del state[name]
    elif how == "add":
        state[name + "_more"] = torch.zeros(2)
        assume("." in name)  # beside the root's own tensors stands what may belong to another model
    elif how == "reshape":
        state[name] = torch.zeros(7, 5)
    else:
        state[name + "_other"] = state.pop(name)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    before, objects = snapshot(model), identities(model)
    with pytest.raises(errors.TorchLoadError):
        smart_load(model, file)
    assert_equal_bits(snapshot(model), before)
    assert identities(model) == objects
