"""`smart_resume`: put model, optimizer, scheduler and the rest back to where training stopped, all of it or nothing."""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from torchload import hooks, loading
from torchload.collector import collector_paused
from torchload.companions.optimizers import OptimizerPlan, Place, plan_optimizer, read_states
from torchload.companions.run_folder import training_tree
from torchload.companions.training import Found, average_of, find_training_state, plain_values, weights_of
from torchload.errors import IncompatibleCheckpointError
from torchload.execute import carry_out, compare_ties, extents_of
from torchload.explain import plural
from torchload.formats import open_checkpoint
from torchload.index import Checkpoint
from torchload.keys.rewrite import Rename
from torchload.model.placement import DeviceSpec, Placement
from torchload.model.shards import is_sharded
from torchload.model.target import Slot, Target, describe_model
from torchload.plan import DtypeSpec, LoadPlan, Options, glob_matcher, make_plan
from torchload.report import LoadReport
from torchload.select import Selection
from torchload.steps import select_for
from torchload.transfer import map_entry, verify_extents

__all__ = ["ResumeReport", "smart_resume"]

_log = logging.getLogger("torchload")


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """The account of a resumption. `str()` gives it in a few lines; it holds no tensor data.

    Attributes:
        load: The account of the model's weights.
        ema: The account of the averaged weights, where they were asked for.
        epoch: The epoch that the file names, as it stands there: whether it is the last one that was finished or the
            next one to begin is the convention of the script that wrote it.
        step: The step that the file names, likewise.
        values: Everything else at the file's top level that is plain data: name → numbers, strings, lists, dicts, and
            the attributes of objects such as an `argparse.Namespace`.
        restored: What was restored beside the weights, one phrase each.
        notes: Sentences worth reading.
    """

    load: LoadReport
    ema: LoadReport | None = None
    epoch: int | None = None
    step: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    restored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        at = [f"{name} {value}" for name, value in (("epoch", self.epoch), ("step", self.step)) if value is not None]
        lines = [str(replace(self.load, training=False))]  # which is as it should be
        if at:
            lines.append(f"  at      {', '.join(at)}")
        lines += [f"  resumed {phrase}" for phrase in self.restored]
        if self.ema is not None:
            lines.append(f"  average {self.ema.tensors:,} tensors from {self.ema.key or 'the top level'!r}")
        lines += [f"  note    {note}" for note in self.notes]
        return "\n".join(lines)


def smart_resume(
    model: nn.Module,
    path: Any,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    device: DeviceSpec = None,
    *,
    scaler: Any = None,
    ema: Any = None,
    dtype: DtypeSpec = None,
    strict: bool = True,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    skip: Iterable[str] = (),
    verify: bool = False,
) -> ResumeReport:
    """Restore the whole state of a training run from a checkpoint, so that it goes on as if never interrupted.

    The parts are found by the names that frameworks give them: the plain recipe with ``model_state_dict`` and
    ``optimizer_state_dict``, Lightning, mmengine, timm, nanoGPT, ultralytics, fvcore and detectron2, Composer, folders
    of accelerate and of transformers' Trainer, and others. As in `smart_load`, nothing in the file is run, and
    everything is checked before anything changes. If any part fails, all are as they were.

    Args:
        model: The model. It gets the raw weights, not their average: training goes on from those.
        path: A checkpoint file, or a folder with the parts side by side.
        optimizer: An optimizer over the model's parameters, or several as the file has them. Their state comes to the
            device and dtype of each parameter.
        scheduler: A learning-rate scheduler, or several: anything with ``state_dict`` and ``load_state_dict``.
        device: As in `smart_load`.
        scaler: A `torch.amp.GradScaler`.
        ema: What receives the averaged weights: a module (`torch.optim.swa_utils.AveragedModel`, a copy of the model),
            an object that has one as ``module`` or ``ema``, or one with ``load_state_dict``.
        dtype: As in `smart_load`.
        strict: Whether everything asked for must be in the file. ``False`` restores what is there, with a note of what
            isn't; a state that is there and doesn't fit is an error all the same.
        key: As in `smart_load`, for the model's weights.
        prefix: As in `smart_load`, for the model's weights.
        rename: As in `smart_load`, for the model's and the averaged weights.
        skip: As in `smart_load`, for the model's and the averaged weights.
        verify: As in `smart_load`: checks what the file records of its data first.

    Returns:
        Where training stands, and what was done.

    Raises:
        IncompatibleCheckpointError: A part is missing or does not fit. The message says all that stands against it.
        TorchLoadError: Everything else that `smart_load` raises.

    Example:
        >>> from torchload import smart_resume
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> report = smart_resume(model, "model.pth", optimizer)
        >>> report.epoch, report.values["args"]
        (37, {'lr': 0.001})
        >>> len(optimizer.state) == len(list(model.parameters()))
        True
    """
    loading.check_arguments(model, dtype, skip, (), False)
    with collector_paused(), ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path))
        resumption = _Resumption(checkpoint, training_tree(checkpoint, path, stack), strict, Placement(device), dtype)
        matcher = glob_matcher(skip)
        resumption.plan_model(model, matcher, key, prefix, rename)
        resumption.plan_average(ema, matcher, rename)
        resumption.plan_rest(_as_list(optimizer), _as_list(scheduler), scaler)
        resumption.check()
        if verify:
            for load in resumption.loads:
                verify_extents(extents_of(load.plan))
        resumption.carry_out()
        report = resumption.report()
    _log.info("%s", report)
    return report


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


