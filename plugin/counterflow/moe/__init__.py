"""Expert balancing while a model trains: slots, clones, loads, plans, homes. Knows tensors and process groups, no trainer."""
