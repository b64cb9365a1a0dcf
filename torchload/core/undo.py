"""How to take back what was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["Undo"]


class Undo:
    """Steps that take back what was changed, each prepared before the change.

    Attributes:
        steps: The steps, oldest first. Each may be called before what it takes back was done.

    Example:
        >>> values, undo = [1], Undo()
        >>> undo.steps.append(lambda before=list(values): values.__setitem__(slice(None), before))
        >>> values.append(2)
        >>> undo.roll_back(), values
        ([], [1])
    """

    def __init__(self, steps: Iterable[Callable[[], object]] = ()) -> None:
        self.steps = list(steps)

    def roll_back(self) -> list[BaseException]:
        """Take everything back, newest first; a step that fails does not keep the others from being taken.

        Returns:
            What was raised meanwhile, interrupts first.
        """
        failures: list[BaseException] = []
        while self.steps:
            try:
                self.steps.pop()()
            except BaseException as error:  # noqa: BLE001 - a module's own code, or an interrupt
                failures.append(error)
        return sorted(failures, key=lambda failure: isinstance(failure, Exception))
