"""The words that frameworks put into names, each with where it comes from. Adding one is one row and one test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from torchload.core.wrappers import WRAPPERS

__all__ = [
    "BENIGN_MISSING",
    "BENIGN_UNEXPECTED",
    "RENAMES",
    "Benign",
    "Rename",
    "Standing",
    "container_standing",
]


@dataclass(frozen=True, slots=True)
class Benign:
    """A tensor that may be there or not without changing what was learned.

    Attributes:
        source: Who writes it, and why it doesn't matter.
        shape: What its shape must be for that to be so; a size of ``None`` stands for any, ``None`` alone
            for any shape.
        parent: Last segment of the module that it must be in, or ``""`` for any.
    """

    source: str
    shape: tuple[int | None, ...] | None = None
    parent: str = ""

    def covers(self, name: str, shape: tuple[int, ...] | None) -> bool:
        """Whether a tensor of this name, whose last segment is that of the row, and shape is meant."""
        if self.parent and name.split(".")[-2:-1] != [self.parent]:
            return False
        if self.shape is None or shape is None:
            return self.shape is None
        return len(shape) == len(self.shape) and all(want in (None, have) for want, have in zip(self.shape, shape))


# Last segments of buffers that a model has and a checkpoint may lack: constants that the constructor computes.
BENIGN_MISSING: dict[str, Benign] = {
    "num_batches_tracked": Benign("BatchNorm before torch 0.4.1 had none; torch's upgrade leaves it as it is"),
    "position_ids": Benign("transformers since 4.31 doesn't save this constant index"),
    "token_type_ids": Benign("transformers: a buffer of zeros"),
    "relative_position_index": Benign("Swin, BEiT: constant index, not saved by newer timm"),
    "relative_coords_table": Benign("Swin v2: constant table, not saved by newer timm"),
    "attn_mask": Benign("Swin, CLIP: constant mask, not saved by newer timm and open_clip"),
}

# Last segments of tensors that checkpoints carry and a model may not have.
BENIGN_UNEXPECTED: dict[str, Benign] = {
    "num_batches_tracked": Benign("BatchNorm without running statistics, FrozenBatchNorm"),
    "position_ids": Benign("constant index that transformers made non-persistent in 4.31"),
    "token_type_ids": Benign("transformers: a buffer of zeros"),
    "inv_freq": Benign("rotary embedding constants, non-persistent since transformers 4.32"),
    "relative_position_index": Benign("Swin, BEiT: constant index, non-persistent in newer timm"),
    "relative_coords_table": Benign("Swin v2: constant table, non-persistent in newer timm"),
    "attn_mask": Benign("the causal mask of CLIP's text tower, Swin's window mask"),
    "bias": Benign("GPT-2, nanoGPT: the causal mask that old versions saved as attn.bias", (1, 1, None, None), "attn"),
    "masked_bias": Benign("constant of GPT-2's attention, dropped in transformers 4.28", ()),
    "input_resolution": Benign("OpenAI's CLIP archives carry their configuration as scalars", ()),
    "context_length": Benign("OpenAI's CLIP archives", ()),
    "vocab_size": Benign("OpenAI's CLIP archives", ()),
    "total_ops": Benign("left behind by the profiler thop", (1,)),
    "total_params": Benign("left behind by the profiler thop", (1,)),
    "_float_tensor": Benign("fairseq's sinusoidal positions: a marker of dtype and device", (1,)),
    "version": Benign("fairseq's transformer: format marker", (1,)),
}


@dataclass(frozen=True, slots=True)
class Rename:
    """Two spellings of the same tensors inside one module; `{p}` stands for the parameter's own name.

    A spelling applies only where all of its names are there and none of the other's, so a name that merely looks alike
    (the ``original`` of another parametrization, the ``weight_orig`` of pruning) is never taken for a weight.
    """

    what: str
    old: tuple[str, ...]
    new: tuple[str, ...]

    def directions(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Both ways to read the row: (names in the file, names in the model)."""
        yield self.old, self.new
        yield self.new, self.old


RENAMES: tuple[Rename, ...] = (
    Rename(
        "weight_norm",  # torch.nn.utils.weight_norm ↔ torch.nn.utils.parametrizations.weight_norm: same g, same v
        ("{p}_g", "{p}_v"),
        ("parametrizations.{p}.original0", "parametrizations.{p}.original1"),
    ),
    Rename(
        "spectral_norm",  # torch.nn.utils.spectral_norm ↔ torch.nn.utils.parametrizations.spectral_norm
        ("{p}_orig", "{p}_u", "{p}_v"),
        ("parametrizations.{p}.original", "parametrizations.{p}.0._u", "parametrizations.{p}.0._v"),
    ),
    Rename(
        "LayerNorm gamma/beta",  # as TensorFlow named them; transformers renames the same way on loading
        ("gamma", "beta"),
        ("weight", "bias"),
    ),
)


class Standing(IntEnum):
    """How strongly a path of container names says "this is the model". Smaller is stronger."""

    AVERAGE = 0
    CONVENTIONAL = 1
    ARBITRARY = 2
    UNLIKELY = 3


# fmt: off
_CONVENTIONAL = frozenset({
    "state_dict", "model", "model_state_dict", "module", "net", "network", "network_weights", "model_state",
    "model_states", "net_dict", "net_state_dict", "network_state_dict", "params", "param", "weight", "weights",
    "model_weights", "state", "model_dict", "state_dicts", "generator", "g", "net_g", "netg", "params_g",
    "encoder_q", "online", "online_model", "online_network", "online_encoder", "q_net", "policy", "actor",
    "_forward_module", "base_model", "pytorch_model", "model_params", "parameters", "bare_model",
})
# fmt: on
_AVERAGED_WORDS = frozenset({"ema", "swa", "avg", "average", "averaged"})
_AVERAGED = frozenset({"target_encoder"})  # I-JEPA, V-JEPA: the exponential average of 'encoder', used downstream
# fmt: off
_UNLIKELY = frozenset({
    "optimizer", "optimizers", "optimizer_state_dict", "optimizer_states", "optim", "opt", "opt_state", "callbacks",
    "loops", "lr_schedulers", "lr_scheduler", "scheduler", "scaler", "amp", "message_hub", "rng_state",
    "hyper_parameters", "ema_optimizer",
})
# fmt: on
_DELAYED_WORD = (
    "target"  # reinforcement learning's q_net_target, critic_target: a copy that lags behind the network meant
)
_WORD = re.compile(r"[_\W]+")


def container_standing(segment: str) -> Standing:
    """How much a single container name or prefix segment speaks for what lies under it.

    Example:
        >>> container_standing("state_dict_ema"), container_standing("state_dict"), container_standing("teacher")
        (<Standing.AVERAGE: 0>, <Standing.CONVENTIONAL: 1>, <Standing.ARBITRARY: 2>)
    """
    name = segment.lower()
    words = _WORD.split(name)
    if name in _CONVENTIONAL or name in WRAPPERS:
        return Standing.CONVENTIONAL
    if name in _AVERAGED or not _AVERAGED_WORDS.isdisjoint(words):
        return Standing.UNLIKELY if name in _UNLIKELY else Standing.AVERAGE
    return Standing.UNLIKELY if name in _UNLIKELY or _DELAYED_WORD in words else Standing.ARBITRARY
