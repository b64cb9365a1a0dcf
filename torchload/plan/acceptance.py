"""Whether what was loaded is accepted: compared with the file, and by the model's own post-hooks."""

from __future__ import annotations

from dataclasses import replace

from torchload.core.text import listing
from torchload.errors import IncompatibleCheckpointError
from torchload.match import Selection
from torchload.model.target import Target
from torchload.plan.execute import compare_landed
from torchload.plan.options import Options
from torchload.plan.plan import LoadPlan
from torchload.transfer import Replicas

__all__ = ["Acceptance", "after_post_hooks"]


class Acceptance:
    """Asked once the model shows what was loaded; until then it may be taken back.

    Attributes:
        selection: What was loaded, as the hooks see it.
    """

    def __init__(
        self, target: Target, selection: Selection, plan: LoadPlan, options: Options, replicas: Replicas
    ) -> None:
        self.selection = selection
        self._target, self._plan, self._options, self._replicas = target, plan, options, replicas
        if target.post_hooks:
            from torchload.plan import hooks  # noqa: F401 - later, an import that fails would find the model changed

    def ask(self) -> None:
        """Compare, call the hooks, and hear that no other rank has failed.

        Raises:
            TorchLoadError: Something did not arrive as it was read.
            IncompatibleCheckpointError: Under `strict` the hooks leave names that are missing or unexpected.
        """
        if self._options.verify:
            compare_landed(self._plan)
        if self._target.post_hooks:
            self._ask_hooks()
        self._replicas.meet(last=True)

    def _ask_hooks(self) -> None:
        self.selection = after_post_hooks(self._target, self.selection)
        missing, unexpected = self.selection.missing, self.selection.unexpected
        if not (self._options.strict and (missing or unexpected)):
            return
        if self._plan.keeps_old:
            from torchload.plan.explain import incompatible

            raise incompatible(self._target, self.selection, [])
        raise IncompatibleCheckpointError(
            "The checkpoint was loaded, but a load-state-dict post-hook of the model calls names missing or "
            f"unexpected: {listing([*missing, *unexpected])}. With atomic=True the model would be as it was.",
            missing_keys=missing,
            unexpected_keys=unexpected,
        )


def after_post_hooks(target: Target, selection: Selection) -> Selection:
    """What is missing and unexpected once the model's load-state-dict post-hooks have had their say."""
    from torchload.plan import hooks

    spelled = {selection.alignment.leftover.get(name, name): name for name in selection.unexpected}
    keys = hooks.run_post_hooks(target, selection.missing, list(spelled))
    unexpected = [spelled.get(name, name) for name in keys.unexpected_keys]
    return replace(selection, missing=list(keys.missing_keys), unexpected=unexpected)
