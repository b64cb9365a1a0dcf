"""The vocabulary that all stages share: where bytes come from, what a checkpoint holds, what has to be copied.

It imports nothing of the rest but the errors.
"""
