"""Stage 2: the training loop. It takes its targets from a `FeatureSource` and never meets a teacher."""

from rsmtdf.stages.train.job import Ranks, TrainJob, build_schedule, resumable_config
from rsmtdf.stages.train.loop import train

__all__ = ["Ranks", "TrainJob", "build_schedule", "resumable_config", "train"]
