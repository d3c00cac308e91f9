"""The language model, assembled from megatron-core's modules and ours."""
