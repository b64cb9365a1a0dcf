"""The longer programs of `docs/examples`, driven as their users drive them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed._ranks import on_ranks
from torchload import smart_save

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PATIENCE_SECONDS = 60  # a machine that is busy; nothing here is judged by its time


def _names(program: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / program), run_name="example")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])}


class _Server:
    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.address + path, timeout=PATIENCE_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def predict(self, inputs: object) -> dict[str, Any]:
        request = urllib.request.Request(self.address + "/predict", json.dumps({"inputs": inputs}).encode())
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def workers(self, count: int) -> dict[int, dict[str, Any]]:
        """The health of each worker, asked until all of them have answered."""
        found: dict[int, dict[str, Any]] = {}
        for _ in _patiently():
            health = self.get("/health")
            found[health["pid"]] = health
            if len(found) == count:
                return found
        raise AssertionError("not all workers answer")


def _patiently() -> Iterator[None]:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        yield
        time.sleep(0.05)


@contextlib.contextmanager
def _serving(path: Path) -> Iterator[_Server]:
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(path), "--port", "0", "--workers", "2", "--poll", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment(), cwd=path.parent) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            loaded = [process.stdout.readline() for _ in range(2)]
            assert all("all 4 tensors loaded" in line for line in loaded)
            yield _Server(address)
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
            assert process.wait(PATIENCE_SECONDS) == 0


def test_the_server_takes_new_weights_between_two_requests_and_refuses_bad_ones(tmp_path: Path) -> None:
    build_model = _names("serve.py")["build_model"]
    old, new = build_model().eval(), build_model().eval()
    path = tmp_path / "model.pth"
    smart_save(old, path)
    inputs = torch.randn(5, 4)

    def is_answer_of(model: torch.nn.Module, answer: dict[str, Any]) -> bool:
        with torch.no_grad():
            return torch.allclose(torch.tensor(answer["outputs"]), model(inputs), atol=1e-6)

    with _serving(path) as server:
        assert is_answer_of(old, server.predict(inputs.tolist()))
        whole = server.predict([[1, 2, 3, 4]])  # the page's own request: JSON writes whole numbers without a point
        assert torch.allclose(torch.tensor(whole["outputs"]), old(torch.tensor([[1.0, 2, 3, 4]])), atol=1e-6)
        health = server.workers(2)

        if Path("/proc/self/maps").exists():  # both workers' parameters are the file itself
            for pid in health:
                assert str(path) in Path(f"/proc/{pid}/maps").read_text()

        smart_save(new, path)
        seen_new: set[int] = set()
        for _ in _patiently():
            answer = server.predict(inputs.tolist())
            is_new = is_answer_of(new, answer)
            assert is_new or is_answer_of(old, answer)  # never a mixture
            seen_new |= {answer["pid"]} if is_new else set()
            if seen_new == set(health):
                break
        assert seen_new == set(health)

        broken = tmp_path / "broken"
        broken.write_text("version https://git-lfs.github.com/spec/v1\n")
        os.replace(broken, path)
        problems: dict[int, str] = {}
        for _ in _patiently():
            problems |= {pid: found["problem"] for pid, found in server.workers(2).items() if found["problem"]}
            if len(problems) == 2:
                break
        assert all("git-lfs pointer" in problem for problem in problems.values())
        assert len(problems) == 2
        assert is_answer_of(new, server.predict(inputs.tolist()))

        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            server.predict([[1.0, 2.0]])
        refused.value.close()


def test_a_server_without_good_weights_does_not_start(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.ones(2, 2)}, tmp_path / "model.pth")
    command = [sys.executable, str(EXAMPLES / "serve.py"), "model.pth", "--port", "0", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), cwd=tmp_path)
    assert done.returncode == 1
    assert "does not fit this Sequential" in done.stderr


def _finetune(folder: Path, *options: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "finetune.py"), "pretrained.pth", *options],
        cwd=folder, env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_fine_tuning_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    classifier = _names("finetune.py")["Classifier"]
    pretrained = classifier(3)
    torch.save({"epoch": 9, "state_dict": torch.nn.DataParallel(pretrained).state_dict()}, tmp_path / "pretrained.pth")

    frozen = _finetune(tmp_path, "--out", "frozen", "--epochs", "1", "--frozen", "1")
    assert any("skipped head." in line for line in frozen)
    kept = torch.load(tmp_path / "frozen" / "last.pth", weights_only=True)["state_dict"]
    assert torch.equal(kept["backbone.0.weight"], pretrained.backbone[0].weight)

    whole = _finetune(tmp_path, "--out", "whole", "--epochs", "4")
    # The same program, ended after two epochs as by a machine that went away.
    program = (EXAMPLES / "finetune.py").read_text(encoding="utf-8")
    end = '%}", flush=True)\n        if epoch == 1:\n            os._exit(9)\n'
    program = program.replace("import argparse\n", "import argparse\nimport os\n", 1)
    assert program.count('%}")\n') == 1
    stopping = tmp_path / "stopping.py"
    stopping.write_text(program.replace('%}")\n', end), encoding="utf-8")
    stopped = subprocess.run(
        [sys.executable, str(stopping), "pretrained.pth", "--out", "parts", "--epochs", "4"],
        cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert stopped.returncode == 9
    rest = _finetune(tmp_path, "--out", "parts", "--epochs", "4")
    assert rest[0] == "resumed after epoch 2"
    epochs = [line for line in whole if line.startswith("epoch")]
    assert [line for line in stopped.stdout.splitlines() if line.startswith("epoch")] + rest[1:] == epochs

    one = torch.load(tmp_path / "whole" / "last.pth", weights_only=True)["state_dict"]
    other = torch.load(tmp_path / "parts" / "last.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", " ".join(epochs))]
    assert losses == sorted(losses, reverse=True)


def _each_way(rank: int, folder: Path) -> list[tuple[int, int]]:
    program = _names("ranks.py")
    want = torch.load(folder / "x.pth", weights_only=True)
    found = []
    for name in ("load_replicas", "load_replicas_together", "load_sharded"):
        if name == "load_sharded" and not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
            continue
        model, report = program[name](str(folder / "x.pth"))
        for key, value in model.state_dict().items():
            held = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert torch.equal(held, want[key.removeprefix("module.")]), (name, key)
        inner = getattr(model, "module", model)
        assert torch.equal(inner.inv_freq, program["Net"]().inv_freq)
        assert model(torch.ones(2, 8)).isfinite().all()
        found.append((report.nbytes, report.read_bytes))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_way_of_loading_on_several_ranks(tmp_path: Path, ranks: int) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    pytest.importorskip("torch.distributed.fsdp")
    weights = _names("ranks.py")["Net"]().state_dict()
    torch.save(weights, tmp_path / "x.pth")
    whole = sum(value.nbytes for value in weights.values())
    outcomes = on_ranks(_each_way, tmp_path, ranks)
    for way, held in zip(zip(*outcomes), (ranks * whole, ranks * whole, whole)):
        assert sum(nbytes for nbytes, _ in way) == held
