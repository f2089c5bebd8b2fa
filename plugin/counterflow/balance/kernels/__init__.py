"""The balancer's inner loops, compiled by numba; importing one of them, but not this, loads the compiler."""

# Tokens of a layer, of which sums do not overflow.
LARGEST_SUM = 2.0**62
