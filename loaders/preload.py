"""Imported by the fork server alone: what each loader worker needs, once for all of them."""

import loaders.loader
import loaders.validation  # noqa: F401  (imported for those who are forked)
from sharding.process import ignore_signals

# The server has to outlive a SIGTERM to the process group: its end would look like its workers'.
ignore_signals()
