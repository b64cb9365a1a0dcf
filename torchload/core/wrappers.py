"""The words of wrapper modules, on names in files and in models, each with where it comes from."""

from __future__ import annotations

__all__ = ["WRAPPERS", "WRAPPER_STATE"]

# Segments that a wrapper module puts into the names of what it wraps.
WRAPPERS: dict[str, str] = {
    "module": "DataParallel, DistributedDataParallel, AveragedModel, DeepSpeed, timm's ModelEmaV2",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_fpw_module": "FullyShardedDataParallel before torch 1.13, fairscale",
    "_checkpoint_wrapped_module": "torch's activation checkpointing",
    "_forward_module": "Lightning strategies, Fabric",
    "_original_module": "Fabric, beside _forward_module",
    "_module": "Opacus GradSampleModule",
    "_model": "nerfstudio pipelines",
}

# Tensors that such a wrapper keeps beside what it wraps: not the model's, so their presence or absence is no error.
WRAPPER_STATE: dict[str, str] = {"n_averaged": "torch.optim.swa_utils.AveragedModel"}
