"""megatron-core as the engine: fitted to a device, its process groups, optimizer and step."""
