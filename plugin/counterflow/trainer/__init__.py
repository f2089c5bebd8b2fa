"""Code that the adapters of all trainers share; it imports no trainer."""
