"""smart_load into models that are spread over ranks: FSDP2 and tensor parallelism, two gloo ranks on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed._ranks import on_two_ranks
from tests.law import randomise, same_bits
from torchload import errors, smart_load, smart_resume

pytest.importorskip("torch.distributed.tensor")
fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="this torch has no FSDP2")


class Net(nn.Module):
    """Sizes that two ranks can't halve, one smaller than the ranks are many, and a scalar buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 1)
        self.extra = nn.Parameter(torch.zeros(5, 3, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(inputs))) + self.extra.sum()


def sharded(*, meta: bool = False, seed: int = 2) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    from tests.distributed._parallel import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    with torch.device("meta" if meta else "cpu"):
        model = Net()
    if not meta:
        randomise(model, seed)
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def randomise_parts(model: nn.Module) -> None:
    for module in (model, model.first):
        module.reshard()
    for value in model.parameters():
        value.to_local().fill_(0.5)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a sharded model, gathered."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def assert_holds(model: nn.Module, want: dict[str, torch.Tensor]) -> None:
    have = whole(model)
    assert list(have) == list(want)
    for name, value in want.items():
        assert same_bits(have[name], value), name


def _ordinary_files(rank: int, folder: Path) -> None:
    want = torch.load(folder / "x.pth", weights_only=True)["state_dict"]
    model = sharded()
    parameters = dict(model.named_parameters())
    pointers = {name: value.to_local().data_ptr() for name, value in parameters.items()}
    smart_load(model, folder / "x.pth")
    assert_holds(model, want)
    assert {name: value.to_local().data_ptr() for name, value in model.named_parameters()} == pointers
    assert all(parameters[name] is value for name, value in model.named_parameters())
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    plain = Net()
    plain.load_state_dict(want)
    assert torch.allclose(model(inputs), plain(inputs), atol=1e-5)

    # The root leaves its parameters whole after a forward pass; a load goes into the parts all the same.
    with torch.no_grad():
        model(inputs)
        randomise_parts(model)
        model(inputs)
    smart_load(model, folder / "x.pth")
    assert_holds(model, want)
    assert torch.allclose(model(inputs), plain(inputs), atol=1e-5)

    model = sharded()
    smart_load(model, folder / "x.pth", dtype=torch.float64)
    assert_holds(model, {k: v.double() if v.is_floating_point() else v for k, v in want.items()})
    assert torch.allclose(model(inputs.double()).float(), plain(inputs), atol=1e-5)

    for atomic in (False, True):
        model = sharded()
        smart_load(model, folder / "x.safetensors", atomic=atomic)
        assert_holds(model, want)
        assert torch.allclose(model(inputs), plain(inputs), atol=1e-5)

    half = sharded()
    smart_load(half, folder / "half.pth")
    assert_holds(half, {k: v.half().float() if v.is_floating_point() else v for k, v in want.items()})


def test_fsdp2_from_ordinary_files(tmp_path):
    from safetensors.torch import save_file

    trained = randomise(Net(), 1)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "x.pth")
    save_file(trained.state_dict(), tmp_path / "x.safetensors")
    torch.save(trained.half().state_dict(), tmp_path / "half.pth")
    on_two_ranks(_ordinary_files, tmp_path)


def _meta(rank: int, folder: Path) -> None:
    want = torch.load(folder / "x.pth", weights_only=True)
    model = sharded(meta=True)
    model.to_empty(device="cpu")
    smart_load(model, folder / "x.pth")
    assert_holds(model, want)

    model = sharded(meta=True)
    smart_load(model, folder / "x.pth")
    assert_holds(model, want)
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    plain = Net()
    plain.load_state_dict(want)
    assert torch.allclose(model(inputs), plain(inputs), atol=1e-5)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(4) / 4), persistent=False)


