"""Clean text to token files to the global batch stream."""
