"""An OpenAI-compatible server for the decoding engine."""
