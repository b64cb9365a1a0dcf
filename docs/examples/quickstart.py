"""Train a small network for real, save all that training needs, and load what inference needs with one line.

Takes a few seconds on a CPU: python docs/examples/quickstart.py
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchload import smart_load


def spirals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on three noisy spiral arms, shape (count, 2), and the arm of each, shape (count,)."""
    arm = torch.randint(3, (count,))
    radius = torch.rand(count)
    angle = 4 * radius + arm * (2 * torch.pi / 3) + 0.1 * torch.randn(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm


def build_model() -> nn.Module:
    """The network, as both the training script and the inference script build it."""
    return nn.Sequential(
        nn.Linear(2, 64), nn.BatchNorm1d(64), nn.SiLU(),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.SiLU(),
        nn.Linear(64, 3),
    )  # fmt: skip


def train(path: Path, options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Train under DataParallel, as on a machine with many GPUs, and save as training scripts do.

    Returns:
        The trained model and its exponential moving average, to compare with.
    """
    model = nn.DataParallel(build_model())
    average = AveragedModel(model.module, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    points, arms = spirals(2048)
    for _ in range(options.epochs):
        for batch in torch.randperm(len(points)).split(options.batch_size):
            loss = nn.functional.cross_entropy(model(points[batch]), arms[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model.module)
    checkpoint = {
        "epoch": options.epochs,
        "model": model.state_dict(),  # every name begins with "module."
        "ema": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": options,  # an object, which blocks torch.load's safe mode
    }
    torch.save(checkpoint, path)
    return model.module.eval(), average.module.eval()


def compare(name: str, loaded: nn.Module, trained: nn.Module, points: torch.Tensor, arms: torch.Tensor) -> None:
    """Print how far apart the outputs of two models are, and how many points the loaded one gets right."""
    dtype = next(loaded.parameters()).dtype
    with torch.inference_mode():
        found, wanted = loaded(points.to(dtype)).float(), trained(points)
    accuracy = (found.argmax(1) == arms).float().mean().item()
    difference = (found - wanted).abs().max().item()
    print(f"\n  {name}: largest difference of the outputs {difference:.2g}, accuracy {accuracy:.1%}\n")


def show(title: str) -> None:
    print(f"# {title}\n")


def main() -> None:
    torch.manual_seed(0)
    path = Path("checkpoint.pth")
    trained, average = train(path, argparse.Namespace(epochs=15, batch_size=64, learning_rate=3e-3))
    points, arms = spirals(1000)

    show("What torch.load says to this file in its safe mode")
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        print("  " + next((line.strip() for line in lines if "Unsupported" in line), lines[0]) + "\n")

    show('smart_load(model, "checkpoint.pth"): the averaged weights, in float32')
    model = build_model().eval()
    print(smart_load(model, path))
    compare("against the average", model, average, points, arms)

    show('smart_load(model, "checkpoint.pth", key="model"): the last step of training')
    model = build_model().eval()
    print(smart_load(model, path, key="model"))
    compare("against the trained model", model, trained, points, arms)

    show('smart_load(model, "checkpoint.pth", dtype=torch.float16): half precision, cast on the way')
    model = build_model().eval()
    print(smart_load(model, path, dtype=torch.float16))
    compare("against the average", model, average, points, arms)


if __name__ == "__main__":
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            main()
        finally:
            os.chdir(before)
