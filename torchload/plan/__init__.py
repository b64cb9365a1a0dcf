"""Stage 4: what goes where, checked before a byte moves; the words of its one error; and carrying it out.

`planner` makes the `plan`; `hooks` and `custom_loaders` let modules have their say; `execute` carries the plan out, or
takes it back; `compare` and `twins` tell whether a model holds what a file holds; `report` is the account.
"""
