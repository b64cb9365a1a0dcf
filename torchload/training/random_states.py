"""The states of random number generators in a training checkpoint, checked and given back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torchload.core.checkpoint import TensorEntry
from torchload.core.text import quoted
from torchload.plan.plain import plain
from torchload.transfer import map_entry

__all__ = ["RandomState", "plan_random_states"]

# Containers of those: Megatron and Composer have a list with one for each rank; `random` is a file beside the weights.
_HOLDERS = ("rng_state", "rng_states", "rng", "random_states", "random_state", "rng_state_dict", "random")
_WORDS, _NUMPY_WORDS = 625, 624  # of a Mersenne twister; python's counts its position
_LEFT_BYTES, _NEXT_BYTES = 8, 16  # where torch keeps how many words are left before it makes new ones, and the next one


@dataclass(frozen=True, slots=True)
class RandomState:
    """A state that its generator takes.

    Attributes:
        kind: What generates the numbers: ``"python"``, ``"numpy"``, ``"torch"``, ``"cuda"``.
        path: Where it stands in the file.
        state: The state.
        get: Gives the state that there is now.
        set: Takes one.
    """

    kind: str
    path: str
    state: Any
    get: Callable[[], Any]
    set: Callable[[Any], object]


def plan_random_states(tree: Any, rank: int, ranks: int) -> tuple[list[RandomState], list[str]]:
    """The states of random number generators, each tried on a new one, and sentences about those that can't be used.

    With the one state of another process, all of them would draw the same numbers.
    """
    found: list[RandomState] = []
    notes: list[str] = []
    for kind, path, value, is_mine in _find(tree, rank):
        if any(state.kind == kind for state in found):
            continue
        try:
            state = plain(value, lambda entry: map_entry(entry).clone())
            if not is_mine and ranks > 1:
                raise ValueError("the file does not say which of the processes it belongs to")
            get, put, state = _KINDS[kind].take(state)
        except (MemoryError, OSError):
            raise  # a failure to read says nothing about what is in the file
        except Exception as error:  # noqa: BLE001 - each kind of generator has its own way to refuse
            notes.append(f"the random state {path!r} was not restored: {quoted(error)}")
            continue
        found.append(RandomState(kind, path, state, get, put))
    return found, notes


def _find(tree: Any, rank: int) -> Iterator[tuple[str, str, Any, bool]]:
    """Everything that looks like a state: (kind, path, value, whether it is known to be this process's)."""
    if not isinstance(tree, Mapping):
        return
    for holder in _HOLDERS:
        inside, path, is_mine = tree.get(holder), holder, holder == "random"  # files beside the weights are chosen
        if isinstance(inside, (list, tuple)) and rank < len(inside) and isinstance(inside[rank], Mapping):
            inside, path, is_mine = inside[rank], f"{holder}.{rank}", len(inside) > 1
        if isinstance(inside, Mapping):
            yield from ((kind, f"{path}.{name}", value, is_mine) for kind, name, value in _named(inside))
    yield from ((kind, name, value, False) for kind, name, value in _named(tree))


def _named(values: Mapping[Any, Any]) -> Iterator[tuple[str, str, Any]]:
    for kind, row in _KINDS.items():
        for name in row.names.split():
            if name in values and row.is_state(values[name]):
                yield kind, name, values[name]


# Each of these takes a state and gives (what reads the generator, what sets it, the state in its form); it raises where
# the generator would not take it.
_Generator = tuple[Callable[[], Any], Callable[[Any], object], Any]


def _python(state: Any) -> _Generator:
    version, words, gauss = state
    if len(words) != _WORDS or not all(type(word) is int for word in words):
        raise ValueError("it does not have the form of python's states")
    if not (gauss is None or type(gauss) is float):
        raise ValueError("its next number is not a number")
    state = (version, tuple(words), gauss)
    random.Random().setstate(state)  # noqa: S311 - not for secrets
    return random.getstate, random.setstate, state


def _numpy(state: Any) -> _Generator:
    import numpy as np

    if isinstance(state, dict):
        inner = state["state"]
        state = (state["bit_generator"], inner["key"], inner["pos"], state["has_gauss"], state["gauss"])
    name, words, position, has_gauss, gauss = state
    if not isinstance(words, torch.Tensor) and not all(isinstance(word, int) for word in words):
        raise ValueError(
            "it does not have the form of numpy's states"
        )  # numpy makes texts an array as wide as the longest
    key = words.numpy() if isinstance(words, torch.Tensor) else np.asarray(words)
    # numpy itself does not look at the position, and would read beyond the words.
    if name != "MT19937" or key.shape != (_NUMPY_WORDS,) or not (type(position) is int and 0 <= position <= len(key)):
        raise ValueError("it does not have the form of numpy's states")
    state = (name, key.astype(np.uint32), position, int(has_gauss), float(gauss))
    np.random.RandomState().set_state(state)
    return np.random.get_state, np.random.set_state, state


def _torch(state: Any) -> _Generator:
    # torch looks at the two positions one by one; together they could lead it beyond its words.
    left, position = (int(state[start : start + 4].view(torch.int32)) for start in (_LEFT_BYTES, _NEXT_BYTES))
    if left + position > _NUMPY_WORDS + 1:
        raise ValueError("it does not have the form of torch's states")
    torch.Generator().set_state(state)
    return torch.get_rng_state, torch.set_rng_state, state


def _cuda(state: Any) -> _Generator:
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here")
    if isinstance(state, torch.Tensor):
        torch.Generator(torch.device("cuda", torch.cuda.current_device())).set_state(state)
        return torch.cuda.get_rng_state, torch.cuda.set_rng_state, state
    if len(state) > torch.cuda.device_count():
        raise ValueError(f"it was saved with {len(state)} CUDA devices, more than are here")
    for index, one in enumerate(state):
        torch.Generator(torch.device("cuda", index)).set_state(one)
    return torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all, list(state)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _is_bytes(value: Any) -> bool:
    return isinstance(value, TensorEntry) and value.dtype is torch.uint8 and len(value.shape) == 1


class _Kind(NamedTuple):
    """What generates numbers: the names of its state, what that looks like, and what takes it."""

    names: str
    is_state: Callable[[Any], bool]
    take: Callable[[Any], _Generator]


_KINDS: dict[str, _Kind] = {
    "python": _Kind(
        "python random python_rng_state random_rng_state py_rng_state python_random_state python_state random_state "
        "rng_python",
        lambda value: _is_list(value, 3) and isinstance(value[1], (list, tuple)),
        _python,
    ),
    "numpy": _Kind(
        "numpy np numpy_rng_state np_rng_state numpy_random_state np_random_state numpy_state numpy_random_seed "
        "rng_numpy",
        lambda value: (
            "bit_generator" in value if isinstance(value, Mapping) else _is_list(value, 5) and isinstance(value[0], str)
        ),
        _numpy,
    ),
    "torch": _Kind(
        "torch cpu torch_rng_state cpu_rng_state rng_state torch_random_state torch_state torch_manual_seed rng_torch",
        _is_bytes,
        _torch,
    ),
    "cuda": _Kind(
        "cuda cuda_rng_state cuda_rng_states cuda_rng_state_all torch_cuda_rng_state gpu_rng_state "
        "torch_cuda_rng_state_all cuda_random_state cuda_state torch_cuda_manual_seed rng_cuda",
        lambda value: (
            all(map(_is_bytes, value)) and bool(value) if isinstance(value, (list, tuple)) else _is_bytes(value)
        ),
        _cuda,
    ),
}
