"""Names: pure functions over strings and shapes. No I/O, no torch modules.

`tables` knows the words of the trade (wrapper segments, container names, old and new names of the same tensor); `match`
reconciles two sets of names.
"""
