"""Checkpoints: written complete or not at all, found sound, read back in any layout."""
