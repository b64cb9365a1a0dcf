"""Training goes on from DeepSpeed folders: each rank's part of the optimizer's state makes the whole again, by name.

Of the real files at hand nobody kept how training went on. So the folders here are laid out as DeepSpeed lays them out,
from an optimizer that never was cut up: the losses must be those of training straight on. The real files are compared
with each other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.law import assert_equal_bits, same_bits, snapshot
from tests.unit.test_deepspeed import cut2, cut3, model_states, subgroups_of, zero2, zero3
from torchload import errors, smart_resume
from torchload.formats import open_checkpoint
from torchload.transfer.mapped import read_entries

CORPUS = Path(__file__).parents[3] / "shared" / "corpus" / "files" / "deepspeed"

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, 0.01, amsgrad=True),
    "Adam": lambda groups: torch.optim.Adam(groups, 0.01),
    "SGD": lambda groups: torch.optim.SGD(groups, 0.1),
    "SGD momentum": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, 0.1),
    "NAdam": lambda groups: torch.optim.NAdam(groups, 0.01),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pos", torch.ones(8))
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(5, 3)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(numbers))) * self.scale


DECAYED = ("embed.weight", "head.weight")
OTHERS = ("norm.weight", "norm.bias", "scale", "head.bias")


class Run:
    """A training run with two groups of parameters, on data that depends on nothing but the step."""

    def __init__(self, kind: str = "AdamW", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        named = dict(self.model.named_parameters())
        self.groups = [DECAYED, OTHERS]
        self.optimizer = OPTIMIZERS[kind](
            [
                {"params": [named[name] for name in DECAYED], "weight_decay": 0.1},
                {"params": [named[name] for name in OTHERS], "lr": 0.02},
            ]
        )

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            numbers = torch.randint(7, (6,), generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            loss = self.model(numbers).square().sum()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def everything(self) -> Any:
        return copy.deepcopy((snapshot(self.model), self.optimizer.state_dict()))


def assert_untouched(run: Run, before: Any) -> None:
    assert_equal_bits(snapshot(run.model), before[0])
    now = run.optimizer.state_dict()
    assert now["param_groups"] == before[1]["param_groups"]
    assert now["state"].keys() == before[1]["state"].keys()
    for number, values in now["state"].items():
        assert all(same_bits(value, before[1]["state"][number][name]) for name, value in values.items())


def by_name(run: Run) -> dict[str, dict[str, Any]]:
    """Name of a parameter → its state."""
    return {name: run.optimizer.state[value] for name, value in run.model.named_parameters()}


def base_states(run: Run, cut: Callable[[dict[str, torch.Tensor]], Any], numbers: list[list[int]], ranks: int) -> Any:
    """What the optimizer of each rank saves, which has flat tensors for parameters.

    Args:
        run: Whose optimizer was not cut up.
        cut: Tensors by name → for each rank the flat tensors.
        numbers: For each group the numbers of its flat tensors.
        ranks: How many there are.
    """
    states = by_name(run)
    flat: list[dict[int, dict[str, Any]]] = [{} for _ in range(ranks)]
    for key in states["scale"]:
        for number, names in zip(numbers, run.groups):
            values = {name: state[key] for name, state in states.items() if name in names}
            common = not isinstance(values[names[0]], torch.Tensor) or values[names[0]].shape != (
                run.model.get_parameter(names[0]).shape
            )
            if common:
                for rank in flat:
                    for index in number:
                        rank.setdefault(index, {})[key] = values[names[0]]
        if not common:
            for rank, parts in zip(flat, cut({name: state[key] for name, state in states.items()})):
                for index, part in enumerate(parts):
                    rank.setdefault(index, {})[key] = part
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": list(number)}
        for group, number in zip(run.optimizer.param_groups, numbers)
    ]
    return [{"state": state, "param_groups": groups} for state in flat]


def save2(path: Path, run: Run, ranks: int, **layout: Any) -> Path:
    """As ZeRO 1 and 2 do."""
    path.mkdir(exist_ok=True)
    padding = layout.get("padding", 0)
    optimizer = base_states(run, lambda values: cut2(values, run.groups, ranks, padding)[0], [[0], [1]], ranks)
    layout["optimizer"] = layout.pop("change", lambda states: states)(optimizer)
    return zero2(path, dict(run.model.state_dict()), run.groups, ranks, **layout)


def save3(path: Path, run: Run, ranks: int, **layout: Any) -> Path:
    """As ZeRO 3 does: the second group in two subgroups."""
    path.mkdir(exist_ok=True)
    names = [DECAYED, *subgroups_of(OTHERS, 2)]
    optimizer = base_states(run, lambda values: cut3(values, names, ranks), [[0], [1, 2]], ranks)
    optimizer = layout.pop("change", lambda states: states)(optimizer)
    zero3(path, dict(run.model.state_dict()), (*DECAYED, *OTHERS), ranks, subgroups=3, optimizer=optimizer, **layout)
    return path


SAVED = {"zero2": save2, "zero3": save3}


def test_the_subgroups_are_what_zero3_writes() -> None:
    assert subgroups_of((*DECAYED, *OTHERS), 3) == [DECAYED, *subgroups_of(OTHERS, 2)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("save", SAVED)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_training_goes_on_bit_for_bit(tmp_path: Path, kind: str, save: str, ranks: int) -> None:
    run = Run(kind)
    run.train(0, 4)
    SAVED[save](tmp_path, run, ranks)
    straight = run.train(4, 7)
    again = Run(kind, seed=1)
    again.train(0, 2)
    report = smart_resume(again.model, tmp_path, again.optimizer)
    assert again.train(4, 7) == straight
    assert "from 'optimizer' (2 groups, 6 parameters" in str(report)


@pytest.mark.parametrize("layout", [{"slices": False}, {"lean": False}, {"padding": 3, "lean": False}])
def test_the_ways_of_older_and_newer_versions(tmp_path: Path, layout: Any) -> None:
    run = Run()
    run.train(0, 4)
    save2(tmp_path, run, 3, **layout)
    again = Run(seed=1)
    smart_resume(again.model, tmp_path, again.optimizer)
    assert again.train(4, 7) == run.train(4, 7)


@given(ranks=st.integers(1, 9), save=st.sampled_from(sorted(SAVED)))
def test_however_many_ranks_the_state_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, save: str
) -> None:
    run = Run()
    run.train(0, 1)
    path = SAVED[save](tmp_path_factory.mktemp("zero"), run, ranks)
    again = Run(seed=1)
    smart_resume(again.model, path, again.optimizer)
    for name, state in by_name(run).items():
        assert same_bits(list(by_name(again)[name].values()), list(state.values()))


def test_it_goes_on_from_the_float32_originals(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 4)
    save2(tmp_path, run, 2)  # beside a module in bfloat16
    again = Run(seed=1)
    report = smart_resume(again.model, tmp_path, again.optimizer)
    assert report.load.key == "master_fp32"
    assert_equal_bits(snapshot(again.model), snapshot(run.model))


def test_a_parameter_order_of_its_own_and_frozen_parameters(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 4)
    save2(tmp_path, run, 2)
    again = Run(seed=1)
    for group in again.optimizer.param_groups:
        group["params"].reverse()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)  # DeepSpeed leaves such out
    again.model.register_parameter("frozen", frozen)
    again.optimizer.param_groups[0]["params"].append(frozen)
    report = smart_resume(again.model, tmp_path, again.optimizer, skip=["frozen"])
    assert again.train(4, 7) == run.train(4, 7)
    assert "matched by name" in str(report)
    assert frozen not in again.optimizer.state


def test_one_that_has_not_stepped_yet(tmp_path: Path) -> None:
    run = Run()
    save3(tmp_path, run, 2)
    again = Run(seed=1)
    again.train(0, 2)
    smart_resume(again.model, tmp_path, again.optimizer)
    assert not again.optimizer.state
    assert again.train(0, 3) == run.train(0, 3)


def test_steps_counted_by_group_as_fused_adam_did(tmp_path: Path) -> None:
    def count_by_group(states: Any) -> Any:
        for state in states:
            for number, group in enumerate(state["param_groups"]):
                group["step"] = int(state["state"][number].pop("step"))
                group["bias_correction"] = True
        return states

    run = Run("Adam")
    run.train(0, 4)
    save2(tmp_path, run, 2, change=count_by_group)
    again = Run("Adam", seed=1)
    smart_resume(again.model, tmp_path, again.optimizer)
    assert again.train(4, 7) == run.train(4, 7)


# --- what is not there, or of no known form ---


def lacks_a_group(states: Any) -> Any:
    del states[0]["state"][1]
    return states


def other_keys(states: Any) -> Any:
    del states[1]["state"][0]["exp_avg"]
    return states


def one_element_less(states: Any) -> Any:
    states[1]["state"][0]["exp_avg"] = states[1]["state"][0]["exp_avg"][:-1].clone()
    return states


def of_another_shape(states: Any) -> Any:
    """As optimizers with communication of their own keep it."""
    for state in states:
        for values in state["state"].values():
            values["worker_error"] = torch.zeros(64)
    return states


def partly_a_tensor(states: Any) -> Any:
    for state in states:
        state["state"][0]["exp_avg"] = 1.0
    return states


def elastic(states: Any) -> Any:
    return [list(state["state"].values()) for state in states]


def no_groups(states: Any) -> Any:
    return [{"state": state["state"]} for state in states]


def no_state(states: Any) -> Any:
    return [{"param_groups": state["param_groups"]} for state in states]


def another_count_of_groups(states: Any) -> Any:
    for state in states:
        state["param_groups"].pop()
    return states


def another_order(states: Any) -> Any:
    for state in states:
        state["param_groups"][0]["params"] = [1]
        state["param_groups"][1]["params"] = [0]
    return states


def of_no_kind(states: Any) -> Any:
    return ["x" for _ in states]


def thousand_keys(states: Any) -> Any:
    for state in states:
        for values in state["state"].values():
            values.update({f"k{number}": values["exp_avg"] for number in range(1000)})
    return states


SPOILED: dict[Callable[[Any], Any], str] = {
    lacks_a_group: "its state lacks groups",
    other_keys: "states of different kinds",
    one_element_less: "'exp_avg' of its state has not one value for each element",
    of_another_shape: "'worker_error' of its state has not one value for each element",
    partly_a_tensor: "a tensor for some of its groups only",
    elastic: "elastic_checkpoint",
    no_groups: "no optimizer of torch.optim's kind",
    no_state: "it lacks 'state'",
    another_count_of_groups: "other parameter groups",
    another_order: "other parameter groups",
    of_no_kind: "nothing that an optimizer saves",
    thousand_keys: "states of different kinds",
}


@pytest.mark.parametrize("save", SAVED)
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_state_of_no_known_form_is_refused_with_the_reason(tmp_path: Path, save: str, spoil: Any) -> None:
    if save == "zero3" and spoil in (lacks_a_group, another_order, another_count_of_groups):
        pytest.skip("its subgroups are numbered differently")
    run = Run()
    run.train(0, 4)
    SAVED[save](tmp_path, run, 2, change=spoil)
    again = Run(seed=1)
    again.train(0, 2)
    before = again.everything()
    with pytest.raises(errors.IncompatibleCheckpointError, match=SPOILED[spoil]) as caught:
        smart_resume(again.model, tmp_path, again.optimizer)
    assert "no optimizer state" in str(caught.value)
    assert_untouched(again, before)
    report = smart_resume(again.model, tmp_path)  # the weights are there all the same
    assert SPOILED[spoil] in str(report)
    assert_equal_bits(snapshot(again.model), snapshot(run.model))


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    run, again = Run(), Run(seed=1)
    run.train(0, 4)
    again.train(0, 2)
    before = again.everything()
    for save, path in (("zero2", tmp_path / "2"), ("zero3", tmp_path / "3")):
        SAVED[save](path, run, 3)
        next(path.glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt")).unlink()
        with pytest.raises(errors.TorchLoadError, match="lacks .*zero_pp_rank_1_mp_rank_00_optim_states.pt"):
            smart_resume(again.model, path, again.optimizer)
        assert_untouched(again, before)


def test_a_rank_of_another_run_is_found(tmp_path: Path) -> None:
    run, again = Run(), Run(seed=1)
    run.train(0, 4)
    save3(tmp_path / "two", run, 2)
    save3(tmp_path / "three", run, 3)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "two" / name).write_bytes((tmp_path / "three" / name).read_bytes())
    before = again.everything()
    with pytest.raises(errors.CorruptCheckpointError, match="can't be put together"):
        smart_resume(again.model, tmp_path / "two", again.optimizer)
    assert_untouched(again, before)


def test_another_kind_of_optimizer_is_refused(tmp_path: Path) -> None:
    run, again = Run("SGD momentum"), Run("AdamW", seed=1)
    run.train(0, 4)
    save2(tmp_path, run, 2)
    before = again.everything()
    with pytest.raises(errors.IncompatibleCheckpointError, match="another kind of optimizer than AdamW"):
        smart_resume(again.model, tmp_path, again.optimizer)
    assert_untouched(again, before)


def test_an_optimizer_that_was_not_cut_up_stays(tmp_path: Path) -> None:
    run, again = Run(), Run(seed=1)
    run.train(0, 4)
    torch.save(
        model_states(dict(run.model.state_dict()), run.groups, optimizer=run.optimizer.state_dict()),
        tmp_path / "mp_rank_00_model_states.pt",
    )
    smart_resume(again.model, tmp_path, again.optimizer)
    assert again.train(4, 7) == run.train(4, 7)


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real checkpoints is not here")
def test_real_files_agree() -> None:
    """Two real runs, the same but for their precision: their states are the same but for that."""

    def states(name: str) -> dict[tuple[str, str], torch.Tensor]:
        with open_checkpoint(CORPUS / name) as checkpoint:
            found = checkpoint.root["optimizer"]["state"]
            flat = {(name, key): entry for name, values in found.items() for key, entry in values.items()}
            return dict(zip(flat, read_entries(list(flat.values()))))

    full, half, third = map(states, ("z2_fp32_lm", "z2_bf16_lm", "z3_fp32_lm"))
    assert full.keys() == half.keys() == third.keys()
    for (name, key), values in full.items():
        assert third[name, key].shape == values.shape
        if key == "step":
            assert values == half[name, key] == third[name, key] == 2
        else:
            assert (half[name, key] - values).abs().max() < 0.05 * values.abs().max(), (name, key)
