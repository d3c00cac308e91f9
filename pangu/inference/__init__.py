"""Text from a trained model: cached decoding and sampling."""
