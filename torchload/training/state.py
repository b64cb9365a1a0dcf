"""What else a training checkpoint holds: which container is the optimizer's state, which number is the epoch.

One closed table; a row per way of writing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torchload.core.checkpoint import Container, OpaqueTensor, Record, TensorEntry, record_fields
from torchload.core.optimizers import is_optimizer_state
from torchload.errors import AmbiguousCheckpointError
from torchload.match.tables import SWAPPED, Standing, container_standing, words_of

__all__ = [
    "COMPANIONS",
    "NUMBERED",
    "RANDOM_STATE",
    "RANDOM_STATES",
    "Found",
    "TrainingState",
    "average_of",
    "find_training_state",
    "plain_values",
    "weights_of",
]

# What is looked for → dotted paths where it may stand, the surest first, with who writes it so.
PATHS: dict[str, dict[str, str]] = {
    "optimizer": {
        "optimizer_state_dict": "PyTorch's tutorial",
        "optimizer_states": "Lightning: a list",
        "optimizer": "fvcore, mmengine, timm, nanoGPT, ultralytics, torchvision's references",
        "trainer._trainer.optimizer": "detectron2",
        "state.optimizers": "Composer: class name → state",
        "last_optimizer_state": "fairseq",
        "optimizer_state": "OpenPCDet",
        "optimizers": "lists of them",
        "optim_state_dict": "torch.distributed.checkpoint's examples",
        "optim": "OpenNMT, torchtitan",
        "opt_state_dict": "scripts",
        "opt": "fastai, guided-diffusion",
    },
    "scheduler": {
        "scheduler_state_dict": "PyTorch's forum recipe",
        "lr_scheduler_state_dict": "scripts",
        "lr_schedulers": "Lightning: a list",
        "param_schedulers": "mmengine: a list",
        "lr_scheduler": "torchvision's references",
        "scheduler": "fvcore",
        "trainer.hooks.LRScheduler": "detectron2",
        "state.schedulers": "Composer: class name → state",
        "lr_scheduler_state": "OpenPCDet",
        "schedulers": "lists of them",
    },
    "scaler": {
        "scaler_state_dict": "scripts",
        "scaler": "ultralytics, torchvision's references",
        "amp_scaler": "timm",
        "grad_scaler": "scripts",
        "callbacks.MixedPrecision": "Lightning 2",
        "MixedPrecision": "Lightning 2, in the precision plugin's own name",
        "MixedPrecisionPlugin": "Lightning 2.0",
        "native_amp_scaling_state": "Lightning 1",
        "optimizer.loss_scaler": "mmengine's AmpOptimWrapper",
        "trainer._trainer.grad_scaler": "detectron2",
    },
    "epoch": {
        "epoch": "nearly all",
        "meta.epoch": "mmengine",
        "current_epoch": "scripts",
        "epochs": "scripts",
        "trainer_state.epoch": "transformers' Trainer",
        "state.timestamp.Timestamp.epoch": "Composer",
    },
    "step": {
        "global_step": "Lightning, transformers",
        "step": "scripts",
        "iter_num": "nanoGPT",
        "iteration": "fvcore, Megatron",
        "meta.iter": "mmengine",
        "global_steps": "DeepSpeed",
        "steps": "scripts",
        "iter": "scripts",
        "it": "scripts",
        "num_updates": "fairseq",
        "trainer_state.global_step": "transformers' Trainer",
        "train_state.step": "torchtitan",
    },
}

# What lies beside the weights in a folder, the preferred name first: transformers' Trainer, accelerate's save_state;
# under FSDP they write sharded states into folders.
COMPANIONS: dict[str, tuple[str, ...]] = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer.pth", "optimizer_0"),
    "scheduler": ("scheduler.pt", "scheduler.bin", "scheduler.pth"),
    "scaler": ("scaler.pt", "scaler.pth"),
    "trainer_state": ("trainer_state.json",),
}

NUMBERED = ("optimizer", "scheduler")  # where there are several models, each has its own

# Files with the states of random number generators, one for each rank (accelerate, Trainer), or for the only one.
RANDOM_STATES = ("random_states_{rank}.pkl", "rng_state_{rank}.pth")
RANDOM_STATE = "rng_state.pth"


@dataclass(frozen=True, slots=True)
class Found:
    """A part of the training state.

    Attributes:
        path: Where it stands.
        value: What is there.
        name: What the file calls it, where there are several under names.
    """

    path: str
    value: Any
    name: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The training state of a checkpoint.

    Attributes:
        optimizers: States of optimizers, in the file's order.
        schedulers: States of schedulers, in the file's order.
        scaler: State of a gradient scaler.
        epoch: The epoch that the file names.
        step: The step that the file names.
    """

    optimizers: list[Found] = field(default_factory=list)
    schedulers: list[Found] = field(default_factory=list)
    scaler: Found | None = None
    epoch: int | None = None
    step: int | None = None


