"""Models in transformers' formats: in, out, and from dense ones to mixtures of experts."""
