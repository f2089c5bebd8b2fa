"""Benchmarks: `python -m benchmarks.NAME`, from the repository."""

# Finds the example's scripts, the lists of cases and the workers of ranks.
import tests.support  # noqa: F401
