"""Compression methods from end to end: a model is loaded, measured, rewritten and judged."""
