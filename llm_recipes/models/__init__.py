"""A Hugging Face model, sharded and ready to train."""
