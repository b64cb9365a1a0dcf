"""The words that frameworks put into names, each with where it comes from. Adding one is one row and one test."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from torchload.core.wrappers import WRAPPERS

__all__ = [
    "AVERAGED_WORDS",
    "BENIGN_MISSING",
    "BENIGN_UNEXPECTED",
    "GENERIC",
    "NEVER_THE_MODELS",
    "NOT_WEIGHTS",
    "RENAMES",
    "SWAPPED",
    "UNTOUCHED",
    "USUAL_CONTAINERS",
    "Benign",
    "Respelling",
    "Standing",
    "Swap",
    "container_standing",
    "words_of",
]


class Benign(NamedTuple):
    """A tensor that may be there or not without changing what was learned.

    Attributes:
        source: Who writes it, and why it doesn't matter.
        shape: What its shape must be for that to be so; a size of ``None`` stands for any, ``None`` alone
            for any shape.
    """

    source: str
    shape: tuple[int | None, ...] | None = None

    def covers(self, shape: tuple[int, ...] | None) -> bool:
        """Whether a tensor of this shape, in whose name the row's word comes last, is meant."""
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
    "masked_bias": Benign("constant of GPT-2's attention, dropped in transformers 4.28", ()),
    "input_resolution": Benign("OpenAI's CLIP archives carry their configuration as scalars", ()),
    "context_length": Benign("OpenAI's CLIP archives", ()),
    "vocab_size": Benign("OpenAI's CLIP archives", ()),
    "total_ops": Benign("left behind by the profiler thop", (1,)),
    "total_params": Benign("left behind by the profiler thop", (1,)),
    "_float_tensor": Benign("fairseq's sinusoidal positions: a marker of dtype and device", (1,)),
    "version": Benign("fairseq's transformer: format marker", (1,)),
}


class Respelling(NamedTuple):
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


RENAMES: tuple[Respelling, ...] = (
    Respelling(
        "weight_norm",  # torch.nn.utils.weight_norm ↔ torch.nn.utils.parametrizations.weight_norm: same g, same v
        ("{p}_g", "{p}_v"),
        ("parametrizations.{p}.original0", "parametrizations.{p}.original1"),
    ),
    Respelling(
        "spectral_norm",  # torch.nn.utils.spectral_norm ↔ torch.nn.utils.parametrizations.spectral_norm
        ("{p}_orig", "{p}_u", "{p}_v"),
        ("parametrizations.{p}.original", "parametrizations.{p}.0._u", "parametrizations.{p}.0._v"),
    ),
    Respelling(
        "LayerNorm gamma/beta",  # as TensorFlow named them; transformers renames the same way on loading
        ("gamma", "beta"),
        ("weight", "bias"),
    ),
)


# First segments, below the container and prefix that were chosen, of what a file holds beside a model and no model is
# missed for: whole words, each with who writes it.
NEVER_THE_MODELS: dict[str, str] = {
    "train_state": "torchtitan: the trainer's state at the root of the weights' folder",
    "trainer_state": "transformers' Trainer",
    "averaging_state": "Lightning's WeightAveraging: its counters",
    "dataloader": "torchtitan, torchdata's StatefulDataLoader",
    "lr_scheduler": "torchtitan, torchvision's references",
    "lr_schedulers": "Lightning",
    "scheduler": "fvcore and scripts",
    "optimizer": "nearly all: the optimizer's state",
    "optimizers": "lists of them",
    "optimizer_state": "OpenPCDet",
    "optimizer_states": "Lightning",
    "optimizer_state_dict": "PyTorch's tutorial",
    "optim": "OpenNMT, torchtitan's older folders",
    "scaler": "ultralytics, torchvision's references: the gradient scaler's state",
    "grad_scaler": "detectron2, scripts",
    "amp": "NVIDIA's apex: the state of its loss scalers",
    "rng_state": "scripts: the state of the random number generator",
    "rng_states": "DeepSpeed, Composer",
    "random_rng_state": "DeepSpeed",
    "cuda_rng_state": "Megatron",
    "callbacks": "Lightning",
    "loops": "Lightning",
    "message_hub": "mmengine",
    "criterion": "Lightning modules that keep their loss, with its class weights, as a child",
    "criterions": "the same, several of them",
    "loss": "the same",
    "losses": "the same",
    "loss_fn": "the same",
    "loss_fct": "the same, in transformers' spelling",
    "loss_func": "the same, in fastai's spelling",
    "loss_function": "the same",
    "dino_loss": "DINO, DINOv2: its centre",
    "ibot_loss": "iBOT: its centre",
    "ibot_patch_loss": "DINOv2: its centre",
    "perceptual_loss": "VQGAN and its kin: LPIPS with its VGG",
    "metric": "Lightning modules that keep torchmetrics' state",
    "metrics": "the same",
    "train_metrics": "the same",
    "val_metrics": "the same",
    "valid_metrics": "the same",
    "test_metrics": "the same",
    "train_acc": "Lightning's own examples: torchmetrics' state",
    "val_acc": "the same",
    "test_acc": "the same",
    "aux_classifier": "torchvision's segmentation models: a head for training only",
    "aux1": "torchvision's GoogLeNet: a head for training only",
    "aux2": "torchvision's GoogLeNet: a head for training only",
    "AuxLogits": "torchvision's Inception v3: a head for training only",
    "auxiliary_head": "mmsegmentation, DARTS: a head for training only",
    "aux_head": "BiSeNet, STDC: a head for training only",
    "auxlayer": "PSPNet, PSANet: a head for training only",
}

