"""Jobs: one computation on one encoder each, all by the protocol of `base`."""

from ur_jax.jobs import certify, impersonate, knn, label_free, probe
from ur_jax.jobs.base import JOBS, Curve, Job, Session, register

__all__ = [
    "JOBS",
    "Curve",
    "Job",
    "Session",
    "certify",
    "impersonate",
    "knn",
    "label_free",
    "probe",
    "register",
]
