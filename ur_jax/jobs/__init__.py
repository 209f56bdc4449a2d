"""Jobs: one computation on one encoder each, all by the protocol of `base`."""

from ur_jax.jobs.attack_certificates import AttackCertificates
from ur_jax.jobs.base import JOBS, Curve, Job, Session, register
from ur_jax.jobs.certify import Certify
from ur_jax.jobs.impersonate import Impersonate, ImpersonationConfig
from ur_jax.jobs.knn import Knn
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree
from ur_jax.jobs.probe import Probe
from ur_jax.jobs.train import Train

__all__ = [
    "JOBS",
    "AttackCertificates",
    "Certify",
    "Curve",
    "EvaluationConfig",
    "Impersonate",
    "ImpersonationConfig",
    "Job",
    "Knn",
    "LabelFree",
    "Probe",
    "Session",
    "Train",
    "register",
]
