"""Continued pretraining of open language models in another language."""

__version__ = "0.1.0"
