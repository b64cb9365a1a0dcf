"""Stages 2 and 3: find the sub-tree of a checkpoint that is a model's state dict, and reconcile the two sets of names.

A candidate is a container of the tree (`state_dict`, `model.ema`, …) or a dotted prefix inside one (`backbone.`), which
is the same thing one level down. Candidates are judged by how well their names and shapes fit the model; what they are
called decides only between candidates that fit equally.

`containers` lists the containers of a tree, `candidates` judges them and the prefixes inside them against a model,
`choice` takes one. `selection` has what goes in and what comes out. `state_dicts` chooses where there is no model.

`tables` knows the words of the trade (container names, old and new names of the same tensor); `names` reconciles
two sets of names, `rename` does what the caller says. These are pure functions over strings and shapes: no I/O, no
torch modules.
"""

from torchload.match.choice import Candidate, select, standing_in_company
from torchload.match.containers import Leaf, Place, as_mapping, find_places
from torchload.match.selection import Selection, Wanted

__all__ = [
    "Candidate",
    "Leaf",
    "Place",
    "Selection",
    "Wanted",
    "as_mapping",
    "find_places",
    "select",
    "standing_in_company",
]
