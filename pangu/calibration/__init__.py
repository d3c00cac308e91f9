"""Measuring a machine for the simulator: operators and collectives on real processes, and the
framework's own cost; `fit` turns the samples into a hardware preset."""
