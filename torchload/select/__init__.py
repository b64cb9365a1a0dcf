"""Find the sub-tree of a checkpoint that is a model's state dict.

A candidate is a container of the tree (`state_dict`, `model.ema`, …) or a dotted prefix inside one (`backbone.`), which
is the same thing one level down. Candidates are judged by how well their names and shapes fit the model; what they are
called decides only between candidates that fit equally.

`places` lists the containers of a tree, `candidates` judges them and the prefixes inside them against a model, `choice`
takes one. `selection` has what goes in and what comes out.
"""

from torchload.select.choice import Candidate, select, standing_in_company
from torchload.select.places import Leaf, Place, as_mapping, find_places
from torchload.select.selection import Selection, Wanted

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
