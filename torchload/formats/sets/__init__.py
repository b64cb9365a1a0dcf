"""Checkpoints in several files: folders, shards, distributed checkpoints, DeepSpeed's; how their parts fit together."""
