"""nnsight as a way in: what a running trace asks of the model, and the envoys that users write.

Only `envoys.py` and what it imports need nnsight; everything else works without it.
"""
