"""What a sub-tree holds beyond the model's own names, and what each of these names is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torchload.core.checkpoint import Shape
from torchload.core.wrappers import WRAPPERS
from torchload.match.containers import Leaf
from torchload.match.names import Alignment, Node
from torchload.match.paths import last
from torchload.match.selection import Wanted
from torchload.match.tables import (
    AVERAGED_WORDS,
    BENIGN_UNEXPECTED,
    NEVER_THE_MODELS,
    UNTOUCHED,
    words_of,
)

__all__ = ["Leftovers"]

_AVERAGES_OWN = frozenset({*UNTOUCHED, "decay", "step"})  # what averages keep beside the weights
_STRIPPED = 3  # segments: an average may be one of a part of the model


class Leftovers:
    """The names that no tensor of the model was paired with, sorted by what they are.

    The first attributes say what was matched; the lists are empty before `sorted`.
    """

    def __init__(
        self,
        leaves: Mapping[str, Leaf],
        node: Node,
        prefix: str,
        alignment: Alignment,
        wanted: Wanted,
        is_mask: Callable[[Leaf], bool],
        original: Mapping[str, str],
    ) -> None:
        self.leaves, self.node, self.prefix, self.alignment = leaves, node, prefix, alignment
        self.wanted, self.is_mask, self.original = wanted, is_mask, original
        self.unexpected: list[str] = []
        self.outside: list[str] = []
        self.ignored: list[str] = []
        self.skipped: list[str] = []
        self.constants: list[str] = []
        self.transient: dict[str, str] = {}
        self._spelled: dict[str, Shape | None] | None = None

    def sorted(self) -> Leftovers:
        """Look at every name."""
        used = set(self.alignment.pairs.values())
        inside = set(self.node.names.values())
        wrapper_state = set(self.alignment.wrapper_state)
        offset = len(self.prefix) + 1 if self.prefix else 0
        for name, leaf in self.leaves.items():
            if name in used:
                continue
            here = self.alignment.leftover.get(name, name)
            if any(map(self.wanted.skips, (here, name, self.original.get(name, name)))):
                if here not in self.wanted.skipped:
                    self.skipped.append(name)
            elif name not in inside:
                self.outside.append(name)
            elif name in wrapper_state:
                self.ignored.append(name)
            else:
                self._sort(name, here, name[offset:], leaf)
        return self

    def _sort(self, name: str, here: str, local: str, leaf: Leaf) -> None:
        shape = getattr(leaf, "shape", None)
        if here in self.wanted.transient and self.wanted.transient[here] == shape:
            self.transient[here] = name
            self.ignored.append(name)
        elif (row := BENIGN_UNEXPECTED.get(last(name))) and row.covers(shape):
            self.ignored.append(name)
            self.constants.append(name)
        elif self._is_nobodys(local, shape, leaf):
            self.ignored.append(name)
        else:
            self.unexpected.append(name)

    def _is_nobodys(self, local: str, shape: Shape | None, leaf: Leaf) -> bool:
        """Whether no model has such a tensor: what stands beside models, an average or its counter, a mask."""
        if _first(local) in NEVER_THE_MODELS or (local in UNTOUCHED and shape in ((), (1,))):
            return True
        if self._is_average(local, shape):
            return True
        return self.is_mask(leaf)

    def _is_average(self, local: str, shape: Shape | None) -> bool:
        """Whether a name, un-mangled, is one of the model's, with the model's shape, behind the mark of an average."""
        label, _, below = local.partition(".")
        words = words_of(label)
        if AVERAGED_WORDS.isdisjoint(words):
            return False
        while _first(below) in WRAPPERS:
            below = below.partition(".")[2]
        if below in _AVERAGES_OWN:
            return True
        if self._spelled is None:
            self._spelled = _spellings(self.wanted.shapes)
        # As a module beside the model, or, where an average is kept in buffers, without dots or with '_' for them.
        spelled = below or "_".join(label.split("_")[1:])
        return spelled in self._spelled and self._spelled[spelled] == shape


def _first(name: str) -> str:
    return name.partition(".")[0]


def _spellings(shapes: Mapping[str, Shape | None]) -> dict[str, Shape | None]:
    """Every way in which an average may spell the model's names → the shape; the model's own parts may be averaged."""
    found: dict[str, Shape | None] = {}
    for name, shape in shapes.items():
        rest = name
        for _ in range(_STRIPPED):
            for spelled in (rest, rest.replace(".", "_"), rest.replace(".", "")):
                found.setdefault(spelled, shape)
            _, _, rest = rest.partition(".")
            if not rest:
                break
    return found
