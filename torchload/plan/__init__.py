"""Stage 4: what goes where, checked before a byte moves; the words of its one error; and carrying it out.

`plan` pairs places and sources, `hooks` knows modules that load themselves, `execute` carries the plan out and takes it
back, `compare` and `twins` tell whether a model holds what a file holds, `report` is the account.
"""
