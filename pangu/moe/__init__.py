"""The MoE layer: router, dispatcher, experts, combine, and the shared expert beside them."""
