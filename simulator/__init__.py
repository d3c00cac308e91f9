"""Analytic simulator: throughput and memory of a model on a cluster. No torch."""
