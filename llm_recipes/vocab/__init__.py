"""Tokenizer and embedding surgery."""
