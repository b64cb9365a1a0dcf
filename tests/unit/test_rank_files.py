"""Folders with a file for each rank: put together where they say how, else refused with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.versions import save_folder
from torchload import smart_load
from torchload.core.checkpoint import OpaqueTensor, TensorEntry
from torchload.errors import (
    AmbiguousCheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    TorchLoadError,
)
from torchload.formats import open_checkpoint
from torchload.formats.sets.rank_files import is_rank_set
from torchload.transfer.mapped import read_entries

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs the classes of torch.distributed"),
]


class Sharded:
    """Is pickled as the `ShardedTensor` of one rank, with any shards and no process group."""

    def __init__(self, shape: tuple[int, ...], *shards: tuple[tuple[int, ...], torch.Tensor]) -> None:
        self.shape = shape
        self.shards = shards

    def __reduce__(self) -> Any:
        from torch.distributed._shard.metadata import ShardMetadata
        from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

        shards = []
        for origin, tensor in self.shards:
            shard = Shard.__new__(Shard)
            shard.tensor = tensor
            shard.metadata = ShardMetadata(list(origin), list(tensor.shape), "rank:0/cpu")
            shards.append(shard)
        args = (ShardedTensor, torch.float32, self.shape, (1,), 0, torch.strided, torch.device("cpu"), False)
        state = (shards, None, None, None, False)
        return torch._tensor._rebuild_from_type_v2, (torch._utils._rebuild_wrapper_subclass, ShardedTensor, args, state)


def save(folder: Path, *trees: Any, name: str = "rank{}.pt") -> Path:
    for rank, tree in enumerate(trees):
        torch.save(tree, folder / name.format(rank))
    return folder


def halves(tensor: torch.Tensor) -> list[Sharded]:
    middle = tensor.shape[0] // 2
    origins = [(0,) * tensor.dim(), (middle, *(0,) * (tensor.dim() - 1))]
    parts = [tensor[:middle].clone(), tensor[middle:].clone()]
    return [Sharded(tuple(tensor.shape), place) for place in zip(origins, parts)]


@pytest.mark.parametrize(
    "name", ["rank{}.pt", "model_world_size_2_rank_{}.pt", "epoch3.rank-{}.pth", "model_rank{}.bin"]
)
def test_sharded_tensors_are_joined(tmp_path: Path, name: str) -> None:
    source, target = nn.Linear(3, 4), nn.Linear(3, 4)
    weight, bias = halves(source.weight.detach()), halves(source.bias.detach())
    save(tmp_path, *({"model": {"weight": w, "bias": b}, "epoch": 3} for w, b in zip(weight, bias)), name=name)
    torch.save({"state": {}}, tmp_path / "optim_world_size_2_rank_0.pt")
    report = smart_load(target, tmp_path, "cpu")
    assert report.format == "sharded tensors in 2 rank files"
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


def test_several_shards_in_a_file_and_none_in_another(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    left = Sharded((4, 6), ((0, 0), tensor[:, :2].clone()), ((0, 2), tensor[:1, 2:].clone()))
    right = Sharded((4, 6), ((1, 2), tensor[1:, 2:]))  # a view: its storage is larger than it is
    table = Sharded((2,), ((0,), torch.ones(2)))
    save(tmp_path, {"w": Sharded((4, 6))}, {"w": left, "table": table}, {"w": right})
    with open_checkpoint(tmp_path) as checkpoint:
        joined, of_one = read_entries([checkpoint.root["w"], checkpoint.root["table"]])
    assert torch.equal(joined, tensor)
    assert torch.equal(of_one, torch.ones(2))


def test_replicas_are_taken_once_and_others_from_the_first_rank(tmp_path: Path) -> None:
    whole = Sharded((3,), ((0,), torch.arange(3.0)))
    trees = [
        {"w": whole, "same": torch.ones(2), "own": torch.full((2,), float(rank)), "rank": rank} for rank in range(2)
    ]
    with open_checkpoint(save(tmp_path, *trees)) as checkpoint:
        root = checkpoint.root
        assert torch.equal(read_entries([root["w"]])[0], torch.arange(3.0))
        assert isinstance(root["same"], TensorEntry)
        assert isinstance(root["own"], OpaqueTensor)  # whose would it be?
        assert root["rank"] == 0


DAMAGES: dict[str, Callable[[], list[Any]]] = {
    "hole": lambda: [Sharded((4,), ((0,), torch.ones(2))), Sharded((4,), ((3,), torch.ones(1)))],
    "overlap": lambda: [Sharded((4,), ((0,), torch.ones(3))), Sharded((4,), ((2,), torch.ones(2)))],
    "outside": lambda: [Sharded((4,), ((0,), torch.ones(2))), Sharded((4,), ((2,), torch.ones(3)))],
    "dtypes": lambda: [Sharded((2,), ((0,), torch.ones(1))), Sharded((2,), ((1,), torch.ones(1).half()))],
    "shapes": lambda: [Sharded((2,), ((0,), torch.ones(1))), Sharded((3,), ((1,), torch.ones(1)))],
    "plain_beside": lambda: [Sharded((2,), ((0,), torch.ones(1))), torch.ones(1)],
    "dimensions": lambda: [Sharded((2, 1), ((0,), torch.ones(1))), Sharded((2, 1), ((1,), torch.ones(1)))],
    "huge": lambda: [Sharded((1 << 40, 1 << 40), ((0, 0), torch.ones(1, 1)))] * 2,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_parts_that_make_no_tensor_are_refused(tmp_path: Path, damage: str) -> None:
    save(tmp_path, *({"w": value} for value in DAMAGES[damage]()))
    with pytest.raises(TorchLoadError):
        open_checkpoint(tmp_path)


def test_a_state_of_another_layout_is_opaque(tmp_path: Path) -> None:
    class Odd(Sharded):
        def __reduce__(self) -> Any:
            function, (rebuild, kind, args, _) = super().__reduce__()
            return function, (rebuild, kind, args, {"shards": 7})

    save(tmp_path, {"weight": Odd((2,))}, {"weight": Odd((2,))})
    with open_checkpoint(tmp_path / "rank0.pt") as checkpoint:
        assert checkpoint.root["weight"].parts == ()
    with pytest.raises(AmbiguousCheckpointError, match="don't say which part"):
        open_checkpoint(tmp_path)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    save(tmp_path, *({"w": Sharded((1,))} for _ in range(4)))
    (tmp_path / "rank1.pt").unlink()
    with pytest.raises(CheckpointNotFoundError, match="lacks the files of ranks 1"):
        open_checkpoint(tmp_path)


def test_one_part_alone_is_refused(tmp_path: Path) -> None:
    layer = nn.Linear(3, 4, bias=False)
    save(tmp_path, *({"weight": part} for part in halves(layer.weight.detach())))
    with pytest.raises(IncompatibleCheckpointError, match="one rank's part of a sharded tensor"):
        smart_load(layer, tmp_path / "rank0.pt", "cpu")


def test_plain_tensors_per_rank_are_ambiguous(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.zeros(2)}, {"w": torch.ones(2)})
    with pytest.raises(AmbiguousCheckpointError, match="gather the model in the job that saved it") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.candidates == (str(tmp_path / "rank0.pt"), str(tmp_path / "rank1.pt"))


def test_metas_llama_is_named(tmp_path: Path) -> None:
    save(
        tmp_path,
        {"tok_embeddings.weight": torch.zeros(2)},
        {"tok_embeddings.weight": torch.ones(2)},
        name="consolidated.0{}.pth",
    )
    with pytest.raises(CheckpointFormatError, match="convert_llama_weights_to_hf"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        assert "tok_embeddings.weight" in checkpoint.root


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["rank0.pt", "rank1.pt", "README.md"], True),
        (["rank0.pt"], False),
        (["rank0.pt", "rank1.pt", "best.pt"], False),
        (["a_rank0.pt", "b_rank0.pt"], False),
        (["frank0.pt", "frank1.pt"], False),
        (["model_rank_0.pt", "model_rank_1.pt", "optim_rank_0.pt", "rng_state_0.pth"], True),
        (["model-00001-of-00002.bin", "model-00002-of-00002.bin"], False),
    ],
)
def test_what_counts_as_a_set(names: list[str], expected: bool) -> None:
    assert is_rank_set(names) is expected


# --- Megatron-LM ---


def megatron(folder: Path, *ranks: str, name: str = "model_optim_rng.pt") -> nn.Module:
    layer = nn.Linear(2, 3)
    for rank in ranks:
        inside = folder / "iter_0000100" / rank
        inside.mkdir(parents=True)
        torch.save({"model": layer.state_dict(), "iteration": 100, "args": object()}, inside / name)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return layer


@pytest.mark.parametrize("name", ["model_optim_rng.pt", "model_rng.pt"])
@pytest.mark.parametrize("rank", ["mp_rank_00", "mp_rank_00_000"])
def test_megatron_on_one_rank_loads(tmp_path: Path, rank: str, name: str) -> None:
    source, target = megatron(tmp_path, rank, name=name), nn.Linear(2, 3)
    for folder in (tmp_path, tmp_path / "iter_0000100"):
        nn.init.zeros_(target.weight)
        smart_load(target, folder, "cpu")
        assert torch.equal(target.weight, source.weight)


def test_megatron_on_several_ranks_is_refused_with_advice(tmp_path: Path) -> None:
    megatron(tmp_path, "mp_rank_00", "mp_rank_01")
    with pytest.raises(CheckpointFormatError, match=r"2 tensor- or pipeline-parallel ranks.*convert\.py"):
        open_checkpoint(tmp_path)


def test_megatrons_distributed_format_loads(tmp_path: Path) -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    save_folder(source.state_dict(), checkpoint_id=tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    smart_load(target, tmp_path, "cpu")
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize(
    ("pointer", "error"),
    [
        ("200", CheckpointNotFoundError),
        ("release", CheckpointNotFoundError),
        ("../x", CorruptCheckpointError),
        ("", TorchLoadError),
    ],
)
def test_megatron_pointers_that_lead_nowhere(tmp_path: Path, pointer: str, error: type[TorchLoadError]) -> None:
    megatron(tmp_path, "mp_rank_00")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(pointer)
    with pytest.raises(error):
        open_checkpoint(tmp_path)


def test_folders_that_lead_to_themselves_end(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "iter_0000001").symlink_to(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="leads to a folder with another such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    (tmp_path / "pytorch_model_fsdp_0").symlink_to(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="inside a folder of models"):
        open_checkpoint(tmp_path)


def test_an_empty_rank_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"has none of model_optim_rng\.pt"):
        open_checkpoint(tmp_path)


def test_several_models_of_accelerate_are_ambiguous(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"pytorch_model_fsdp_{number}").mkdir()
    with pytest.raises(AmbiguousCheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.candidates) == 2
