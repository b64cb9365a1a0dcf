"""How to take back what was changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Undo"]


@dataclass(slots=True)
class Undo:
    """Steps that take back what was changed, each prepared before the change.

    Attributes:
        steps: The steps, oldest first. Each may be called more than once, and before what it takes back was done.

    Example:
        >>> values, undo = [1], Undo()
        >>> undo.steps.append(lambda before=list(values): values.__setitem__(slice(None), before))
        >>> values.append(2)
        >>> undo.roll_back(), values
        ([], [1])
    """

    steps: list[Callable[[], object]] = field(default_factory=list)

    def roll_back(self) -> list[BaseException]:
        """Take everything back, newest first.

        A step that fails does not keep the others from being taken; one that is interrupted is taken again.

        Returns:
            What was raised meanwhile, an interrupt first.
        """
        failures: list[BaseException] = []
        interrupts: list[BaseException] = []
        while self.steps:
            try:
                self.steps[-1]()
            except Exception as error:  # noqa: BLE001 - a module's own code
                failures.append(error)
            except BaseException as error:  # noqa: BLE001 - left to the caller
                interrupts.append(error)
                if len(interrupts) < _MOST_INTERRUPTS:
                    continue
            self.steps.pop()
        return interrupts + failures


_MOST_INTERRUPTS = 10  # then somebody means it
