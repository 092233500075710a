"""The residual stream between two layers on a GPU: what a layer adds, and the RMS norm that the next one begins with.

In one kernel, where torch takes two, and in half precision four; in front of a GPU that has little to do, each costs
as much as the others. Triton only, so this imports it.
"""

from ssminterp_kernels.residual.triton_residual import Forks, add, add_and_norm, norm, norm_backward

__all__ = ["Forks", "add", "add_and_norm", "norm", "norm_backward"]
