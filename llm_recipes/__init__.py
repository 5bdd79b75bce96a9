"""Continued pretraining of open language models in another language."""

import time

__version__ = "0.1.0"

STARTED = time.monotonic()
"""When this process began, as far as we can tell: a job's wall-clock limit counts from there."""
