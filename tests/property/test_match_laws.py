"""Laws of name matching: wrapping never changes what a name means, and nothing unrelated ever matches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from torchload.keys.match import align, tree_of
from torchload.keys.tables import WRAPPERS

# Labels that collide with wrappers' own on purpose: a model may really have children of these names.
labels = st.sampled_from(["a", "b", "module", "_orig_mod", "0", "weight", "n_averaged", "submodule", "module_"])
wrappers = st.sampled_from(sorted(WRAPPERS))
trees = st.recursive(
    st.just(None), lambda inner: st.dictionaries(labels, inner, min_size=1, max_size=4), max_leaves=14
).filter(lambda tree: tree is not None)


def flatten(tree, prefix=""):
    for label, below in tree.items():
        if below is None:
            yield prefix + label
        else:
            yield from flatten(below, f"{prefix}{label}.")


@st.composite
def wrapped(draw, tree, path=()):
    """(names of the wrapped tree, aligned with flatten(tree)): any module may sit in any number of wrappers."""
    names = []
    for label, below in tree.items():
        if below is None:
            names.append((label,))
        else:
            names += [(label, *rest) for rest in draw(wrapped(below))]
    return [(*draw_layers, *name) for draw_layers in [tuple(draw(st.lists(wrappers, max_size=2)))] for name in names]


@st.composite
def tree_and_two_wrappings(draw):
    tree = draw(trees)
    return list(flatten(tree)), *([".".join(name) for name in draw(wrapped(tree))] for _ in range(2))


@given(tree_and_two_wrappings())
@settings(max_examples=600, deadline=None)
def test_any_wrapping_on_either_side_reconciles_to_the_identity(case):
    plain, first, second = case
    assert align(tree_of(first), tree_of(plain)).pairs == dict(zip(plain, first))
    assert align(tree_of(plain), tree_of(second)).pairs == dict(zip(second, plain))
    assert align(tree_of(first), tree_of(second)).pairs == dict(zip(second, first))
