"""What stage 1 will make and cost, before anything is written.

`resolve_amounts` fits the numbers of views to the space, `measure_pace` times each part of the pipeline for a few
seconds, `make_plan` puts views, bytes, files, hours and break-even together, and `plan_text` says them.
"""

from rsmtdf.stages.plan.amounts import Amounts, resolve_amounts
from rsmtdf.stages.plan.measure import Clock, measure_pace, now
from rsmtdf.stages.plan.pace import Cost, Estimate, Pace, TrainingPace
from rsmtdf.stages.plan.plan import Outlook, Plan, make_plan
from rsmtdf.stages.plan.sample import Sample, draw_sample
from rsmtdf.stages.plan.text import plan_text, time_text
from rsmtdf.stages.plan.units import count_text, size_text

__all__ = [
    "Amounts",
    "Clock",
    "Cost",
    "Estimate",
    "Outlook",
    "Pace",
    "Plan",
    "Sample",
    "TrainingPace",
    "count_text",
    "draw_sample",
    "make_plan",
    "measure_pace",
    "now",
    "plan_text",
    "resolve_amounts",
    "size_text",
    "time_text",
]
