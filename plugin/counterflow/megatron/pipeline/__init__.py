"""Pipeline schedules in Megatron: its forward-backward contract, its F and B, overlapped pairs, split backward passes."""