def _tables(rank: int, folder: Path) -> None:
    from tests.distributed._parallel import fully_shard

    def build(*, real: bool) -> nn.Module:
        with torch.device("meta"):
            model = Rotary()
        if real:
            model.inv_freq = Rotary().inv_freq
        return fully_shard(model)

    model = build(real=False)
    with pytest.raises(errors.IncompatibleCheckpointError, match="inv_freq is on the meta device"):
        smart_load(model, folder / "rotary.pth")
    model = build(real=True)
    smart_load(model, folder / "rotary.pth")
    assert_holds(model, torch.load(folder / "rotary.pth", weights_only=True))
    assert torch.equal(model.inv_freq, Rotary().inv_freq)


def _meta_and_tables(rank: int, folder: Path) -> None:
    _meta(rank, folder)
    _tables(rank, folder)


def test_fsdp2_from_the_meta_device(tmp_path):
    torch.save(randomise(Net(), 1).state_dict(), tmp_path / "x.pth")
    torch.save(Rotary().state_dict(), tmp_path / "rotary.pth")
    on_two_ranks(_meta_and_tables, tmp_path)


def _refused(rank: int, folder: Path) -> None:
    model = sharded()
    before = whole(model)
    with pytest.raises(errors.IncompatibleCheckpointError):
        smart_load(model, folder / "x.pth")
    assert_holds(model, before)


def test_a_refused_load_changes_no_rank(tmp_path):
    state = randomise(Net(), 1).state_dict()
    state["first.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "x.pth")
    on_two_ranks(_refused, tmp_path)


def _tensor_parallel(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), 2)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    want = torch.load(folder / "x.pth", weights_only=True)
    smart_load(model, folder / "x.pth")
    assert_holds(model, want)
    smart_load(model, folder / "x.safetensors")
    assert_holds(model, want)


def test_tensor_parallel(tmp_path):
    from safetensors.torch import save_file

    trained = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), 1)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    save_file(trained.state_dict(), tmp_path / "x.safetensors")
    on_two_ranks(_tensor_parallel, tmp_path)


