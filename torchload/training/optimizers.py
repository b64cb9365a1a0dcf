"""An optimizer's state from a checkpoint, checked against its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchload.core.checkpoint import OpaqueTensor, Record, TensorEntry
from torchload.core.optimizers import is_flat_optimizer_state
from torchload.core.text import group_names, plural
from torchload.match.names import align, tree_of
from torchload.training.flat_optimizer import grouped
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
        groups: The file's groups with the numbers of this optimizer's parameters, everything else as plain values.
        state: Number of a parameter (or another key) → its state in the file.
        parameters: The optimizer's parameters, by number.
        reordered: Whether parameters were matched by name and stand in another order than in the file.
    """

    optimizer: torch.optim.Optimizer
    groups: list[dict[str, Any]]
    state: dict[Any, Any]
    parameters: list[torch.Tensor]
    reordered: bool = False
    problems: list[str] = field(default_factory=list)


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

    Returns:
        What to load; its `problems` say, one sentence each, what stands against it.
    """
    model_groups = [list(group["params"]) for group in optimizer.param_groups]
    flat = [parameter for group in model_groups for parameter in group]
    plan = OptimizerPlan(optimizer, [], {}, flat)
    if problem := malformed(state):
        plan.problems.append(f"this is no optimizer's state: {problem}")
        return plan
    if is_flat_optimizer_state(state):
        state = grouped(
            state, [[names.get(id(parameter), "") for parameter in group] for group in model_groups], plan.problems
        )
        if plan.problems:
            return plan
    groups = [group for group in state["param_groups"] if isinstance(group, Mapping)]
    file_groups = [list(group.get("params", ())) for group in groups]
    if len(file_groups) != len(model_groups):
        plan.problems.append(
            f"the file has {plural(len(file_groups), 'parameter group')}, the optimizer {len(model_groups)}"
        )
        return plan
    file_names = _file_names(groups, file_groups)
    values = _with_keys_of(file_groups, state.get("state", {}))
    order = (
        _by_name(plan, model_groups, file_names, names) if file_names else _by_position(plan, model_groups, file_groups)
    )
    if order is None:
        return plan
    if values and not file_names:
        _check_order(plan, model_groups, names, file_order)
    plan.groups = _numbered_groups(plan, groups)
    numbered = {key: number for number, key in enumerate(order)}
    plan.reordered = order != [key for group in file_groups for key in group]
    plan.state = {numbered.get(key, key): each for key, each in values.items()}
    if _is_torchs_own(optimizer):
        _count_steps_by_parameter(plan)
        _check_completeness(plan, names)
    _check_shapes(plan, names)
    return plan


def _numbered_groups(plan: OptimizerPlan, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The file's groups with the numbers of the optimizer's parameters, and what only a group here has."""
    numbered: list[dict[str, Any]] = []
    number = 0
    for index, (group, live) in enumerate(zip(groups, plan.optimizer.param_groups)):
        _check_group(plan, index, group, live)
        added = live.keys() - plan.optimizer.defaults.keys() - group.keys()  # by a scheduler that is here: 'initial_lr'
        entries = {name: live[name] for name in live if name in added}
        entries.update((name, value) for name, value in group.items() if name not in ("params", "param_names"))
        if "param_names" in live:
            entries["param_names"] = live["param_names"]
        numbered.append({**entries, "params": list(range(number, number + len(live["params"])))})
        number += len(live["params"])
    return numbered


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


def _by_name(
    plan: OptimizerPlan,
    model_groups: Sequence[Sequence[torch.Tensor]],
    file_names: Mapping[str, tuple[int, Any]],
    names: Mapping[int, str],
) -> list[Any] | None:
    """The file's key for each of the optimizer's parameters, matched by name."""
    flat = [names.get(id(parameter), "") for group in model_groups for parameter in group]
    if not all(flat):
        plan.problems.append("it has parameters that are not the model's, and the file names its own")
        return None
    pairs = align(tree_of(file_names), tree_of(flat)).pairs
    # Frozen parameters have no state; DeepSpeed leaves them out.
    frozen = {name for name, parameter in zip(flat, plan.parameters) if not parameter.requires_grad}
    if missing := [name for name in flat if name not in pairs and name not in frozen]:
        plan.problems.append(f"the file has no state group for {', '.join(group_names(missing)[:6])}")
    used = set(pairs.values())
    if extra := [name for name in file_names if name not in used]:
        plan.problems.append(f"the file has parameters that it doesn't optimize: {', '.join(group_names(extra)[:6])}")
    if plan.problems:
        return None
    order: list[Any] = []
    for index, group in enumerate(model_groups):
        for parameter in group:
            name = names[id(parameter)]
            where, key = file_names[pairs[name]] if name in pairs else (index, object())
            if where != index:
                plan.problems.append(f"{name} is in group {where} of the file and in group {index} here")
            order.append(key)
    return order


