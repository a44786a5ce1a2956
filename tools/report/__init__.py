"""One self-contained HTML page about a dataset, a run and its results.

Read page.py (what stands on the page), then sources.py (what is read), and one file a section:
curation.py, training.py, scorecard.py. html.py escapes, charts.py draws.
"""

from tools.report.page import build_report, report_on

__all__ = ["build_report", "report_on"]
