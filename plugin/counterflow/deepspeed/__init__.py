"""The adapter of DeepSpeed: one key of its JSON puts schedules and expert balancing in force."""
