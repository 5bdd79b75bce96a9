"""What a model is worth: figures that compare across vocabularies."""
