"""Pangu MoE: train Mixture-of-Grouped-Experts language models."""
