"""Text to tokens to batches: tokenizers, corpus preparation, indexed datasets, baselines.

Nothing here imports torch until a module that needs it is named: `pangu.data.prepare` answers a
mistyped option at once.
"""


class DataError(ValueError):
    """Input that cannot be used. The message is one sentence naming the file or option."""
