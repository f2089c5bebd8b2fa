"""Expert balancing in Megatron: MoE layers with slots, and the calls around which clones are filled and emptied."""
