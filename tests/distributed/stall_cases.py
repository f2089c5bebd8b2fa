"""What goes wrong on rank 2 in the stall tests, and at which of its actions (stages 2 and 5 of a V on four ranks)."""

RANKS = 4
MICROBATCHES = 10
LIMIT = 3.0

CASES = {
    "killed in warm-up": ("killed", "2F1"),
    "killed in steady state": ("killed", "5F5"),
    "killed in cool-down": ("killed", "2B9"),
    "late": ("late", "5F5"),
    "NaN loss": ("nan", "5F5"),
    "wrong shape": ("shape", "5F5"),
    "wrong dtype": ("dtype", "5F5"),
    "another table": ("table", ""),
}
