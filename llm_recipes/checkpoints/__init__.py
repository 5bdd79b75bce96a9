"""A run's state on disk: safetensors and JSON, whole or absent."""
