"""Jobs: one computation on one encoder each, all by the protocol of `base`."""

from ur_jax.jobs import label_free
from ur_jax.jobs.base import JOBS, Curve, Job, Session, register

__all__ = ["JOBS", "Curve", "Job", "Session", "label_free", "register"]