def find_training_state(root: Any) -> TrainingState:
    """Find the parts of a training state by the names that frameworks give them, else by what they hold.

    Example:
        >>> state = find_training_state({"optimizer": {"state": {}, "param_groups": []}, "iter_num": 5})
        >>> state.optimizers[0].path, state.epoch, state.step
        ('optimizer', None, 5)
    """
    scalers = [found for found in _at("scaler", root) if isinstance(found.value, Mapping)]
    epoch, step = (
        next((int(found.value) for found in _at(what, root) if _is_number(found.value)), None)
        for what in ("epoch", "step")
    )
    return TrainingState(
        optimizers=_found("optimizer", root, is_optimizer_state) or _elsewhere("optimizer", root, is_optimizer_state),
        schedulers=_found("scheduler", root, _is_scheduler) or _elsewhere("scheduler", root, _is_torch_scheduler),
        scaler=scalers[0] if scalers else None,
        epoch=epoch,
        step=step,
    )


def _is_scheduler(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(key, str) for key in value)


def _is_torch_scheduler(value: Any) -> bool:
    """Whether it is what torch's schedulers return, whatever it is called."""
    return _is_scheduler(value) and "last_epoch" in value and ("_last_lr" in value or "base_lrs" in value)


def _found(what: str, root: Any, is_state: Callable[[Any], bool]) -> list[Found]:
    return next(filter(None, (_states(found, is_state) for found in _at(what, root))), [])


def _elsewhere(what: str, root: Any, is_state: Callable[[Any], bool]) -> list[Found]:
    """States that only what they hold gives away: at the top, else in the one mapping there that has any."""
    if (found := _under_other_names(root, is_state)) or not isinstance(root, Mapping):
        return found
    inside = [
        [replace(state, path=f"{name}.{state.path}") for state in states]
        for name, inner in root.items()
        if isinstance(inner, Mapping)
        and (states := _found(what, inner, is_state) or _under_other_names(inner, is_state))
    ]
    return inside[0] if len(inside) == 1 else []


def _under_other_names(root: Any, is_state: Callable[[Any], bool]) -> list[Found]:
    """The states at the top, such as ``optim_g`` and ``optim_d``; each is called what its name has of its own."""
    held = {str(name): value for name, value in root.items() if is_state(value)} if isinstance(root, Mapping) else {}
    if len(held) < 2:
        return [Found(name, value) for name, value in held.items()]
    words = {name: name.split("_") for name in held}
    shared = set.intersection(*map(set, words.values()))
    own = {name: "_".join(word for word in words[name] if word not in shared) for name in held}
    return [Found(name, value, own[name] or name) for name, value in held.items()]


def _states(found: Found, is_state: Callable[[Any], bool]) -> list[Found]:
    """One state, or several in a list or under names of their own."""
    value = found.value
    if isinstance(value, Mapping):
        if is_state(value) and not all(isinstance(inner, Mapping) for inner in value.values()):
            return [found]
        inner = [Found(f"{found.path}.{name}", state, str(name)) for name, state in value.items()]
    elif isinstance(value, (list, tuple)):
        inner = [Found(f"{found.path}.{index}", state) for index, state in enumerate(value)]
    else:
        return []
    return inner if inner and all(is_state(state.value) for state in inner) else []


