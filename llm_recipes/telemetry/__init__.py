"""What a run says: metrics on disk, progress on the terminal, W&B."""
