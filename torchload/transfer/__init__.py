"""Bytes move from file to place: checked copies are carried out at the speed of the machine."""

from torchload.transfer.arena import allocate
from torchload.transfer.checks import not_seen_equal, same_data, verify_extents
from torchload.transfer.checksums import has_checksum, is_summed_in_place
from torchload.transfer.cooperative import Replicas, read_together
from torchload.transfer.engine import run
from torchload.transfer.mapped import can_map, map_entries, map_entry, read_entries
from torchload.transfer.memory import replace_pages

__all__ = [
    "Replicas",
    "allocate",
    "can_map",
    "has_checksum",
    "is_summed_in_place",
    "map_entries",
    "map_entry",
    "not_seen_equal",
    "read_entries",
    "read_together",
    "replace_pages",
    "run",
    "same_data",
    "verify_extents",
]
