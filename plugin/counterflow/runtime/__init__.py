"""Executes a schedule table over model chunks; knows nothing of whose model it is."""