@dataclass(slots=True, eq=False)
class _Load:
    """Weights that are about to be loaded into a module."""

    target: Target
    selection: Selection
    plan: LoadPlan
    options: Options
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Resumption:
    """One call of `smart_resume`: first everything is planned, then checked, then carried out."""

    checkpoint: Checkpoint
    tree: Any
    strict: bool
    placement: Placement
    dtype: DtypeSpec
    loads: list[_Load] = field(default_factory=list)
    optimizers: list[OptimizerPlan] = field(default_factory=list)
    steps: list[tuple[str, Any, Any]] = field(default_factory=list)  # what it is, the object, what it is to load
    restored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    # --- planning ---

    def plan_model(
        self, model: nn.Module, skip: Any, key: str | None, prefix: str | None, rename: Rename | None
    ) -> None:
        """Choose the raw weights; averaged ones where there are no others."""
        root = self.checkpoint.root
        raw = weights_of(root) if key is None else root
        choice = {"key": key, "prefix": prefix, "rename": rename}
        try:
            load = self._plan(model, raw, skip, choice)
        except IncompatibleCheckpointError as error:
            # Raw weights that are there and don't fit are an error; only where there are none does the average do.
            if not isinstance(root, Mapping) or len(raw) == len(root) or not _is_all(error.missing_keys, model):
                raise
            load = self._plan(model, average_of(root), skip, choice)
            self.notes.append("the file holds no raw weights; training goes on from the averaged ones")
        if key is None and prefix is None and load.selection.averaged and load.selection.rivals:
            key, prefix = _split(load.selection.rivals[0], load.selection.key)
            load = self._plan(model, raw, skip, {"key": key, "prefix": prefix, "rename": rename})
        self.loads.append(load)

    def plan_average(self, ema: Any, skip: Any, rename: Rename | None) -> None:
        """Choose the averaged weights."""
        if ema is None:
            return
        module = ema if isinstance(ema, nn.Module) else _module_of(ema)
        averages = average_of(self.checkpoint.root)
        if module is None:
            self._plan_foreign_average(ema, averages)
            return
        choice = {"key": None, "prefix": None, "rename": rename}
        try:
            load = self._plan(module, averages or self.checkpoint.root, skip, choice)
        except IncompatibleCheckpointError as error:
            if averages:
                raise
            self._absent("averaged weights", "ema", error)
            return
        if not averages and not load.selection.averaged:
            self._absent("averaged weights", "ema")
            return
        self.loads.append(load)
        spare = [name for name in load.selection.alignment.spare if name in load.target.by_name]
        if spare:
            self.notes.append(f"the file does not say how many steps were averaged ({', '.join(spare)})")
        updates = self.checkpoint.root.get("updates")
        if hasattr(ema, "updates") and isinstance(updates, int):  # ultralytics
            self.steps.append(("updates", ema, updates))

    def _plan_foreign_average(self, ema: Any, averages: Mapping[Any, Any]) -> None:
        if not hasattr(ema, "load_state_dict"):
            raise TypeError("ema must be a module, or hold one, or have a load_state_dict method")
        if not averages:
            self._absent("averaged weights", "ema")
            return
        name, value = next(iter(averages.items()))
        self._plan_state("averaged weights", ema, Found(str(name), value))

    def _plan(self, model: nn.Module, root: Any, skip: Any, choice: Mapping[str, Any]) -> _Load:
        target = describe_model(model)
        # Fresh memory, so that a failure anywhere leaves everything as it was; parts of tensors stay where they are.
        atomic = not any(is_sharded(slot.tensor) for slot in target.slots)
        options = Options(self.placement, self.dtype, (), self.strict, atomic, self.checkpoint.path)
        selection = select_for(target, replace(self.checkpoint, root=root), skip, self.strict, **choice)
        plan = make_plan(target, selection, options)
        compare_ties(plan, self.checkpoint.path)
        return _Load(target, selection, plan, options)

    def plan_rest(self, optimizers: list[Any], schedulers: list[Any], scaler: Any) -> None:
        """Check the states of everything else."""
        state = find_training_state(self.tree)
        model = self.loads[0].target.model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for optimizer, found in self._pairs("optimizer", optimizers, state.optimizers):
            plan = plan_optimizer(optimizer, found.value, names)
            label = f"{type(optimizer).__name__} from {found.path!r}"
            self.problems += [f"{label}: {problem}" for problem in plan.problems]
            self.optimizers.append(plan)
            size = f"{plural(len(optimizer.param_groups), 'group')}, {plural(len(plan.parameters), 'parameter')}"
            self.restored.append(f"{label} ({size}{', matched by name' if plan.reordered else ''})")
        for scheduler, found in self._pairs("scheduler", schedulers, state.schedulers):
            self._plan_state("scheduler", scheduler, found)
        enabled = getattr(scaler, "is_enabled", lambda: True)
        if scaler is not None and enabled():
            if state.scaler is None or not state.scaler.value:
                self._absent("scaler state", "scaler")
            else:
                self._plan_state("scaler", scaler, state.scaler)

    def _pairs(self, what: str, ours: list[Any], theirs: list[Found]) -> Iterator[tuple[Any, Found]]:
        if not ours:
            if theirs:
                self.notes.append(f"the file's {what} state was left aside: pass {what}= to restore it")
        elif not theirs:
            self._absent(f"{what} state", what)
        elif len(ours) != len(theirs):
            self.problems.append(
                f"the file holds the states of {plural(len(theirs), what)}, {len(ours)} "
                f"{'was' if len(ours) == 1 else 'were'} given"
            )
        else:
            yield from zip(ours, theirs)

    def _plan_state(self, what: str, receiver: Any, found: Found) -> None:
        label = f"{type(receiver).__name__} from {found.path!r}"
        try:
            state = hooks.plain(found.value, lambda entry: map_entry(entry).clone())
        except ValueError as error:
            self.problems.append(f"{label}: {error}")
            return
        ours = receiver.state_dict() if hasattr(receiver, "state_dict") else {}
        if lacking := [name for name in ours if name not in state and name not in _ADDED_LATER]:
            self.problems.append(
                f"{label}: the state lacks {', '.join(map(repr, lacking[:6]))}; it is of another kind of {what}"
            )
        self.steps.append((what, receiver, {name: _as_ours(value, ours.get(name)) for name, value in state.items()}))
        self.restored.append(label)

    def _absent(self, what: str, argument: str, cause: Exception | None = None) -> None:
        if self.strict:
            self.problems.append(
                f"the file holds no {what}{f' that fit ({cause})' if cause else ''}; leave {argument}= out"
            )
        else:
            self.notes.append(f"the file holds no {what}; {argument} stays as it is")

    def check(self) -> None:
        """Raise everything that stands against the plan."""
        if self.problems:
            raise IncompatibleCheckpointError(
                f"{self.checkpoint.path} can't be resumed from. Nothing was restored; everything is as it was.\n  "
                + "\n  ".join(self.problems),
                path=self.checkpoint.path,
                problems=self.problems,
            )

    # --- carrying out ---

    def carry_out(self) -> None:
        """Restore everything; take it all back if anything fails."""
        states = read_states(self.optimizers, dict(self._places()))
        undo = hooks.Undo()
        try:
            for load in self.loads:
                started = time.perf_counter()
                undo.steps.append(_restorer(load))
                load.nbytes = carry_out(load.plan, load.target, load.selection, None, mmap=False)
                load.seconds = time.perf_counter() - started
            for plan, state in zip(self.optimizers, states):
                undo.steps.append(partial(_replace_attributes, plan.optimizer, dict(plan.optimizer.__dict__)))
                _receive(plan.optimizer, state)
            for what, receiver, state in self.steps:
                undo.steps.append(_taking_back(what, receiver))
                if what == "updates":
                    receiver.updates = state
                else:
                    _receive(receiver, state)
            for load in self.loads:
                hooks.run_post_hooks(load.target, load.selection.missing, load.selection.unexpected)
        except BaseException as error:
            undo.roll_back()
            if isinstance(error, _RefusedError):
                raise IncompatibleCheckpointError(
                    f"{self.checkpoint.path} can't be resumed from: {error}. Nothing was restored; everything is as it "
                    "was.",
                    path=self.checkpoint.path,
                    problems=[str(error)],
                ) from error.__cause__
            raise

    def _places(self) -> Iterator[tuple[int, Place]]:
        """Identity of each parameter → where it will be, and as what."""
        for load in self.loads:
            places = [(item.slot, (item.device, item.dtype)) for item in load.plan.assignments]
            places += [(item.slot, (item.device, item.dtype)) for item in load.plan.conversions]
            for slot, place in places:
                yield from ((id(tensor), place) for tensor in (slot.tensor, *slot.twins))

    def report(self) -> ResumeReport:
        """The account."""
        state = find_training_state(self.tree)
        reports = []
        for load in self.loads:
            notes = tuple(loading.notes_of(self.checkpoint, load.selection, load.plan, False))
            reports.append(
                loading.report_of(
                    load.target, self.checkpoint, load.selection, load.plan, load.nbytes, notes, load.seconds
                )
            )
        parts = [*state.optimizers, *state.schedulers, *([state.scaler] if state.scaler else [])]
        known = {
            path.split(".")[0] for path in [*(load.selection.key for load in self.loads), *(p.path for p in parts)]
        }
        return ResumeReport(
            load=reports[0],
            ema=reports[1] if len(reports) > 1 else None,
            epoch=state.epoch,
            step=state.step,
            values=plain_values(self.tree, known),
            restored=tuple(self.restored),
            notes=tuple(self.notes),
        )