def _distributed_checkpoint(rank: int, folder: Path) -> None:
    from torch.distributed import checkpoint

    trained = sharded(seed=1)
    checkpoint.save({"model": trained.state_dict()}, checkpoint_id=folder / "dcp")
    model = sharded()
    smart_load(model, folder / "dcp")
    assert_holds(model, whole(trained))
    alone = Net()
    smart_load(alone, folder / "dcp")
    for name, value in whole(trained).items():
        assert same_bits(alone.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoint_folders(tmp_path):
    on_two_ranks(_distributed_checkpoint, tmp_path)


def _resumed(rank: int, folder: Path) -> None:
    def losses(model, optimizer, first, last):
        seen = []
        for step in range(first, last):
            inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    straight = sharded(seed=1)
    optimizer = torch.optim.AdamW(straight.parameters(), 0.1)
    want = losses(straight, optimizer, 0, 3)
    state = {
        key: {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in values.items()}
        for key, values in optimizer.state_dict()["state"].items()
    }
    if rank == 0:
        groups = optimizer.state_dict()["param_groups"]
        torch.save(
            {"model": whole_on_first(straight), "optimizer": {"state": state, "param_groups": groups}, "epoch": 1},
            folder / "last.pth",
        )
    else:
        whole_on_first(straight)
    torch.distributed.barrier()
    want = losses(straight, optimizer, 3, 6)
    model = sharded(seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    smart_resume(model, folder / "last.pth", optimizer)
    assert losses(model, optimizer, 3, 6) == want


def whole_on_first(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in whole(model).items()}


def test_resuming_a_sharded_run(tmp_path):
    on_two_ranks(_resumed, tmp_path)


class Refusing:
    """The last to be restored."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        if state:
            raise ValueError("no")


def _refused_at_the_end(rank: int, folder: Path) -> None:
    trained = sharded(seed=1)
    state = whole_on_first(trained)
    if rank == 0:
        torch.save({"model": state, "scheduler": {"a": 1}}, folder / "x.pth")
    torch.distributed.barrier()
    model = sharded(seed=5)
    parts = [parameter.to_local() for parameter in model.parameters()]
    before, addresses = [part.clone() for part in parts], [part.data_ptr() for part in parts]
    with pytest.raises(errors.IncompatibleCheckpointError, match="everything is as it was"):
        smart_resume(model, folder / "x.pth", None, Refusing())
    now = [parameter.to_local() for parameter in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(now, before))
    assert [part.data_ptr() for part in now] == addresses
    smart_resume(model, folder / "x.pth")
    assert all(torch.equal(value, state[name]) for name, value in whole(model).items() if rank == 0)


def test_a_sharded_run_that_can_not_be_resumed_is_as_it_was(tmp_path):
    on_two_ranks(_refused_at_the_end, tmp_path)


def _refused_in_every_phase(rank: int, folder: Path) -> None:
    def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sharded(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 6)).square().mean().backward()
            optimizer.step()
        return model, optimizer

    def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        values = [*model.parameters(), *model.buffers()]
        values += [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
        return [(value.to_local() if hasattr(value, "to_local") else value).detach() for value in values]

    model, optimizer = trained(1)
    states = {
        key: {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in values.items()}
        for key, values in optimizer.state_dict()["state"].items()
    }
    saved = {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}
    state = {"model": whole_on_first(model), "optimizer": saved, "scheduler": {"a": 1}}
    lacking = {name: value for name, value in states[0].items() if name != "exp_avg_sq"}
    files = {
        "missing key": {**state, "model": {name: state["model"][name] for name in list(state["model"])[1:]}},
        "missing moment": {**state, "optimizer": {**saved, "state": {**states, 0: lacking}}},
        "scheduler refuses": state,
    }
    if rank == 0:
        for name, content in files.items():
            torch.save(content, folder / f"{name}.pth")
    torch.distributed.barrier()
    model, optimizer = trained(5)
    groups = optimizer.state_dict()["param_groups"]
    before, objects = [part.clone() for part in parts(model, optimizer)], list(model.parameters())
    for name in files:
        with pytest.raises(errors.IncompatibleCheckpointError):
            smart_resume(model, folder / f"{name}.pth", optimizer, Refusing())
        now = parts(model, optimizer)
        assert len(now) == len(before)
        assert all(same_bits(one, other) for one, other in zip(now, before)), name
        assert all(one is other for one, other in zip(model.parameters(), objects))
        assert optimizer.state_dict()["param_groups"] == groups
    model(torch.ones(3, 6)).square().mean().backward()
    optimizer.step()


def test_a_sharded_run_with_its_optimizer_is_as_it_was_whatever_fails(tmp_path):
    on_two_ranks(_refused_in_every_phase, tmp_path)


class _Once:
    """Fails the first time that it is called."""

    def __init__(self, function) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("no")
        return self.function(*arguments)


def _failed_after_the_swap(rank: int, folder: Path) -> None:
    from torchload.plan import execute

    state = whole_on_first(sharded(seed=1))
    if rank == 0:
        torch.save(state, folder / "x.pth")
    torch.distributed.barrier()
    refresh = execute.refresh_shards
    for dtype in (None, torch.bfloat16):
        for failing in ("refresh", "hook"):
            model = sharded(seed=5)
            before = {name: value.clone() for name, value in whole(model).items()}
            objects = list(model.parameters())
            if failing == "hook":
                refuse = _Once(lambda module, keys: None)
                model.register_load_state_dict_post_hook(refuse)
            execute.refresh_shards = _Once(refresh) if failing == "refresh" else refresh
            with pytest.raises(RuntimeError, match="no"):
                smart_load(model, folder / "x.pth", dtype=dtype, atomic=True)
            execute.refresh_shards = refresh
            now = whole(model)
            assert all(same_bits(now[name], before[name]) for name in before), (dtype, failing)
            assert all(one is other for one, other in zip(model.parameters(), objects))
            model(torch.ones(3, 6)).sum().backward()
            smart_load(model, folder / "x.pth", dtype=dtype, atomic=True)
            assert torch.equal(whole(model)["first.weight"], state["first.weight"].to(dtype or torch.float32))


def test_an_atomic_load_that_fails_after_the_swap_is_taken_back(tmp_path):
    on_two_ranks(_failed_after_the_swap, tmp_path)
