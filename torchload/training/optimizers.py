"""An optimizer's state from a checkpoint, checked against its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchload.core.checkpoint import OpaqueTensor, Record, TensorEntry
from torchload.core.optimizers import FLAT_GROUPS, FLAT_STATE, is_flat_optimizer_state
from torchload.core.text import group_names, plural
from torchload.match.names import align, tree_of
from torchload.training.optimizer_form import malformed

__all__ = ["OptimizerPlan", "plan_optimizer"]

# State of torch's own and of common other optimizers that has the shape of the parameter it belongs to.
_LIKE_PARAMETER = frozenset(
    "exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer square_avg grad_avg acc_delta sum prev step_size ax z "
    "exp_avg_diff neg_pre_grad".split()
)
# Entries of a group that say how an optimizer is run, which younger versions added: a file may lack them.
_ADDED_LATER = frozenset("maximize foreach capturable differentiable fused decoupled_weight_decay amsgrad".split())


@dataclass(slots=True)
class OptimizerPlan:
    """A state that fits.

    Attributes:
        optimizer: What it is for.
        parameters: The optimizer's parameters, by number.
        names: What the model calls each of them; empty for those that aren't the model's.
        groups: The file's groups with the numbers of this optimizer's parameters, everything else as plain values.
        state: Number of a parameter (or another key) → its state in the file.
        reordered: Whether parameters were matched by name and stand in another order than in the file.
        problems: What stands against it, one sentence each.
    """

    optimizer: torch.optim.Optimizer
    parameters: list[torch.Tensor]
    names: list[str]
    groups: list[dict[str, Any]] = field(default_factory=list)
    state: dict[Any, Any] = field(default_factory=dict)
    reordered: bool = False
    problems: list[str] = field(default_factory=list)

    def name_of(self, number: int) -> str:
        """What to call a parameter in a message."""
        return self.names[number] or f"parameter {number}"


def plan_optimizer(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    names: Mapping[int, str],
    file_order: Mapping[int, int],
) -> OptimizerPlan:
    """Check the state of an optimizer against its parameters.

    Args:
        optimizer: What the state is for.
        state: Its ``state`` and ``param_groups`` in the file, or the same in one flat mapping.
        names: Identity of a parameter → its name in the model, in the model's order.
        file_order: Identity of a parameter → its place among the file's weights, where that says in which order the
            file's own model has them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    plan = OptimizerPlan(optimizer, parameters, [names.get(id(parameter), "") for parameter in parameters])
    if problem := malformed(state):
        plan.problems.append(f"this is no optimizer's state: {problem}")
        return plan
    if is_flat_optimizer_state(state):
        state = _grouped(plan, state)
        if plan.problems:
            return plan
    groups = [group for group in state["param_groups"] if isinstance(group, Mapping)]
    file_groups = [list(group.get("params", ())) for group in groups]
    if len(file_groups) != len(optimizer.param_groups):
        count = plural(len(file_groups), "parameter group")
        plan.problems.append(f"the file has {count}, the optimizer {len(optimizer.param_groups)}")
        return plan
    file_names = _file_names(groups, file_groups)
    values = _with_keys_of(file_groups, state.get("state", {}))
    order = _by_name(plan, file_names) if file_names else _by_position(plan, file_groups)
    if order is None:
        return plan
    if values and not file_names:
        _check_order(plan, names, file_order)
    plan.groups = _numbered_groups(plan, groups)
    numbered = {key: number for number, key in enumerate(order)}
    plan.reordered = order != [key for group in file_groups for key in group]
    plan.state = {numbered.get(key, key): each for key, each in values.items()}
    if any(base.__module__.startswith("torch.optim.") for base in type(optimizer).__mro__[:-2]):
        _count_steps_by_parameter(plan)
        _check_completeness(plan)
    _check_shapes(plan)
    return plan


def _numbers(plan: OptimizerPlan) -> list[range]:
    """The numbers of the parameters of each group."""
    numbers, first = [], 0
    for group in plan.optimizer.param_groups:
        numbers.append(range(first, first + len(group["params"])))
        first += len(group["params"])
    return numbers


# --- a state in one flat mapping, as `torch.distributed.checkpoint` writes it on request and torchtitan does ---


