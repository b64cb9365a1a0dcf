"""DeepSpeed folders. Their layout is written here as DeepSpeed lays it out, for any number of ranks and any shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchload import smart_load
from torchload.errors import (
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    TorchLoadError,
)
from torchload.formats import open_checkpoint
from torchload.transfer.mapped import read_entries

State = dict[str, torch.Tensor]


def module_state() -> State:
    return {
        "pos": torch.arange(8.0),
        "embed.weight": torch.randn(7, 5),
        "conv.weight": torch.randn(3, 2, 3),
        "norm.scale": torch.randn(()),
        "head.bias": torch.randn(1),
    }


PARAMETERS = ("embed.weight", "conv.weight", "norm.scale", "head.bias")


class Address:
    """Stands for DeepSpeed's ``fragment_address``."""

    def __init__(self, start: int, numel: int) -> None:
        self.start, self.numel = start, numel


def model_states(state: State, groups: list[tuple[str, ...]], **others: Any) -> dict[str, Any]:
    return {
        "module": state,
        "buffer_names": ["pos"],
        "param_shapes": [{name: state[name].shape for name in group} for group in groups],
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": {},
        "ds_version": "0.19.8",
        **others,
    }


def pieces(flat: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """A flat tensor in equal pieces, the last one padded."""
    each = -(-flat.numel() // ranks)
    padded = torch.cat([flat, torch.full((each * ranks - flat.numel(),), float("nan"))])
    return [piece.clone() for piece in padded.split(each)] if each else [flat] * ranks


def subgroups_of(names: Sequence[str], subgroups: int) -> list[Sequence[str]]:
    """In order: each subgroup holds parameters that follow one another."""
    size = -(-len(names) // subgroups)
    return [names[start : start + size] for start in range(0, len(names), size)]


def cut3(state: State, groups: Sequence[Sequence[str]], ranks: int) -> list[list[torch.Tensor]]:
    """ZeRO 3: each parameter in equal pieces; for each rank, those of a subgroup one after the other."""
    parts = {name: pieces(state[name].flatten(), ranks) for group in groups for name in group}
    return [[torch.cat([parts[name][rank] for name in group]) for group in groups] for rank in range(ranks)]


def zero3(
    path: Path,
    state: State,
    names: tuple[str, ...],
    ranks: int,
    subgroups: int = 1,
    optimizer: Sequence[Any] | None = None,
    **others: Any,
) -> Path:
    frozen = others.pop("frozen", ())
    groups = subgroups_of(names, subgroups)
    flat = cut3(state, groups, ranks)
    for rank in range(ranks):
        placeholders = {name: torch.empty(0) if name in (*names, *frozen) else value for name, value in state.items()}
        held = model_states(placeholders, [names], **others)
        held["param_shapes"] = [{name: state[name].shape for name in group} for group in groups]
        held["frozen_param_shapes"] = {name: state[name].shape for name in frozen}
        held["frozen_param_fragments"] = {name: pieces(state[name].flatten(), ranks)[rank] for name in frozen}
        torch.save(held, path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        saved = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": flat[rank]}
        if optimizer:
            saved["optimizer_state_dict"] = optimizer[rank]
        torch.save({"optimizer_state_dict": saved}, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


def cut2(
    state: State, groups: Sequence[Sequence[str]], ranks: int, padding: int = 0
) -> tuple[list[list[torch.Tensor]], list[list[dict[str, Address]]], list[list[int]]]:
    """ZeRO 1 and 2: every group is flattened, padded to a multiple of 2 · ranks, and cut into equal pieces.

    Returns:
        For each rank and group: the piece, the place of each parameter in it, and how much of it is padding.
    """
    partitions: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    mappings: list[list[dict[str, Address]]] = [[] for _ in range(ranks)]
    paddings: list[list[int]] = [[] for _ in range(ranks)]
    for group in groups:
        starts: dict[str, int] = {}
        flat = torch.zeros(0)
        for name in group:
            starts[name] = flat.numel()
            flat = torch.cat([flat, state[name].flatten(), torch.full((padding,), float("nan"))])
        used = flat.numel()
        total = -(-used // (2 * ranks)) * 2 * ranks
        each = total // ranks
        flat = torch.cat([flat, torch.full((total - used,), float("nan"))])
        for rank in range(ranks):
            begin, end = rank * each, (rank + 1) * each
            partitions[rank].append(flat[begin:end].clone())
            paddings[rank].append(end - min(end, max(used, begin)))
            mapping = {}
            for name in group:
                first, last = max(begin, starts[name]), min(end, starts[name] + state[name].numel())
                if first < last:
                    mapping[name] = Address(first - begin, last - first)
            mappings[rank].append(mapping)
    return partitions, mappings, paddings


def zero2(
    path: Path,
    state: State,
    groups: list[tuple[str, ...]],
    ranks: int,
    *,
    slices: bool = True,
    padding: int = 0,
    lean: bool = True,
    optimizer: Sequence[Any] | None = None,
) -> Path:
    torch.save(
        model_states({name: value.bfloat16() for name, value in state.items()}, groups),
        path / "mp_rank_00_model_states.pt",
    )
    partitions, mappings, paddings = cut2(state, groups, ranks, padding)
    for rank in range(ranks):
        held: dict[str, Any] = {"single_partition_of_fp32_groups": partitions[rank], "partition_count": [ranks]}
        if lean:
            held["group_paddings"] = paddings[rank]
            held["single_partition_of_fp32_groups"] = [
                part[: part.numel() - spare].clone() for part, spare in zip(partitions[rank], paddings[rank])
            ]
        if slices:
            held["param_slice_mappings"] = mappings[rank]
        if optimizer:
            held["base_optimizer_state"] = optimizer[rank]
        torch.save({"optimizer_state_dict": held}, path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


def tensors(path: Path, key: str = "module") -> State:
    with open_checkpoint(path) as checkpoint:
        entries = checkpoint.root[key]
        return dict(zip(entries, read_entries(list(entries.values()))))


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].shape == value.shape


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_zero3_is_put_together(tmp_path: Path, ranks: int) -> None:
    state = module_state()
    assert_same(tensors(zero3(tmp_path, state, PARAMETERS, ranks)), state)


def test_one_ranks_file_stands_for_all(tmp_path: Path) -> None:
    state = module_state()
    zero3(tmp_path, state, PARAMETERS, 2)
    assert_same(tensors(tmp_path / "zero_pp_rank_1_mp_rank_00_model_states.pt"), state)


def test_zero3_in_subgroups(tmp_path: Path) -> None:
    state = module_state()
    assert_same(tensors(zero3(tmp_path, state, PARAMETERS, 2, subgroups=3)), state)


def test_zero3_frozen_and_shared_parameters(tmp_path: Path) -> None:
    state = module_state()
    zero3(tmp_path, state, PARAMETERS[1:], 2, frozen=PARAMETERS[:1], shared_params={"tied.weight": "conv.weight"})
    assert_same(tensors(tmp_path), {**state, "tied.weight": state["conv.weight"]})


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    ranks=st.integers(1, 5),
)
def test_any_shapes_on_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], ranks: int
) -> None:
    state = {f"w{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("zero")
    assert_same(tensors(zero3(path, state, tuple(state), ranks)), state)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("slices", "padding", "lean"), [(True, 0, True), (True, 3, False), (False, 0, True), (False, 0, False)]
)
def test_float32_originals_of_zero2(tmp_path: Path, ranks: int, slices: bool, padding: int, lean: bool) -> None:
    state = module_state()
    zero2(tmp_path, state, [PARAMETERS[:2], PARAMETERS[2:]], ranks, slices=slices, padding=padding, lean=lean)
    expected = {**state, "pos": state["pos"].bfloat16()}
    assert_same(tensors(tmp_path, "master_fp32"), expected)
    assert_same(tensors(tmp_path), {name: value.bfloat16() for name, value in state.items()})
    with open_checkpoint(tmp_path) as checkpoint:
        assert "key='master_fp32'" in checkpoint.notes[-1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pos", torch.zeros(8))
        self.embed = nn.Embedding(7, 5)
        self.conv = nn.Conv1d(2, 3, 3, bias=False)
        self.norm = nn.Module()
        self.norm.scale = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(1, 1)
        del self.head.weight


def test_the_module_is_what_loads_and_the_originals_on_request(tmp_path: Path) -> None:
    state = module_state()
    step = tmp_path / "global_step7"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step7\n")
    zero2(step, state, [PARAMETERS], 2, slices=True)
    model = Net()
    report = smart_load(model, tmp_path, "cpu")
    assert report.key == "module"
    assert torch.equal(model.conv.weight, state["conv.weight"].bfloat16().float())
    smart_load(model, tmp_path, "cpu", key="master_fp32")
    assert torch.equal(model.conv.weight, state["conv.weight"])


def test_damaged_optimizer_files_leave_the_module(tmp_path: Path) -> None:
    zero2(tmp_path, module_state(), [PARAMETERS], 3, slices=True)
    (tmp_path / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        assert "master_fp32" not in checkpoint.root
        assert "lacks bf16_zero_pp_rank_1" in checkpoint.notes[-1]
    smart_load(Net(), tmp_path, "cpu")


def test_one_step_needs_no_pointer_and_several_do(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"global_step{step}").mkdir()
        zero3(tmp_path / f"global_step{step}", module_state(), PARAMETERS, 1)
        (tmp_path / "zero_to_fp32.py").touch()
        if step == 1:
            (tmp_path / "latest").write_text("global_step1")
            assert tensors(tmp_path).keys() == module_state().keys()
    (tmp_path / "latest").write_text("global_step3")
    with pytest.raises(CheckpointNotFoundError, match="names 'global_step3', which is not there"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CorruptCheckpointError, match="not a plain file name"):
        open_checkpoint(tmp_path)


def test_several_steps_without_a_pointer_are_ambiguous(tmp_path: Path) -> None:
    from torchload.formats.sets.deepspeed import open_folder

    for step in (1, 2):
        (tmp_path / f"global_step{step}").mkdir()
    with pytest.raises(AmbiguousCheckpointError) as caught:
        open_folder(str(tmp_path), open_checkpoint)
    assert caught.value.candidates == (str(tmp_path / "global_step1"), str(tmp_path / "global_step2"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mp_rank_01_model_states.pt", "tensor or pipeline parallelism, on 2 model-parallel ranks"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "on 2 model-parallel ranks"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "expert parallelism"),
        ("layer_03-model_00-model_states.pt", "pipeline parallelism, each layer"),
    ],
)
def test_model_parallel_runs_are_refused_with_advice(tmp_path: Path, name: str, expected: str) -> None:
    zero3(tmp_path, module_state(), PARAMETERS, 1)
    (tmp_path / name).touch()
    with pytest.raises(CheckpointFormatError, match=expected) as caught:
        open_checkpoint(tmp_path)
    assert "gather the model" in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "lacks zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero_pp_rank_2_mp_rank_00_optim_states.pt", "saved by 3 ranks, and the optimizer's files of 2 are there"),
        ("zero_pp_rank_*_optim_states.pt", "lacks its .*_optim_states.pt files"),
        ("zero_pp_rank_1_mp_rank_00_model_states.pt", "lacks zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, gone: str, expected: str) -> None:
    zero3(tmp_path, module_state(), PARAMETERS, 3)
    for file in tmp_path.glob(gone):
        file.unlink()
    with pytest.raises(CheckpointNotFoundError, match=expected):
        open_checkpoint(tmp_path)


def rewritten(change: Callable[[Any, Any], object]) -> Callable[[Path], None]:
    """Changes the first rank's two files."""

    def apply(path: Path) -> None:
        files = [path / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt" for kind in ("model", "optim")]
        held = [torch.load(file, weights_only=False) for file in files]
        change(held[0], held[1]["optimizer_state_dict"])
        for file, value in zip(files, held):
            torch.save(value, file)

    return apply


CONTRADICTIONS: dict[str, Callable[[Any, Any], object]] = {
    "shape_too_large": lambda model, state: model["param_shapes"][0].update({"embed.weight": torch.Size((70, 5))}),
    "shape_huge": lambda model, state: model["param_shapes"][0].update({"embed.weight": (1 << 40, 1 << 40)}),
    "shape_negative": lambda model, state: model["param_shapes"][0].update({"embed.weight": (-7, 5)}),
    "shape_no_tuple": lambda model, state: model["param_shapes"][0].update({"embed.weight": "7, 5"}),
    "name_no_text": lambda model, state: model["param_shapes"][0].update({5: (7, 5)}),
    "a_parameter_more": lambda model, state: model["param_shapes"][0].update({"x": (9,)}),
    "a_parameter_less": lambda model, state: model["param_shapes"][0].pop("embed.weight"),
    "a_group_twice": lambda model, state: model["param_shapes"].append(model["param_shapes"][0]),
    "many_dimensions": lambda model, state: model["param_shapes"][0].update({"x": (1,) * 60}),
    "no_shapes": lambda model, state: model.pop("param_shapes"),
    "no_module": lambda model, state: model.pop("module"),
    "no_weights": lambda model, state: state.pop("fp32_flat_groups"),
    "empty_weights": lambda model, state: state.update(fp32_flat_groups=[]),
    "weights_are_text": lambda model, state: state.update(fp32_flat_groups=["x"]),
    "weights_are_square": lambda model, state: state.update(fp32_flat_groups=[torch.ones(5, 5)]),
    "weights_are_expanded": lambda model, state: state.update(fp32_flat_groups=[torch.ones(1).expand(29)]),
    "two_dtypes": lambda model, state: state.update(fp32_flat_groups=[torch.ones(20), torch.ones(9).half()]),
    "too_few": lambda model, state: state.update(fp32_flat_groups=[state["fp32_flat_groups"][0][:-1].clone()]),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_contradictions_are_refused(tmp_path: Path, contradiction: str) -> None:
    zero3(tmp_path, module_state(), PARAMETERS, 2)
    rewritten(CONTRADICTIONS[contradiction])(tmp_path)
    with pytest.raises(TorchLoadError):
        open_checkpoint(tmp_path)


def test_the_advice_says_what_to_run(tmp_path: Path) -> None:
    zero3(tmp_path, module_state(), PARAMETERS, 2)
    rewritten(CONTRADICTIONS["no_weights"])(tmp_path)
    with pytest.raises(CorruptCheckpointError, match=r"python zero_to_fp32\.py \. output"):
        open_checkpoint(tmp_path)


def test_a_run_of_elements_is_read_as_boxes(tmp_path: Path) -> None:
    state = {"w": torch.arange(math.prod((4, 3, 5))).float().reshape(4, 3, 5)}
    with open_checkpoint(zero3(tmp_path, state, ("w",), 3)) as checkpoint:
        entry = checkpoint.root["module"]["w"]
        assert sum(math.prod(box.shape) for box in entry.boxes) == 60
        assert len(entry.boxes) <= 3 * 5
        assert all(box.is_contiguous for box in entry.boxes)