# Entries of a scheduler's or scaler's state that younger versions of torch added.
_ADDED_LATER = frozenset(
    {"_is_initial", "_get_lr_called_within_step", "_step_count", "_last_lr", "verbose", "mode_worse"}
)


class _RefusedError(Exception):
    """An object did not accept its state."""


def _receive(receiver: Any, state: Any) -> None:
    try:
        before = [group.keys() & receiver.defaults.keys() for group in getattr(receiver, "param_groups", ())]
        receiver.load_state_dict(state)
        for group, names in zip(getattr(receiver, "param_groups", ()), before):
            if lacking := names - group.keys():
                raise ValueError(f"its groups would lack {', '.join(sorted(lacking))}")
    except Exception as error:
        raise _RefusedError(f"{type(receiver).__name__} did not accept its state: {error}") from error


def _replace_attributes(holder: Any, attributes: Mapping[str, Any]) -> None:
    holder.__dict__.clear()
    holder.__dict__.update(attributes)


def _taking_back(what: str, receiver: Any) -> Callable[[], object]:
    """What undoes a change to an object, prepared before it is made."""
    if what == "updates":
        return partial(setattr, receiver, "updates", receiver.updates)
    return partial(receiver.load_state_dict, copy.deepcopy(receiver.state_dict()))


