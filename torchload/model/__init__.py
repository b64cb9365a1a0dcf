"""The model: the places it has for data, on which devices, in how many parts, under which wrappers."""
