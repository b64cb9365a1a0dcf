"""Laws of name matching: wrapping never changes what a name means, and nothing unrelated ever matches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from torchload.core.wrappers import WRAPPERS
from torchload.match.names import align, tree_of

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


@given(trees)
@settings(max_examples=200)
def test_an_unrelated_model_never_matches(tree):
    names = list(flatten(tree))
    others = [f"{name}_other" for name in names]  # the same modules, no tensor in common
    found = align(tree_of(others), tree_of(names))
    assert found.pairs == {}
    assert set(found.ambiguous) == set()


@given(trees, st.data())
@settings(max_examples=400)
def test_names_that_are_the_models_to_the_letter_are_never_taken_for_others(tree, data):
    names = list(flatten(tree))
    kept = data.draw(st.lists(st.sampled_from(names), unique=True))
    assert align(tree_of(kept), tree_of(names)).pairs == {name: name for name in kept}
    assert align(tree_of(names), tree_of(kept)).pairs == {name: name for name in kept}


@given(tree_and_two_wrappings())
@settings(max_examples=200)
def test_no_name_is_used_twice_whatever_the_two_sides(case):
    plain, first, _ = case
    pairs = align(tree_of([*first, *plain]), tree_of(plain)).pairs
    assert len(set(pairs.values())) == len(pairs)