def _restorer(load: _Load) -> Callable[[], None]:
    """How to show the memory again that the module has now, and to take back what modules do that load themselves."""
    shown = [(slot, slot.tensor.detach()) for slot in load.target.slots if _can_be_shown_again(slot)]
    own = [hooks.restorer(hooked.module, slots) for hooked, slots in load.plan.own_loaders]
    extra = [(module, copy.deepcopy(module.get_extra_state())) for module in load.target.extra_state.values()]

    def restore() -> None:
        with torch.no_grad():
            for slot, data in shown:
                if slot.tensor.data_ptr() != data.data_ptr():
                    slot.install(data)
        for put_back in own:
            put_back()
        for module, state in extra:
            module.set_extra_state(state)

    return restore


def _can_be_shown_again(slot: Slot) -> bool:
    return slot.shape is not None and not slot.tensor.is_meta and not is_sharded(slot.tensor)


def _module_of(ema: Any) -> nn.Module | None:
    for attribute in ("module", "ema", "ema_model"):
        if isinstance(module := getattr(ema, attribute, None), nn.Module):
            return module
    return None


def _is_all(names: Sequence[str], model: nn.Module) -> bool:
    return set(names).issuperset(describe_model(model).by_name)


def _split(path: str, key: str) -> tuple[str | None, str | None]:
    """A candidate's path as container and prefix, given the container of its rival."""
    if not key:
        return None, path
    if path.startswith(f"{key}."):
        return key, path[len(key) + 1 :]
    return path, None


def _as_ours(value: Any, ours: Any) -> Any:
    """A plain value in the type of collection that the receiver has there."""
    for kind in (Counter, OrderedDict):
        if type(ours) is kind and isinstance(value, Mapping):
            return kind(value)
    return value
