"""DeepSpeed behind the engine's contract: ZeRO for the data-parallel ranks of the same model."""
