"""Predicts a training run's time and memory from its model, cluster and layout; no torch. See docs/plan.md."""
