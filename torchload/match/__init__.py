"""Stages 2 and 3: find the sub-tree of a checkpoint that is a model's state dict, and reconcile the two sets of names.

A candidate is a container of the tree (`state_dict`, `model.ema`, …) or a dotted prefix inside one (`backbone.`), which
is the same thing one level down. Candidates are judged by how well their names and shapes fit the model; what they are
called says at most which of two sets of one network is meant.

`containers` lists the containers of a tree, `candidates` judges them and the prefixes inside them against a model, with
`leftovers` saying what else is there, `company` what each means beside the others; `choice` takes one, or asks.
`selection` has what goes in and what comes out. `state_dicts` chooses where there is no model.

`tables` knows the words of the trade (container names, old and new names of the same tensor); `names` reconciles
two sets of names, `rename` does what the caller says. These are pure functions over strings and shapes: no I/O, no
torch modules. The few values that certainty needs (`values`) are read by a function that the caller hands in.
"""

from torchload.match.choice import select
from torchload.match.containers import Leaf, Place, as_mapping, find_places
from torchload.match.selection import Selection, Wanted

__all__ = [
    "Leaf",
    "Place",
    "Selection",
    "Wanted",
    "as_mapping",
    "find_places",
    "select",
]
