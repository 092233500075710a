"""Which implementation an operator takes for given tensors."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None

Backend: TypeAlias = Literal["auto", "torch", "triton"]
_BACKENDS = get_args(Backend)


def choose_backend(x: Tensor, backend: Backend = "auto") -> Literal["torch", "triton"]:
    """The backend that the operators which have a Triton kernel and a torch formula take for x.

    "auto" is "triton" on CUDA except for float64, "torch" elsewhere. Raises ValueError for an unknown backend and for
    one that cannot take x.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
    if backend == "triton":
        check_triton_suits(x)
    if backend == "auto":
        return "triton" if takes_triton(x) else "torch"
    return backend


def takes_triton(x: Tensor) -> bool:
    """Whether "auto" means Triton for x."""
    return x.device.type == "cuda" and x.dtype != torch.float64 and TRITON_IS_INSTALLED


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """A context in which x's GPU is the current one: Triton launches there, wherever the pointers lead."""
    # Compiled graphs have guards of their own around what runs on each device.
    if torch.compiler.is_compiling() or x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def check_triton_suits(x: Tensor) -> None:
    """Raises ValueError, saying what to do instead, if Triton kernels cannot take x."""
    if not TRITON_IS_INSTALLED:
        raise ValueError("backend 'triton' needs the package triton: pip install 'ssminterp[triton]', or use 'auto'")
    if x.dtype == torch.float64:
        raise ValueError("backend 'triton' takes float32, bfloat16 and float16, got x of torch.float64: use 'torch'")
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, got x on {x.device}: use 'auto', or set TRITON_INTERPRET=1 before "
            f"triton is imported to run the kernels in Triton's interpreter"
        )
