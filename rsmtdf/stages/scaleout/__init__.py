"""Spreading a stage's work over processes and machines that may die.

`spread` gives numbered units of work, as tasks, to a crew: this process (`SerialCrew`), processes of this machine, one
per device (`process_crew`), or the workers of a Dask cluster (`clusters`, the only module that imports dask, and only
when a cluster is asked for). What a unit is, the caller knows: `work` is handed in.
"""

from rsmtdf.stages.scaleout.crew import Crew, Outcome, SerialCrew, Work, WorkerLost, run_here
from rsmtdf.stages.scaleout.processes import process_crew
from rsmtdf.stages.scaleout.spread import Tally, spread
from rsmtdf.stages.scaleout.tasks import piece

__all__ = [
    "Crew",
    "Outcome",
    "SerialCrew",
    "Tally",
    "Work",
    "WorkerLost",
    "piece",
    "process_crew",
    "run_here",
    "spread",
]
