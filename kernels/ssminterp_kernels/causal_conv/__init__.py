"""Mamba-1's causal depthwise convolution (Gu & Dao 2023, arXiv:2312.00752, section 3.4), with its SiLU.

`causal_conv` is for whole sequences, `causal_conv_step` for one position of a text that goes on.
"""

from ssminterp_kernels.causal_conv.interface import Activation, ConvOutput, causal_conv, causal_conv_step

__all__ = ["Activation", "ConvOutput", "causal_conv", "causal_conv_step"]
