"""Expert balancing in DeepSpeed: AutoEP's layers with slots, and the calls around which clones are filled and emptied."""
