"""Imported by the fork server alone: what each loader worker needs, once for all of them."""

from contextlib import suppress

import loaders.loader
import loaders.validation  # noqa: F401
from sharding.process import ignore_signals

# The server has to outlive a SIGTERM to the process group: its end would look like its workers'.
ignore_signals()

with suppress(ImportError):  # boto3, an extra; it takes each process a quarter of a second
    import sharding.s3  # noqa: F401
