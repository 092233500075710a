"""One step of Mamba-1's selective scan (Gu & Dao 2023, arXiv:2312.00752, section 3): what decoding runs."""

from ssminterp_kernels.scan_step.interface import StepOutput, selective_scan_step

__all__ = ["StepOutput", "selective_scan_step"]
