"""Many runs: where each has its folder, what became of it, and who starts it."""
