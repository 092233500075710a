"""The public selective scan: checks its arguments, chooses a backend, and calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.backends import check_triton_suits, on_device_of, takes_triton
from ssminterp_kernels.launching import can_be_repeated, repeated
from ssminterp_kernels.selective_scan.arguments import ScanArguments, check_arguments, with_groups_axis
from ssminterp_kernels.selective_scan.edits import StateEdits
from ssminterp_kernels.selective_scan.torch_scan import torch_scan

Backend = Literal["auto", "torch", "numba", "triton"]
_BACKENDS = get_args(Backend)


class ScanOutput(NamedTuple):
    """What a scan returns.

    y: [batch, pos, d_inner], in the dtype of x.
    states: [batch, n_positions, d_inner, d_state] in the state's dtype or the one asked for, or None.
    final_state: [batch, d_inner, d_state], the state after the last position.
    """

    y: Tensor
    states: Tensor | None
    final_state: Tensor


def selective_scan(
    x: Float[Tensor, "batch pos d_inner"],
    delta: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch pos *n_groups d_state"],
    C: Float[Tensor, "batch pos *n_groups d_state"],
    D: Float[Tensor, " d_inner"] | None = None,
    z: Float[Tensor, "batch pos d_inner"] | None = None,
    delta_bias: Float[Tensor, " d_inner"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "batch d_inner d_state"] | None = None,
    states: Literal["all"] | Sequence[int] | None = None,
    edits: StateEdits | None = None,
    states_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> ScanOutput:
    """y_t = C_t · h_t + D · x_t (times SiLU(z_t)), where h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t.

    The state is float32 whatever the dtype of the inputs, float64 when they are float64. Every output is
    differentiable with respect to every tensor argument. Memory beyond inputs and outputs does not grow with
    pos × d_inner × d_state unless `states="all"`.

    delta: before bias and softplus if `delta_bias` and `delta_softplus` are given, else the step size Δ itself.
    B, C: [batch, pos, d_state], or [batch, pos, n_groups, d_state] where n_groups divides d_inner.
    initial_state: h before position 0; zeros if None.
    states: which states to return: None, "all", or strictly ascending positions. States are taken after edits.
    edits: affine edits of the state at sparse positions, see `StateEdits`.
    states_dtype: torch.bfloat16 to have the returned states rounded to half their memory; the scan itself and the
        final state stay as they are.
    backend: "torch" for any device and dtype, "numba" for float32 on the CPU, "triton" for float32, bfloat16 and
        float16 on CUDA (on the CPU only under TRITON_INTERPRET=1), or "auto" for the fastest one that the tensors
        allow, which `choose_backend` tells. Strides of the outputs differ between backends.

    Raises ValueError, naming the argument and both shapes, if shapes, devices or dtypes do not agree or positions
    are out of range, duplicate or unsorted.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.2 and algorithm 2.

    >>> x, delta = torch.randn(2, 7, 4), torch.rand(2, 7, 4)
    >>> A, B, C = -torch.rand(4, 3), torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    >>> out = selective_scan(x, delta, A, B, C, states=[2, 6])
    >>> out.states.shape
    torch.Size([2, 2, 4, 3])
    """
    tensors = (x, delta, A, B, C, D, z, delta_bias)
    if states is states_dtype is edits is None and can_be_repeated(*tensors, initial_state):
        return ScanOutput(*_final_state_alone(*tensors, delta_softplus, initial_state, backend))
    return _scan(ScanArguments(*tensors, delta_softplus, initial_state, states, edits, states_dtype), backend)


@repeated
def _final_state_alone(*arguments: Any) -> tuple[Tensor, None, Tensor]:
    *fields, backend = arguments
    y, _, final_state = _scan(ScanArguments(*fields), backend)
    return y, None, final_state


def _scan(arguments: ScanArguments, backend: Backend) -> ScanOutput:
    arguments = check_arguments(arguments, groups_axis=False)
    chosen = choose_backend(arguments, backend)
    # Imported on first use: Triton is not installed everywhere, and to load what numba compiled takes a moment.
    if chosen == "triton":
        from ssminterp_kernels.selective_scan.triton_scan import triton_scan

        with on_device_of(arguments.x):
            return ScanOutput(*triton_scan(arguments))
    arguments = with_groups_axis(arguments)
    if chosen == "numba":
        from ssminterp_kernels.selective_scan.numba_scan import numba_scan

        return ScanOutput(*numba_scan(arguments))
    return ScanOutput(*torch_scan(arguments))


def choose_backend(arguments: ScanArguments, backend: Backend = "auto") -> Literal["torch", "numba", "triton"]:
    """The backend that `selective_scan` takes for these arguments; takes arguments from `check_arguments`.

    "auto" is "triton" on CUDA except for float64, "numba" for float32 on the CPU outside of `torch.compile`, which
    cannot look into it, and "torch" elsewhere. Raises ValueError for an unknown backend and for one that cannot take
    these arguments.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
    x = arguments.x
    fits_numba = x.device.type == "cpu" and x.dtype == torch.float32
    if backend == "numba" and not fits_numba:
        raise ValueError(
            f"backend 'numba' needs x to be float32 on the CPU, got {x.dtype} on {x.device}: use 'auto' or 'torch'"
        )
    if backend == "triton":
        check_triton_suits(x)
    if backend == "auto":
        if takes_triton(x):
            return "triton"
        return "numba" if fits_numba and not torch.compiler.is_compiling() else "torch"
    return backend