def _at(what: str, root: Any) -> Iterator[Found]:
    for path in PATHS[what]:
        here = root
        for segment in path.split("."):
            here = here[segment] if isinstance(here, Mapping) and segment in here else None
        if here is not None:
            yield Found(path, here)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1 << 63


# --- raw and averaged weights ---


def weights_of(root: Any) -> Any:
    """The tree without averaged and best weights, for who wants the running ones: training goes on from those."""
    if not isinstance(root, Mapping):
        return root
    best = [name for name in root if _is_best(root, name)]
    others = {name for name in root if _is_average(root, name)}.union(best)
    if best and not any(_may_be_weights(root, name) for name in root.keys() - others):
        raise AmbiguousCheckpointError(
            f"the only weights are those of the best epoch so far ({best[0]!r}), and the optimizer's state may belong "
            f"to later ones. If it belongs to these: smart_resume(..., key={best[0]!r})",
            candidates=best,
        )
    return Container({name: value for name, value in root.items() if name not in others}) if others else root


def _may_be_weights(root: Mapping[Any, Any], name: Any) -> bool:
    """Whether what stands under a name may hold a model's weights."""
    if isinstance(root[name], (TensorEntry, OpaqueTensor, Record)):
        return True
    return isinstance(root[name], Mapping) and container_standing(str(name)) is not Standing.NOT_WEIGHTS


def _is_best(root: Mapping[Any, Any], name: Any) -> bool:
    """Whether a container holds the weights of the best epoch so far, which no optimizer's state goes with."""
    return isinstance(name, str) and isinstance(root[name], Mapping) and "best" in words_of(name)


def average_of(root: Any) -> Container:
    """Only what is averaged of a tree."""
    if not isinstance(root, Mapping):
        return Container()
    counters, weights = root.get("averaging_state"), root.get("state_dict")
    if isinstance(counters, Mapping) and isinstance(weights, Mapping):  # Lightning takes its AveragedModel apart
        return Container({"average": Container({**counters, **{f"module.{name}": weights[name] for name in weights}})})
    return Container({name: value for name, value in root.items() if _is_average(root, name)})


def _is_average(root: Mapping[Any, Any], name: Any) -> bool:
    for swap in SWAPPED:
        if swap.is_in(root):
            return bool(name == swap.average)
    if isinstance(root[name], (TensorEntry, OpaqueTensor)) or not isinstance(name, str):
        return False
    return container_standing(name) is Standing.AVERAGE


# --- whatever else ---


def plain_values(root: Any, known: set[str]) -> dict[str, Any]:
    """Everything else at the top of a tree than the `known` names that is plain data, of no use to model or optimizer.

    Returns:
        Name → numbers, strings, and lists and dicts of such; of objects (an `argparse.Namespace`) their attributes.
        What holds a tensor, or can't be told without running code, is left out.
    """
    values: dict[str, Any] = {}
    known_values: dict[int, Any] = {}
    if isinstance(root, Mapping):
        for name, value in root.items():
            if str(name) not in known:
                try:
                    values[str(name)] = _plain(value, known_values)
                except _NotPlainError:
                    continue
    return values


class _NotPlainError(Exception):
    """A value that holds a tensor or an object, or itself."""


_DEEPEST = 50
_PENDING = object()


def _plain(value: Any, known: dict[int, Any], levels: int = _DEEPEST) -> Any:
    """The value without records; what the file has once, the result has once."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, set, frozenset)):
        return value
    if not isinstance(value, (Mapping, list, tuple, Record)) or levels == 0:
        raise _NotPlainError
    found = known.get(id(value))
    if found is None:
        known[id(value)] = _PENDING
        if isinstance(value, (list, tuple)):
            found = type(value)([_plain(inner, known, levels - 1) for inner in value])
        else:
            inside = record_fields(value) if isinstance(value, Record) else value
            if isinstance(value, Record) and not inside:
                raise _NotPlainError
            found = {name: _plain(inner, known, levels - 1) for name, inner in inside.items()}
        known[id(value)] = found
    if found is _PENDING:
        raise _NotPlainError
    return found
