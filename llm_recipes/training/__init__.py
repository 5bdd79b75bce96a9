"""One training run: read `loop.py` first."""
