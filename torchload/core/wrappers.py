"""Wrapper modules: the words that they put into names, in files and in models, and the classes that they are.

A row has all there is to say of one wrapper, so that none of its places can be forgotten.
"""

from __future__ import annotations

__all__ = ["WRAPPERS", "WRAPPER_CLASSES", "WRAPPER_STATE"]

_PTD = "torch.distributed"
_CHECKPOINT_WRAPPER = f"{_PTD}.algorithms._checkpoint.checkpoint_wrapper"

# Segment of names → (who leaves it, qualified names of the classes that hold what they wrap under it). The classes are
# named, not imported: most of them are never there. Where none is named, the wrapper is seen in files alone.
_TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "module": (
        "DataParallel, DistributedDataParallel, AveragedModel, DeepSpeed, timm's ModelEmaV2",
        (
            "torch.nn.parallel.data_parallel.DataParallel",
            "torch.nn.parallel.distributed.DistributedDataParallel",
            "torch.optim.swa_utils.AveragedModel",
            "deepspeed.runtime.engine.DeepSpeedEngine",
            "timm.utils.model_ema.ModelEmaV2",
            "timm.utils.model_ema.ModelEmaV3",
        ),
    ),
    "_orig_mod": ("torch.compile", ("torch._dynamo.eval_frame.OptimizedModule",)),
    "_fsdp_wrapped_module": (
        "FullyShardedDataParallel",
        (f"{_PTD}.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",),
    ),
    "_fpw_module": ("FullyShardedDataParallel before torch 1.13, fairscale", ()),
    "_checkpoint_wrapped_module": (
        "torch's activation checkpointing",
        (f"{_CHECKPOINT_WRAPPER}.CheckpointWrapper", f"{_CHECKPOINT_WRAPPER}.OffloadWrapper"),
    ),
    "_forward_module": (
        "Lightning strategies, Fabric",
        ("lightning.fabric.wrappers._FabricModule", "lightning_fabric.wrappers._FabricModule"),
    ),
    "_original_module": ("Fabric, beside _forward_module", ()),
    "_module": ("Opacus GradSampleModule", ("opacus.grad_sample.grad_sample_module.GradSampleModule",)),
    "_model": ("nerfstudio pipelines", ()),
}

# Segments that a wrapper module puts into the names of what it wraps.
WRAPPERS: dict[str, str] = {segment: source for segment, (source, _) in _TABLE.items()}

# Qualified class name → the attribute that holds what it wraps.
WRAPPER_CLASSES: dict[str, str] = {cls: segment for segment, (_, classes) in _TABLE.items() for cls in classes}

# Tensors that such a wrapper keeps beside what it wraps: not the model's, so their presence or absence is no error.
WRAPPER_STATE: dict[str, str] = {"n_averaged": "torch.optim.swa_utils.AveragedModel"}
