"""Exact counts of one training step: operators, messages and memory, from the configuration."""
