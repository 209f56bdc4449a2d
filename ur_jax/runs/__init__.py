"""Results on disk: the only writer and reader of what lies in a run's folder."""

from ur_jax.runs.files import (
    as_folder,
    atomic_path,
    fingerprint,
    is_in_bucket,
    plain,
    read_json,
    read_table,
    write_json,
    write_table,
)
from ur_jax.runs.folder import OtherConfigurationError, Run, open_run, set_aside
from ur_jax.runs.provenance import SCHEMA, provenance
from ur_jax.runs.summary import SETTINGS, Row, Summary, of_asked

__all__ = [
    "SCHEMA",
    "SETTINGS",
    "OtherConfigurationError",
    "Row",
    "Run",
    "Summary",
    "as_folder",
    "atomic_path",
    "fingerprint",
    "is_in_bucket",
    "of_asked",
    "open_run",
    "plain",
    "provenance",
    "read_json",
    "read_table",
    "set_aside",
    "write_json",
    "write_table",
]
