"""The adapter to Megatron-Core and megatron.training."""
