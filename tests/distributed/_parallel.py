"""Sharded tensors and FSDP2, wherever this torch keeps them."""

from __future__ import annotations

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
except ImportError:  # before torch 2.5
    from torch.distributed._tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import fully_shard

__all__ = ["DTensor", "Partial", "Replicate", "Shard", "distribute_tensor", "fully_shard"]
