"""Conversations in the manner of MT-Bench: a model answers questions of several turns, and judges score each answer."""