def _grouped(plan: OptimizerPlan, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same state as `torch.optim` has it, by the file's names of the parameters, in the optimizer's groups.

    Every entry has a name of its own: ``state.<parameter>.exp_avg``, ``param_groups.<parameter>.lr``. Which parameters
    were one group is not said; those of a group have the same settings.
    """
    state, settings = _split(flat, FLAT_STATE), _split(flat, FLAT_GROUPS)
    pairs = align(tree_of(settings), tree_of(plan.names)).pairs
    if missing := [name for name in plan.names if name not in pairs]:
        plan.problems.append(f"the file has no settings for {', '.join(group_names(missing)[:6])}")
    _check_extra(plan, settings.keys() - set(pairs.values()))
    groups = []
    for index, numbers in enumerate(_numbers(plan)):
        in_file = [pairs[name] for name in map(plan.names.__getitem__, numbers) if name in pairs]
        first = settings[in_file[0]] if in_file else {}
        if odd := [name for name in in_file if not _same(settings[name], first)]:
            plan.problems.append(f"{odd[0]} has other settings in the file than the rest of group {index} here")
        groups.append({**first, "params": in_file})
    return {"state": state, "param_groups": groups}


def _split(flat: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Parameter → what is said of it; the last segment of a name is what."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        if name.startswith(kind):
            parameter, _, what = name[len(kind) :].rpartition(".")
            found.setdefault(parameter, {})[what] = value
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether settings agree, as far as they are plain: one that is a tensor has data of its own for each parameter."""
    plain = [name for name in one if not isinstance(one[name], TensorEntry)]
    return one.keys() == other.keys() and all(one[name] == other[name] for name in plain)


def _check_extra(plan: OptimizerPlan, names: Iterable[str]) -> None:
    if extra := group_names(sorted(names)):
        plan.problems.append(f"the file has parameters that this optimizer lacks: {', '.join(extra[:6])}")


# --- which state is whose ---


def _file_names(
    groups: Sequence[Mapping[str, Any]], file_groups: Sequence[Sequence[Any]]
) -> dict[str, tuple[int, Any]]:
    """Name → (group, key of its state), where the file names its parameters."""
    found: dict[str, tuple[int, Any]] = {}
    for index, (group, keys) in enumerate(zip(groups, file_groups)):
        named = group.get("param_names")
        if isinstance(named, (list, tuple)) and len(named) == len(keys):
            found.update((str(name), (index, key)) for name, key in zip(named, keys))
        elif keys and all(isinstance(key, str) for key in keys):  # as FSDP and DCP save it
            found.update((key, (index, key)) for key in keys)
        elif keys:
            return {}
    return found


def _by_name(plan: OptimizerPlan, file_names: Mapping[str, tuple[int, Any]]) -> list[Any] | None:
    """The file's key for each of the optimizer's parameters, matched by name."""
    if not all(plan.names):
        plan.problems.append(
            "it has parameters that are not the model's, so that the names in the file can't be matched with them"
        )
        return None
    pairs = align(tree_of(file_names), tree_of(plan.names)).pairs
    # Frozen parameters have no state; DeepSpeed leaves them out.
    frozen = {name for name, parameter in zip(plan.names, plan.parameters) if not parameter.requires_grad}
    if missing := [name for name in plan.names if name not in pairs and name not in frozen]:
        plan.problems.append(f"no group of the file has {', '.join(group_names(missing)[:6])}")
    _check_extra(plan, file_names.keys() - set(pairs.values()))
    if plan.problems:
        return None
    order: list[Any] = []
    for index, numbers in enumerate(_numbers(plan)):
        for name in map(plan.names.__getitem__, numbers):
            where, key = file_names[pairs[name]] if name in pairs else (index, object())
            if where != index:
                plan.problems.append(f"{name} is in group {where} of the file and in group {index} here")
            order.append(key)
    return order


def _by_position(plan: OptimizerPlan, file_groups: Sequence[Sequence[Any]]) -> list[Any] | None:
    """The file's key for each of the optimizer's parameters, in its order."""
    for index, (numbers, keys) in enumerate(zip(_numbers(plan), file_groups)):
        if len(numbers) != len(keys):
            plan.problems.append(
                f"group {index} has {plural(len(keys), 'parameter')} in the file and {len(numbers)} here"
            )
    return None if plan.problems else [key for keys in file_groups for key in keys]


def _with_keys_of(file_groups: Sequence[Sequence[Any]], state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state by the numbers that the groups have: `torch.distributed.checkpoint` makes text of them."""
    numbers = {str(key): key for keys in file_groups for key in keys if isinstance(key, int)}
    return {numbers.get(key, key): values for key, values in state.items()} if numbers else state


def _check_order(plan: OptimizerPlan, names: Mapping[int, str], file_order: Mapping[int, int]) -> None:
    """Numbers mean the same parameters only if both models have them in the same order, or the optimizer the file's."""
    model_order = {parameter: number for number, parameter in enumerate(names)}
    for index, numbers in enumerate(_numbers(plan)):
        live = [id(plan.parameters[number]) for number in numbers]
        live = [parameter for parameter in live if parameter in file_order and parameter in model_order]
        in_file = sorted(live, key=file_order.__getitem__)
        if in_file not in (live, sorted(live, key=model_order.__getitem__)):
            first, second = next((a, b) for a, b in zip(in_file, live) if a != b)
            plan.problems.append(
                f"the file numbers the parameters of group {index}, and its own model has them in another order than "
                f"this one ({names[first]} where {names[second]} is here): give the optimizer its parameters in the "
                "order of the file's model"
            )


# --- whether it fits ---


def _numbered_groups(plan: OptimizerPlan, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The file's groups with the numbers of the optimizer's parameters, and what only a group here has."""
    numbered: list[dict[str, Any]] = []
    for group, live, numbers in zip(groups, plan.optimizer.param_groups, _numbers(plan)):
        if not numbered:
            _check_kind(plan, group, live)
        added = live.keys() - plan.optimizer.defaults.keys() - group.keys()  # by a scheduler that is here: 'initial_lr'
        entries = {name: live[name] for name in live if name in added}
        entries.update((name, value) for name, value in group.items() if name not in ("params", "param_names"))
        if "param_names" in live:
            entries["param_names"] = live["param_names"]
        numbered.append({**entries, "params": list(numbers)})
    return numbered


def _check_kind(plan: OptimizerPlan, group: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    lacking = [name for name in plan.optimizer.defaults if name not in group and name not in _ADDED_LATER]
    if lacking := [name for name in lacking if name in live]:
        plan.problems.append(
            f"the file's groups lack {', '.join(map(repr, lacking))}: they are of another kind of optimizer than "
            f"{type(plan.optimizer).__name__}"
        )


def _count_steps_by_parameter(plan: OptimizerPlan) -> None:
    """Give each parameter the number of steps that apex's and DeepSpeed's FusedAdam keep for a whole group."""
    for group in plan.groups:
        if "step" in group and "step" not in plan.optimizer.defaults:
            step = group.pop("step")
            for number in group["params"]:
                if isinstance(values := plan.state.get(number), Mapping):
                    plan.state[number] = {"step": step, **values}


def _check_completeness(plan: OptimizerPlan) -> None:
    """Parameters of a group have the same kinds of values, or none yet; Adafactor's depend on the dimensions."""
    for group in plan.groups:
        kinds: dict[bool, set[str]] = {}
        states = {number: plan.state.get(number) for number in group["params"]}
        full = {number: values for number, values in states.items() if isinstance(values, Mapping) and values}
        for number, values in full.items():
            kinds.setdefault(plan.parameters[number].dim() > 1, set()).update(map(str, values))
        for number, values in full.items():
            if lacking := kinds[plan.parameters[number].dim() > 1] - values.keys():
                missing = ", ".join(map(repr, sorted(lacking)))
                plan.problems.append(f"the state of {plan.name_of(number)} lacks {missing}")


def _check_shapes(plan: OptimizerPlan) -> None:
    for number, parameter in enumerate(plan.parameters):
        values = plan.state.get(number)
        if not isinstance(values, Mapping):
            continue
        for key, value in values.items():
            what = f"{key} of {plan.name_of(number)}"
            if isinstance(value, OpaqueTensor):
                plan.problems.append(f"{what} is {value.reason}")
            elif isinstance(value, Record):
                plan.problems.append(f"{what} is {value.name}, which would have to be built by running code")
            elif isinstance(value, TensorEntry) and key in _LIKE_PARAMETER:
                if value.shape != tuple(parameter.shape):
                    plan.problems.append(
                        f"{what} is {value.shape} in the file, the parameter {tuple(parameter.shape)}: "
                        "the parameters are in another order, or of another model"
                    )
