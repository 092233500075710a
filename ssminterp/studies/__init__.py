"""Studies: the protocol of a paper in one run, on any checkpoint."""

from ssminterp.studies.ioi import IOIStudy, ioi_study
from ssminterp.studies.ioi_report import as_text, save_ioi_report, study_tables
from ssminterp.studies.ioi_summary import beside_the_paper, disagreements, summary

__all__ = [
    "IOIStudy",
    "as_text",
    "beside_the_paper",
    "disagreements",
    "ioi_study",
    "save_ioi_report",
    "study_tables",
    "summary",
]
