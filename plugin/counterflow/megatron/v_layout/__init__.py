"""Models laid out as a V: the second chunk of each pipeline rank is that of its mirror image."""
