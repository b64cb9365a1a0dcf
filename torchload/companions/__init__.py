"""What closes the loop around `smart_load`: look into a file, read, compare, save, and go on training.

Each public function is a module of its own on the same stages: `contents`, `reading`, `verification`, `saving`,
`resuming`; the others are what they share.
"""