# A container or prefix with one of these words holds no weights, nor does anything inside it: whole words of a segment
# (`momentum_backbone` is a network), then whole segments.
NOT_WEIGHTS: dict[str, str] = {
    "optimizer": "an optimizer's state",
    "optimizers": "optimizers' states",
    "optim": "an optimizer's state",
    "scheduler": "a scheduler's state",
    "schedulers": "schedulers' states",
    "callbacks": "Lightning: what callbacks keep, averages among them",
    "grad": "gradients",
    "grads": "gradients",
    "gradient": "gradients",
    "gradients": "gradients",
}
_NOT_WEIGHTS_AS_A_WHOLE = frozenset(
    {
        *("opt", "opt_state", "opt_state_dict", "loops", "scaler", "amp", "message_hub", "rng_state"),
        *("hyper_parameters", "moment", "moments", "momentum", "momentum_buffer", "momentum_buffers", "exp_avg"),
        *("exp_avg_sq", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sq", "square_avg", "acc_delta", "adam_m", "adam_v"),
    }
)

# Prefixes that say nothing of what stands below them: one of these may be exchanged for another name.
GENERIC: dict[str, str] = {
    "model": "Lightning, mmengine, timm and countless scripts",
    "net": "Lightning modules, scripts",
    "network": "scripts",
    "backbone": "detectron2, mmdetection, DINO",
    "base_model": "transformers, peft",
    "pytorch_model": "scripts",
    "pl_module": "wrappers around Lightning modules",
    **WRAPPERS,
}

AVERAGED_WORDS = frozenset({"ema", "swa", "avg", "average", "averaged"})


class Swap(NamedTuple):
    """A framework that exchanges the two sets of weights when it saves.

    Attributes:
        source: The framework.
        average: Where the average stands then.
        raw: Where the raw weights stand.
        marks: Dotted paths, any of which tells that it was this framework.
    """

    source: str
    average: str
    raw: str
    marks: tuple[str, ...]

    def is_in(self, root: Any) -> bool:
        """Whether a file was saved so.

        Example:
            >>> SWAPPED[1].is_in({"state_dict": {}, "current_model_state": {}})
            True
        """
        if not (isinstance(root, Mapping) and self.average in root and self.raw in root):
            return False
        return any(_holds(root, mark.split(".")) for mark in self.marks)


def _holds(root: Any, path: list[str]) -> bool:
    for segment in path:
        if not (isinstance(root, Mapping) and segment in root):
            return False
        root = root[segment]
    return True


SWAPPED: tuple[Swap, ...] = (
    Swap(
        "mmengine's EMAHook",
        average="state_dict",
        raw="ema_state_dict",
        marks=("message_hub", "meta.mmengine_version", "meta.dataset_meta", "param_schedulers", "ema_state_dict.steps"),
    ),
    Swap(
        "Lightning's WeightAveraging",
        average="state_dict",
        raw="current_model_state",
        marks=("current_model_state",),
    ),
)

# Counters that an average keeps beside it, as long as it was never updated: then it is still what training began with.
UNTOUCHED: dict[str, str] = {
    "n_averaged": "torch.optim.swa_utils.AveragedModel, Lightning's WeightAveraging",
    "num_updates": "latent diffusion's LitEma",
    "initted": "ema_pytorch",
    "steps": "mmengine's averaged models",
    "updates": "ultralytics, YOLOX",
}


# What a container of weights is called where it holds a model and nobody says which. For `read_state_dict`, which has
# no model to tell: names of roles (generator, actor, student) are not among them.
USUAL_CONTAINERS = frozenset(
    {
        *("state_dict", "state_dicts", "model_state_dict", "net_state_dict", "network_state_dict", "weights", "weight"),
        *("model", "models", "model_state", "model_states", "model_dict", "model_weights", "model_params", "net"),
        *("net_dict", "network", "network_weights", "params", "param", "parameters", "state", "base_model"),
        *("pytorch_model", "bare_model", *WRAPPERS),
    }
)


class Standing(IntEnum):
    """What a path of container names says of the weights there. It proves nothing but what they are not."""

    AVERAGE = 0
    PLAIN = 1
    NOT_WEIGHTS = 2


_WORD = re.compile(r"[_\W]+")
_RAW_WORDS = frozenset({"online", "raw"})


@lru_cache(maxsize=4096)
def words_of(segment: str) -> tuple[str, ...]:
    """The words of a container's name.

    Example:
        >>> words_of("ema_0.9999"), words_of("Q-net_target")
        (('ema', '0', '9999'), ('q', 'net', 'target'))
    """
    return tuple(word for word in _WORD.split(segment.lower()) if word)


def container_standing(*segments: str) -> Standing:
    """What the names on the way to some weights say of them.

    Example:
        >>> container_standing("state_dict_ema"), container_standing("teacher")
        (<Standing.AVERAGE: 0>, <Standing.PLAIN: 1>)
        >>> container_standing("ema", "online_model")  # inside an average's own container, the raw weights
        <Standing.PLAIN: 1>
    """
    standing = Standing.PLAIN
    for segment in segments:
        words = words_of(segment)
        if segment.lower() in _NOT_WEIGHTS_AS_A_WHOLE or not NOT_WEIGHTS.keys().isdisjoint(words):
            return Standing.NOT_WEIGHTS
        if not AVERAGED_WORDS.isdisjoint(words):
            standing = Standing.AVERAGE
        elif not _RAW_WORDS.isdisjoint(words):
            standing = Standing.PLAIN
    return standing
