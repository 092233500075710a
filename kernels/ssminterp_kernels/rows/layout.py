"""How the compiled loops cut channels; without numba, which takes a moment to import."""

LANES = 16
"""Channels of a block: float32 numbers of a vector."""

GROUP = 8
"""Blocks of channels that a task of `forked_rows` takes."""
