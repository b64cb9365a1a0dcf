"""Fine-tune: the backbone from a checkpoint, a new head, first frozen, then not; stopped and resumed at any time.

    python finetune.py pretrained.pth --out run --epochs 6

`pretrained.pth` may be any checkpoint that holds this backbone, wherever in it and for any number of classes. Run the
same line again to go on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from torchload import smart_load, smart_resume, smart_save


class Classifier(nn.Module):
    """A backbone, and a head for some number of classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.head = nn.Linear(64, classes)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.backbone(points))
        return outputs


def spirals(count: int, arms: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on noisy spiral arms, shape (count, 2), and the arm of each, shape (count,)."""
    arm = torch.randint(arms, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    noise = 0.1 * torch.randn(count, generator=generator)
    angle = 4 * radius + arm * (2 * torch.pi / arms) + noise
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, points: torch.Tensor, arms: torch.Tensor) -> float:
    model.train()
    total = 0.0
    for batch in torch.randperm(len(points)).split(64):
        loss = nn.functional.cross_entropy(model(points[batch]), arms[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(points)


def accuracy(model: nn.Module, points: torch.Tensor, arms: torch.Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        return (model(points).argmax(1) == arms).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a classifier; run it again to go on.")
    parser.add_argument("weights", help="a checkpoint that holds the backbone")
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--frozen", type=int, default=2, help="how many epochs train the head alone")
    parser.add_argument("--classes", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    points, arms = spirals(2048, options.classes, generator)
    held_out = spirals(512, options.classes, generator)

    model = Classifier(options.classes)
    optimizer = torch.optim.AdamW(
        [{"params": model.backbone.parameters(), "lr": 1e-3}, {"params": model.head.parameters(), "lr": 5e-3}]
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    options.out.mkdir(parents=True, exist_ok=True)
    last = options.out / "last.pth"

    first = 0
    if last.exists():
        report = smart_resume(model, last, optimizer, scheduler)
        first = int(report.epoch or 0)
        print(f"resumed after epoch {first}")
    else:
        print(smart_load(model, options.weights, skip=["head.*"]))

    for epoch in range(first, options.epochs):
        # A layer that is frozen for a while keeps its place in the optimizer: without a gradient it isn't changed.
        model.backbone.requires_grad_(epoch >= options.frozen)
        loss = train_epoch(model, optimizer, points, arms)
        scheduler.step()
        # The file appears as a whole or not at all: the script may be stopped at any moment.
        extra = {"epoch": epoch + 1, "torch_rng_state": torch.get_rng_state()}
        smart_save(model, last, optimizer=optimizer, scheduler=scheduler, extra=extra)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy(model, *held_out):.1%}")


if __name__ == "__main__":
    main()
