"""Run folders as they are read: what a run is and how far, its curves, the doctor's findings, its rollouts, its page.

Nothing here writes in a run but `write_page`; whatever a file holds, reading it harms nobody (`folder`, `text`).
"""

from liaoyuan.runs.charts import CHARTS, QUIET, USUAL, Chart, both, chart_of, title_of
from liaoyuan.runs.curves import AXES, Curves
from liaoyuan.runs.folder import Absent, Folder
from liaoyuan.runs.result import tables_of
from liaoyuan.runs.rollouts import Filter, Shown, Step, Steps, groups_of, shortened
from liaoyuan.runs.run import Finding, Run, describe, find_runs, open_run, read_findings, read_result, run_folder
from liaoyuan.runs.text import visible

__all__ = [
    "AXES",
    "CHARTS",
    "QUIET",
    "USUAL",
    "Absent",
    "Chart",
    "Curves",
    "Filter",
    "Finding",
    "Folder",
    "Run",
    "Shown",
    "Step",
    "Steps",
    "both",
    "chart_of",
    "describe",
    "find_runs",
    "groups_of",
    "open_run",
    "read_findings",
    "read_result",
    "run_folder",
    "shortened",
    "tables_of",
    "title_of",
    "visible",
]
