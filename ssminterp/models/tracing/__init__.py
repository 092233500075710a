"""nnsight as a way in: what a running trace asks of the model, and the envoys that users write.

Only `root.py` and `envoys.py` need nnsight; everything else works without it.
"""
