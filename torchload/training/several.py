"""Which of a file's states is whose, where there are several optimizers or schedulers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice, permutations
from operator import getitem
from typing import Any

from torchload.core.text import listed, plural
from torchload.training.state import Found

__all__ = ["NotPairedError", "as_list", "pairs_of"]

_MOST = 8  # of them that are tried in every order


class NotPairedError(Exception):
    """It can't be told which state is whose; the message is a sentence about it."""


def as_list(given: Any) -> list[Any]:
    """One thing, or several in a list or under names, as a list."""
    if given is None:
        return []
    if isinstance(given, Mapping):
        return list(given.values())
    return list(given) if isinstance(given, (list, tuple)) else [given]


def pairs_of(
    what: str,
    given: Any,
    found: Sequence[Found],
    fits: Callable[[Any, Found], bool],
    names: Callable[[Any, str], bool],
) -> list[tuple[Any, Found]]:
    """Pair what was given, one or several in a list or under names, with the file's states.

    By name where both sides have names, and then some of the file's will do; by position where neither has. Names
    that only the file has say nothing of positions: there the states must fit in one way only, or belong to parts
    of the model that are called like them.

    Raises:
        NotPairedError: There are more or less of them, or it can't be told.
    """
    all_given = as_list(given)
    by_name = {state.name: state for state in found if state.name is not None}
    if by_name and isinstance(given, Mapping) and given.keys() <= by_name.keys():
        return [(one, by_name[name]) for name, one in given.items()]
    names_of_file = listed([*map(repr, by_name)])
    if len(all_given) != len(found):
        raise NotPairedError(
            f"the file holds the states of {plural(len(found), what)}, {len(all_given)} "
            f"{'was' if len(all_given) == 1 else 'were'} given"
            + (f"; to choose by name ({names_of_file}): {what}={{{next(iter(by_name))!r}: …}}" if by_name else "")
        )
    if len(all_given) == 1 or not by_name:
        return list(zip(all_given, found))
    if isinstance(given, Mapping):
        raise NotPairedError(f"the file's {what}s are {names_of_file}, those given {listed([*map(repr, given)])}")
    if len(all_given) <= _MOST:
        fitting = [[fits(one, state) for state in found] for one in all_given]
        alike = [
            [fit and names(one, str(state.name)) for fit, state in zip(row, found)]
            for row, one in zip(fitting, all_given)
        ]
        for orders in map(_orders, (fitting, alike)):
            if len(orders) == 1:
                return [(one, found[index]) for one, index in zip(all_given, orders[0])]
        if not _orders(fitting):
            return list(zip(all_given, found))  # what keeps them from fitting is told of each
    some = ", ".join(f"{name!r}: …" for name in by_name)
    raise NotPairedError(
        f"the file names its {what}s, and it can't be told which of those given is which: pass {what}={{{some}}}"
    )


def _orders(fits: Sequence[Sequence[bool]]) -> list[tuple[int, ...]]:
    """The ways to give each row a column of its own that fits: none, the only one, or the first two."""
    orders = permutations(range(len(fits)))
    return list(islice((order for order in orders if all(map(getitem, fits, order))), 2))
