"""One call of `smart_resume`: everything is planned, then checked, then carried out or taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from torchload.core.checkpoint import Checkpoint
from torchload.core.ranks import Ranks
from torchload.core.text import listing, plural
from torchload.core.undo import Undo
from torchload.errors import IncompatibleCheckpointError
from torchload.formats.sets.deepspeed import MASTER_KEY
from torchload.match import Selection
from torchload.match.globs import Globs
from torchload.match.rename import Rename
from torchload.match.tables import SWAPPED, Standing
from torchload.model.placement import Placement
from torchload.model.shards import is_sharded
from torchload.model.target import Target, describe_model
from torchload.model.unwrapping import module_within
from torchload.model.walk import modules_of, parameter_names
from torchload.plan.acceptance import after_post_hooks
from torchload.plan.account import report_of
from torchload.plan.custom_loaders import RefusedError
from torchload.plan.dtypes import DtypeSpec
from torchload.plan.execute import Moved, carry_out
from torchload.plan.explain import incompatible
from torchload.plan.options import Options
from torchload.plan.plain import plain
from torchload.plan.plan import LoadPlan
from torchload.plan.planner import make_plan
from torchload.plan.steps import select_for
from torchload.training.optimizer_states import Place, extents_in, read_states
from torchload.training.optimizers import OptimizerPlan, plan_optimizer
from torchload.training.random_states import RandomState, plan_random_states
from torchload.training.report import ResumeReport
from torchload.training.restoring import like, receive, replace_attributes, restorer, taking_back
from torchload.training.run_folder import lies_beside
from torchload.training.several import NotPairedError, as_list, pairs_of
from torchload.training.state import Found, average_of, find_training_state, plain_values, weights_of
from torchload.transfer import map_entry
from torchload.transfer.checks import verify_extents

__all__ = ["Resumption"]


@dataclass(slots=True, eq=False)
class _Load:
    """Weights that are about to be loaded into a module."""

    target: Target
    selection: Selection
    plan: LoadPlan
    moved: Moved = field(default_factory=partial(Moved, nbytes=0, read_bytes=0))
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Resumption:
    """One call of `smart_resume`: first everything is planned, then checked, then carried out."""

    checkpoint: Checkpoint
    path: Any
    tree: Any
    strict: bool
    placement: Placement
    dtype: DtypeSpec
    left_changed: list[str]  # gets the names of what may not be as it was, where taking back failed
    loads: list[_Load] = field(default_factory=list)
    optimizers: list[OptimizerPlan] = field(default_factory=list)
    steps: list[tuple[str, Any, Any]] = field(default_factory=list)  # what it is, the object, what it is to load
    random_states: list[RandomState] = field(default_factory=list)
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
        if key is None and prefix is None and isinstance(raw, Mapping) and MASTER_KEY in raw:
            key = MASTER_KEY  # DeepSpeed goes on from the float32 originals of half-precision weights
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
            load = self._plan(model, raw, skip, {**choice, "key": load.selection.rivals[0]})
        if any(swap.is_in(root) and load.selection.segments[:1] == (swap.raw,) for swap in SWAPPED):
            load.selection = replace(load.selection, standing=Standing.PLAIN)  # the average's name, but not the average
        self.loads.append(load)

    def plan_average(self, ema: Any, skip: Any, rename: Rename | None) -> None:
        """Choose the averaged weights."""
        if ema is None:
            return
        module = ema if isinstance(ema, nn.Module) else module_within(ema)
        averages = average_of(self.checkpoint.root)
        if module is None and not hasattr(ema, "load_state_dict"):
            raise TypeError("ema must be a module, or hold one, or have a load_state_dict method")
        if module is None and not averages:
            self._absent("averaged weights", "ema")
            return
        if module is None:
            name, value = next(iter(averages.items()))
            self._plan_state("averaged weights", ema, Found(str(name), value))
            return
        choice = {"key": None, "prefix": None, "rename": rename}
        try:
            load = self._plan(module, averages or self.checkpoint.root, skip, choice, keeps_promises=False)
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

    def _plan(
        self, model: nn.Module, root: Any, skip: Globs, choice: Mapping[str, Any], *, keeps_promises: bool = True
    ) -> _Load:
        """Plan one set of weights; patterns that match nothing are told of the model's alone."""
        target = describe_model(model)
        # Fresh memory, so that a failure anywhere leaves everything as it was; parts of tensors stay where they are.
        atomic = not any(is_sharded(slot.tensor) for slot in target.slots)
        options = Options(
            self.placement,
            self.dtype,
            (),
            self.strict,
            atomic,
            skip=skip if keeps_promises else Globs(),
            rename=choice["rename"] if keeps_promises else None,
        )
        selection = select_for(target, replace(self.checkpoint, root=root), skip, self.strict, **choice)
        plan = make_plan(target, self.checkpoint, selection, options)
        return _Load(target, selection, plan)

    def plan_rest(self, optimizers: Any, schedulers: Any, scaler: Any) -> None:
        """Check the states of everything else."""
        state = find_training_state(self.tree)
        target = self.loads[0].target
        names = parameter_names(target.model)
        plan_of = partial(plan_optimizer, names=names, file_order=self._file_order())
        paired = self._pairs(
            "optimizer",
            optimizers,
            state.optimizers,
            lambda optimizer, found: not plan_of(optimizer, found.value).problems,
            lambda optimizer, name: _belongs_to(optimizer, name, names),
        )
        for optimizer, found in paired:
            plan = plan_of(optimizer, found.value)
            label = f"{type(optimizer).__name__} from {found.path!r}"
            self.problems += [f"{label}: {problem}" for problem in plan.problems]
            self.optimizers.append(plan)
            size = f"{plural(len(optimizer.param_groups), 'group')}, {plural(len(plan.parameters), 'parameter')}"
            self.restored.append(f"{label} ({size}{', matched by name' if plan.reordered else ''})")
        owners = {id(optimizer): found.name for optimizer, found in paired}
        for scheduler, found in self._pairs(
            "scheduler",
            schedulers,
            state.schedulers,
            lambda scheduler, found: not _lacking(_state_of(scheduler), found.value),
            lambda scheduler, name: owners.get(id(getattr(scheduler, "optimizer", None))) == name,
        ):
            self._plan_state("scheduler", scheduler, found)
        enabled = getattr(scaler, "is_enabled", lambda: True)
        if scaler is not None and enabled():
            if state.scaler is None or not state.scaler.value:
                self._absent("scaler state", "scaler")
            else:
                self._plan_state("scaler", scaler, state.scaler)

    def plan_random_states(self) -> None:
        """Find where the random number generators stood."""
        ranks = Ranks(together=True)
        self.random_states, notes = plan_random_states(self.tree, ranks.rank, ranks.count)
        self.notes += notes
        if self.random_states:
            paths = dict.fromkeys(state.path.rpartition(".")[0] or state.path for state in self.random_states)
            kinds = ", ".join(state.kind for state in self.random_states)
            self.restored.append(f"random numbers of {kinds} from {', '.join(map(repr, paths))}")

    def _file_order(self) -> dict[int, int]:
        """Identity of each parameter → its place in the file, where its weights are in the order of a model."""
        load, checkpoint = self.loads[0], self.checkpoint
        if len({source.name for source in checkpoint.sources}) > 1 or "folder" in checkpoint.format:
            return {}  # sharded and distributed files have an order of their own
        leaves = load.selection.leaves
        if _are_sorted(leaves):
            return {}
        places = {name: place for place, name in enumerate(leaves)}
        order: dict[int, int] = {}
        for slot in load.target.slots:
            stored = [places[load.selection.pairs[name]] for name in slot.names if name in load.selection.pairs]
            if stored:
                order.update((id(tensor), min(stored)) for tensor in (slot.tensor, *slot.twins))
        return {} if _contradicts_torch(order, load.target.model) else order

    def _pairs(
        self,
        what: str,
        given: Any,
        found: list[Found],
        fits: Callable[[Any, Found], bool],
        names: Callable[[Any, str], bool],
    ) -> list[tuple[Any, Found]]:
        if not as_list(given):
            if found:
                self.notes.append(f"the file's {what} state was not restored: pass {what}= for that")
        elif not found:
            self._absent(f"{what} state", what)
        else:
            try:
                pairs = pairs_of(what, given, found, fits, names)
            except NotPairedError as error:
                self.problems.append(str(error))
                return []
            if left := [state.path for state in found if not any(state is taken for _, taken in pairs)]:
                self.notes.append(f"not restored, since no {what} of that name was given: {listing(left)}")
            return pairs
        return []

    def _plan_state(self, what: str, receiver: Any, found: Found) -> None:
        label = f"{type(receiver).__name__} from {found.path!r}"
        try:
            state = plain(found.value, lambda entry: map_entry(entry).clone())
        except ValueError as error:
            self.problems.append(f"{label}: {error}")
            return
        live = _state_of(receiver)
        if lacking := _lacking(live, state):
            self.problems.append(
                f"{label}: the state lacks {', '.join(map(repr, lacking[:6]))}; it is of another kind of {what}"
            )
        self.steps.append((what, receiver, like(state, live)))
        self.restored.append(label)

    def _absent(self, what: str, argument: str, cause: Exception | None = None) -> None:
        if not self.strict:
            self.notes.append(f"the file holds no {what}; {argument} stays as it is")
            return
        why = [str(cause)] if cause else [note for note in self.checkpoint.notes if argument in note]
        reason = f" that fit{'s' * what.endswith('state')} ({'; '.join(why)})" if why else ""
        advice = lies_beside(self.path, argument) or f"leave {argument}= out"
        self.problems.append(f"the file holds no {what}{reason}; {advice}")

    def check(self) -> None:
        """Raise everything that stands against the plan."""
        if self.problems:
            raise IncompatibleCheckpointError(
                "\n  ".join(("The checkpoint can't be resumed from.", *self.problems)), problems=self.problems
            )

    def warnings(self) -> Iterator[str]:
        """What a careful person would want to know before anything is restored."""
        for load in self.loads:
            yield from load.plan.warnings

    def verify(self) -> None:
        """Compare the data of weights and optimizer states with the checksums that the file records."""
        extents = [extent for load in self.loads for extent in load.plan.extents]
        verify_extents([*extents, *extents_in(self.optimizers)])

    # --- carrying out ---

    def carry_out(self) -> None:
        """Restore everything; take it all back if anything fails."""
        states = read_states(self.optimizers, dict(self._places()))
        undo = Undo()
        try:
            for load in self.loads:
                started = time.perf_counter()
                undo.steps.append(restorer(load.target, load.plan))
                load.moved = carry_out(load.plan, load.target, load.selection)
                load.seconds = time.perf_counter() - started
            for plan, state in zip(self.optimizers, states):
                undo.steps.append(partial(replace_attributes, plan.optimizer, dict(plan.optimizer.__dict__)))
                receive(plan.optimizer, state)
            for what, receiver, state in self.steps:
                undo.steps.append(taking_back(what, receiver))
                if what == "updates":
                    receiver.updates = state
                else:
                    receive(receiver, state)
            for load in filter(lambda load: load.target.post_hooks, self.loads):
                load.selection = after_post_hooks(load.target, load.selection)
                if self.strict and (load.selection.missing or load.selection.unexpected):
                    raise incompatible(load.target, load.selection, [])
            for random_state in self.random_states:  # last: nothing after it draws numbers
                undo.steps.append(partial(random_state.set, random_state.get()))
                random_state.set(random_state.state)
        except BaseException as error:
            if failures := undo.roll_back():
                self.left_changed += [name for load in self.loads for name in load.target.names]
                raise failures[0] from error
            if isinstance(error, RefusedError):
                raise IncompatibleCheckpointError(
                    f"The checkpoint can't be resumed from: {error}.", problems=[str(error)]
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
        reports = [
            report_of(load.target, self.checkpoint, load.selection, load.plan, load.moved, load.seconds)
            for load in self.loads
        ]
        parts: list[Any] = [*state.optimizers, *state.schedulers, *filter(None, [state.scaler]), *self.random_states]
        paths = [*(load.selection.key for load in self.loads), *(part.path for part in parts)]
        return ResumeReport(
            load=reports[0],
            ema=reports[1] if len(reports) > 1 else None,
            epoch=state.epoch,
            step=state.step,
            values=plain_values(self.tree, {path.split(".")[0] for path in paths}),
            restored=tuple(self.restored),
            notes=tuple(self.notes),
        )


# Entries of a scheduler's or scaler's state that younger versions of torch added.
_ADDED_LATER = frozenset(
    {"_is_initial", "_get_lr_called_within_step", "_step_count", "_last_lr", "verbose", "mode_worse"}
)


def _are_sorted(leaves: Mapping[str, Any]) -> bool:
    """Whether somebody sorted the names, as safetensors does for each dtype: then it isn't the order of a model."""
    by_dtype: dict[Any, list[str]] = {}
    for name, leaf in leaves.items():
        by_dtype.setdefault(getattr(leaf, "dtype", None), []).append(name)
    return all(names == sorted(names) for names in by_dtype.values())


def _contradicts_torch(order: Mapping[int, int], model: nn.Module) -> bool:
    """Whether layers of torch's own mostly have their tensors in an order that torch never gives them.

    Then names were sorted by parts, as in shards of safetensors that were read as one: ``bias`` stands before
    ``weight`` within a part, whereas torch's layers have ``weight`` first, in every version and model.
    """
    agree: list[bool] = []
    for layer in modules_of(model):
        places = [order[id(tensor)] for tensor in layer._parameters.values() if id(tensor) in order]
        if type(layer).__module__.startswith("torch.nn.") and len(places) > 1:
            agree.append(places == sorted(places))
    return agree.count(False) > agree.count(True)


def _is_all(names: Sequence[str], model: nn.Module) -> bool:
    return set(names).issuperset(describe_model(model).by_name)


def _state_of(receiver: Any) -> Mapping[str, Any]:
    return receiver.state_dict() if hasattr(receiver, "state_dict") else {}


def _lacking(live: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    return [name for name in live if name not in state and name not in _ADDED_LATER]


def _belongs_to(optimizer: Any, part: str, names: Mapping[int, str]) -> bool:
    """Whether all parameters of an optimizer are in a part of the model that has this name."""
    parameters = [names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"]]
    return all(f".{part}." in f".{name}" for name in parameters)
