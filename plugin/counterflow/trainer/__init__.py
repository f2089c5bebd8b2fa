"""What the adapters to all trainers share; imports none of them."""
