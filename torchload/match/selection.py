"""What choosing is told of a model, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torchload.core.checkpoint import Shape, TensorEntry
from torchload.match.containers import Leaf, shape_of
from torchload.match.globs import Globs
from torchload.match.names import Alignment
from torchload.match.paths import joined, last
from torchload.match.tables import BENIGN_MISSING, Standing

if TYPE_CHECKING:
    from torchload.core.sharing import View

__all__ = ["Selection", "Wanted", "is_bare", "mismatched"]


_NO_GLOBS = Globs()
_NONE: Mapping[str, Any] = MappingProxyType({})
_EVERY_LAYERS = frozenset(
    {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "weight_g", "weight_v"}
)


def is_bare(name: str) -> bool:
    """Whether a name says nothing of what it belongs to.

    Example:
        >>> is_bare("2.0.weight"), is_bare("fc.weight")
        (True, False)
    """
    *above, leaf = name.split(".")
    return leaf in _EVERY_LAYERS and all(segment.isdecimal() for segment in above)


def mismatched(
    shapes: Mapping[str, Shape | None], pairs: Mapping[str, str], leaves: Mapping[str, Leaf]
) -> dict[str, tuple[Shape, Shape]]:
    """Model name → (shape in the file, shape in the model) where these differ; one element will do for a scalar."""
    found: dict[str, tuple[Shape, Shape]] = {}
    for name, shape in shapes.items():
        if shape is not None and (source := pairs.get(name)) is not None:
            leaf = leaves[source]
            in_file = leaf.shape if type(leaf) is TensorEntry else shape_of(leaf)
            if in_file not in (shape, None) and not (shape == () and in_file == (1,)):
                found[name] = (in_file, shape)
    return found


class Wanted(NamedTuple):
    """A model, as far as choosing is concerned.

    Attributes:
        shapes: Every name of the model's state dict → its shape, or ``None`` where any value will do (extra state, lazy
            parameters).
        ties: Name → representative of the names that share its storage; names that share none are absent.
        skipped: Names that the caller wants left alone.
        optional: Names that may stay as they are without a word (state that only torch's own hooks fill).
        buffers: Names of buffers, as against parameters.
        whole: Last segments of the names under which modules of the model save values of any kind, not only tensors.
        transient: Non-persistent buffers → shape. No checkpoint need have them; older ones, and TorchScript, do.
        skip: What `skipped` was derived from, for the checkpoint's names.
        views: Names of tensors that lie in the memory of others → those others: what fills one of these fills them.
    """

    shapes: Mapping[str, Shape | None]
    ties: Mapping[str, str] = _NONE
    skipped: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    transient: Mapping[str, Shape | None] = _NONE
    skip: Globs = _NO_GLOBS
    views: Mapping[str, Sequence[View]] = _NONE

    def may_lack(self, name: str) -> bool:
        """Whether it is known to be harmless if nothing fills a name."""
        return name in self.buffers and (row := BENIGN_MISSING.get(last(name))) is not None and row.covers(None)

    def lacks(self, pairs: Mapping[str, str], spare: Iterable[str] = ()) -> tuple[list[str], list[str]]:
        """What is left unfilled by `pairs`: the names that matter, and those that are known to be harmless."""
        filled = {self.ties.get(name, name) for name in pairs}
        passed = {*spare, *self.skipped, *self.optional}
        lacking = [
            name
            for name in self.shapes
            if name not in pairs and name not in passed and self.ties.get(name, name) not in filled
        ]
        harmless = {name: None for name in lacking if name in self.buffers and self.may_lack(name)}
        return [name for name in lacking if name not in harmless], list(harmless)

    def seen(self, pairs: dict[str, str], leaves: dict[str, Leaf]) -> tuple[dict[str, str], dict[str, Leaf]]:
        """Pairs and leaves with those of views, which follow from what the tensors hold that they are views of.

        A name for which the file has a tensor of its own keeps that. One that it has as another name of the same
        tensor, as safetensors does for what shares memory, says nothing of how the one lies in the other; the model
        does.
        """
        shown = dict(pairs), dict(leaves)
        for name, view in ((name, view) for name, views in self.views.items() for view in views):
            source, entry = pairs.get(name), leaves.get(pairs.get(view.name, ""))
            is_open = source is None or (leaves[source] is entry and shape_of(entry) != view.part.shape)
            if is_open and isinstance(entry, TensorEntry) and (part := view.seen_in(entry)) is not None:
                shown[0][name] = source or f"{pairs[view.name]} (as {name})"
                shown[1][shown[0][name]] = part
        return shown

    def skips(self, name: str) -> bool:
        """Whether the caller wants a name, of either side, left alone."""
        return self.skip.match_in_file(name)

    @property
    def is_bare(self) -> bool:
        """Whether its names say nothing of what it is: numbers, and what every layer calls its tensors.

        Example:
            >>> Wanted({"0.weight": (2, 2), "2.bias": (2,)}).is_bare, Wanted({"fc.weight": (2, 2)}).is_bare
            (True, False)
        """
        return all(is_bare(name) for name in self.shapes)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Selection:
    """The chosen sub-tree and how its names correspond to the model's. Who knows better makes another (`replace`).

    Attributes:
        key: Path of the container in the file, dotted; empty for the root.
        prefix: Dotted prefix inside that container; empty if the whole of it is meant.
        segments: The names on the way to the container and through the prefix.
        container: The container itself.
        leaves: Every name inside the container (after `rename`) → what it holds.
        pairs: Model name → name in `leaves`.
        missing: Model names that nothing fills.
        mismatched: Model name → (shape in the file, shape in the model).
        unexpected: Names below the prefix without a place in the model, which no table and no value explains.
        outside: Names of the container that are not below the prefix.
        ignored: Differences known to be harmless: names of either side.
        constants: Of the ignored names of the file, those of constants that the model computes.
        rivals: Paths of other candidates that would have fitted as well.
        notes: What is worth knowing of how it was chosen.
        crossed: Whether names were taken out of a container inside this one, which is a candidate of its own.
        skipped: Names that the caller wanted left alone: the model's, then those that only the file has.
        transient: Non-persistent buffer of the model → name in `leaves`, where the file has it all the same.
        claimed: Names without a place in the model that a module which loads itself is offered all the same.
        added: Prefix that all of the model's names have and the file's lack.
        original: Name in `leaves` → name in the file, where `rename` changed it.
        globs: The patterns of the caller's `skip` that match something.
        attempt: Tells whether a `skip` and a `rename` beside what the caller gave would make the file fit.
        aliases: Of `mismatched`, names that the file has only as other names of a tensor → what that is called there.
        alignment: The matcher's account.
        standing: What the path says of these weights.
    """

    key: str
    segments: tuple[str, ...]
    container: Mapping[Any, Any]
    leaves: dict[str, Leaf]
    prefix: str = ""
    pairs: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    alignment: Alignment = field(default_factory=Alignment)
    constants: list[str] = field(default_factory=list)
    standing: Standing = Standing.PLAIN
    crossed: bool = False
    skipped: list[str] = field(default_factory=list)
    transient: dict[str, str] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()
    added: str = ""
    original: Mapping[str, str] = field(default_factory=dict)
    rivals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    globs: tuple[str, ...] = ()
    attempt: Callable[[Sequence[str], Mapping[str, str] | None], bool] | None = None

    @property
    def path(self) -> str:
        """Container and prefix as one dotted path."""
        return joined(self.key, self.prefix)

    @property
    def filled(self) -> dict[str, Leaf]:
        """Model name → what the file holds for it."""
        return {name: self.leaves[source] for name, source in self.pairs.items()}

    @property
    def averaged(self) -> bool:
        """Whether these are averaged (EMA, SWA) weights."""
        return self.standing is Standing.AVERAGE

    @property
    def fills(self) -> bool:
        """Whether the model is filled wholly, with the right shapes."""
        return not self.missing and not self.mismatched

    @property
    def fits(self) -> bool:
        """Whether a strict load may take it."""
        return self.fills and not self.unexpected and not self.alignment.ambiguous

    @property
    def is_exact(self) -> bool:
        """Whether every name is the model's to the letter."""
        return not (self.prefix or self.added) and all(name == source for name, source in self.pairs.items())

    @property
    def used_up(self) -> bool:
        """Whether nothing of the container is left over."""
        return not (self.unexpected or self.outside or self.mismatched)
