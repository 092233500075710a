"""Many short rows that go on from a few pasts: what a sweep of patches runs.

Rows come in tiles of n, each of which goes on from the same n pasts, and lie in a tile as `Packing` says. The functions
are for float32 on the CPU; `triton_stages` has them for GPUs, and `triton_joint` the scan of rows and of the runs that
they go on from, in one launch. They are the stages of a Mamba-1 mixer between its matrix products (Gu & Dao 2023,
arXiv:2312.00752, section 3), each in one pass over memory:

    conv_silu         the causal conv and SiLU
    scanned_rows      Δ's bias and softplus, the scan, D and the gate
    forked_rows       the same for rows that differ from their tile's base rows at their first positions alone
    normed            RMS norm

All take last axes that lie in one piece and d_inner a multiple of `LANES`, which `suits` tells.
"""

from ssminterp_kernels.rows.mixer_stages import (
    Early,
    Recorded,
    RowScan,
    blocks,
    conv_silu,
    forked_rows,
    normed,
    scanned_rows,
    suits,
)
from ssminterp_kernels.rows.packing import Packing

__all__ = [
    "Early",
    "Packing",
    "Recorded",
    "RowScan",
    "blocks",
    "conv_silu",
    "forked_rows",
    "normed",
    "scanned_rows",
    "suits",
]
