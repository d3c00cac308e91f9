"""Launchers: scripts for torchrun, msrun and Slurm, and the place that reads their environment."""
