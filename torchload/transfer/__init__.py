"""Bytes move from file to place: checked copies are carried out at the speed of the machine."""

from torchload.transfer.arena import allocate
from torchload.transfer.cooperative import Replicas, read_together
from torchload.transfer.engine import run
from torchload.transfer.mapped import can_map, map_entries, map_entry, read_entries
from torchload.transfer.memory import replace_pages

__all__ = [
    "Replicas",
    "allocate",
    "can_map",
    "map_entries",
    "map_entry",
    "read_entries",
    "read_together",
    "replace_pages",
    "run",
]
