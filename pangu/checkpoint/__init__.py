"""Checkpoints: written complete or not at all, found sound, read back in any layout."""


class WeightsError(Exception):
    """A model that cannot be read, understood or written; the message is one sentence."""
