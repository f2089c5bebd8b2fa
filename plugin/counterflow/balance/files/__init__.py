"""What the balancer reads and writes: arrays from untrusted files, records of runs, placements for inference servers."""
