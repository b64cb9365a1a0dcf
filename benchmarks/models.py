"""The models: shapes as in practice, weights random. Each can do one small forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MODELS", "build_meta", "materialize", "named_tensors"]


class Block(nn.Module):
    """One pre-norm layer of a transformer decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(width // 64, 1)
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        normed = self.attention_norm(hidden)
        query, key, value = (
            layer(normed).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(functional.gelu(self.up(self.feedforward_norm(hidden))))


class Transformer(nn.Module):
    """A decoder of about `nbytes` bytes in float32: 16 tensors in every layer, and an integer buffer."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        width = next((w for w in (2048, 1024, 512, 256, 128) if nbytes >= 48 * w * w * 5), 64)
        vocabulary = 8 * width
        depth = max(round((nbytes / 4 - 2 * vocabulary * width) / (12 * width * width)), 1)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("positions", torch.arange(256))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    @staticmethod
    def example(device: torch.device, dtype: torch.dtype) -> Tensor:
        del dtype
        return torch.arange(4, device=device)[None]


class Layer(nn.Module):
    """A weight of 16 × 16 and a bias, without the time that `nn.Linear` takes to initialise itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16, 16))
        self.bias = nn.Parameter(torch.empty(16))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(functional.linear(hidden, self.weight, self.bias))


class Layers(nn.Sequential):
    """`count` small tensors; all in one list, or in lists of a hundred layers.

    `load_state_dict` scans the keys of a module once for each of its children, so that the flat model takes it
    seconds where the tree takes a fraction of one.
    """

    def __init__(self, count: int, *, tree: bool = False) -> None:
        layers = [Layer() for _ in range(count // 2)]
        if tree:
            super().__init__(*(nn.Sequential(*layers[first : first + 100]) for first in range(0, len(layers), 100)))
        else:
            super().__init__(*layers)

    @staticmethod
    def example(device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.ones(1, 16, device=device, dtype=dtype)


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(image)))))
        return functional.relu(hidden + self.downsample(image))


class ResNet(nn.Module):
    """An image classifier of convolutions, batch norms and their statistics: 122 tensors and 45 MB for four widths."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512), classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        for before, width in zip((widths[0], *widths), widths):
            stride = 1 if before == width and not stages else 2
            stages.append(nn.Sequential(Residual(before, width, stride), Residual(width, width, 1)))
        self.stages = nn.ModuleList(stages)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        hidden = functional.max_pool2d(functional.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        for stage in self.stages:
            hidden = stage(hidden)
        return self.fc(hidden.mean((2, 3)))

    @staticmethod
    def example(device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.ones(1, 3, 64, 64, device=device, dtype=dtype)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "transformer": Transformer,
    "layers": Layers,
    "layer-tree": lambda count: Layers(count, tree=True),
    "resnet18": lambda _: ResNet(),
    "tiny": lambda _: ResNet((32, 80), 100),  # about 1 MB
}


def build_meta(model: str, amount: int, dtype: torch.dtype) -> nn.Module:
    """The model without storage, its floating tensors in `dtype`, ready for inference."""
    with torch.device("meta"):
        return MODELS[model](amount).to(dtype).eval()


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a meta model zeros in memory of its own, every page of which is present."""
    model.to_empty(device=device)
    with torch.no_grad():
        for _, tensor in named_tensors(model):
            tensor.zero_()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer, as in the state dict, which costs more to build."""
    yield from itertools.chain(model.named_parameters(), model.named_buffers())
