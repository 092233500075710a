"""Scans for state space models that can record, edit and differentiate their hidden states, and the conv before them.

This package knows torch, numba and triton and nothing of models. One folder per operator; each holds its
public function and the paths behind it.
"""
