"""What runs did, as tables and as one page: read from their folders, and from nothing else."""
