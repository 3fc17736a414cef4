"""Compressors: what can be done to a model, one file per method."""