def _by_position(
    plan: OptimizerPlan,
    model_groups: Sequence[Sequence[torch.Tensor]],
    file_groups: Sequence[Sequence[Any]],
) -> list[Any] | None:
    """The file's key for each of the optimizer's parameters, in its order."""
    for index, (group, keys) in enumerate(zip(model_groups, file_groups)):
        if len(group) != len(keys):
            plan.problems.append(
                f"group {index} has {plural(len(keys), 'parameter')} in the file and {len(group)} here"
            )
    return None if plan.problems else [key for keys in file_groups for key in keys]


def _with_keys_of(file_groups: Sequence[Sequence[Any]], state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state by the numbers that the groups have: `torch.distributed.checkpoint` makes text of them."""
    numbers = {str(key): key for keys in file_groups for key in keys if isinstance(key, int)}
    return {numbers.get(key, key): values for key, values in state.items()} if numbers else state


def _check_order(
    plan: OptimizerPlan,
    model_groups: Sequence[Sequence[torch.Tensor]],
    names: Mapping[int, str],
    file_order: Mapping[int, int],
) -> None:
    """Numbers mean the same parameters only if both models have them in the same order, or the optimizer the file's."""
    model_order = {parameter: number for number, parameter in enumerate(names)}
    for index, group in enumerate(model_groups):
        live = [id(parameter) for parameter in group if id(parameter) in file_order and id(parameter) in model_order]
        in_file = sorted(live, key=file_order.__getitem__)
        if in_file not in (live, sorted(live, key=model_order.__getitem__)):
            first, second = next((a, b) for a, b in zip(in_file, live) if a != b)
            plan.problems.append(
                f"the file numbers the parameters of group {index}, and its own model has them in another order than "
                f"this one ({names[first]} where {names[second]} is here): give the optimizer its parameters in the "
                "order of the file's model"
            )


def _check_group(plan: OptimizerPlan, index: int, group: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    lacking = [name for name in plan.optimizer.defaults if name not in group and name not in _ADDED_LATER]
    lacking = [name for name in lacking if name in live]
    if lacking and index == 0:
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


def _check_completeness(plan: OptimizerPlan, names: Mapping[int, str]) -> None:
    """Parameters of a group have the same kinds of values, or none yet; Adafactor's depend on the dimensions."""
    for group in plan.groups:
        kinds: dict[bool, set[str]] = {}
        states = {number: plan.state.get(number) for number in group["params"]}
        full = {number: values for number, values in states.items() if isinstance(values, Mapping) and values}
        for number, values in full.items():
            kinds.setdefault(plan.parameters[number].dim() > 1, set()).update(map(str, values))
        for number, values in full.items():
            if lacking := kinds[plan.parameters[number].dim() > 1] - values.keys():
                name = names.get(id(plan.parameters[number]), f"parameter {number}")
                plan.problems.append(f"the state of {name} lacks {', '.join(map(repr, sorted(lacking)))}")


def _is_torchs_own(optimizer: torch.optim.Optimizer) -> bool:
    return any(base.__module__.startswith("torch.optim.") for base in type(optimizer).__mro__[:-2])


def _check_shapes(plan: OptimizerPlan, names: Mapping[int, str]) -> None:
    for number, parameter in enumerate(plan.parameters):
        values = plan.state.get(number)
        if not isinstance(values, Mapping):
            continue
        for key, value in values.items():
            what = f"{key} of {names.get(id(parameter), f'parameter {number}')}"
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
