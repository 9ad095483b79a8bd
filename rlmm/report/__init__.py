"""The HTML report of a run: one self-contained page, made at any time from what lies in the run folder."""

from rlmm.report.page import write_report

__all__ = ["write_report"]
