"""Studies: the protocol of a paper in one run, on any checkpoint. Pages with figures are made by `ioi_report`."""

from ssminterp.studies.ioi import IOIStudy, ioi_study
from ssminterp.studies.ioi_summary import beside_the_paper, disagreements, summary

__all__ = [
    "IOIStudy",
    "beside_the_paper",
    "disagreements",
    "ioi_study",
    "summary",
]
