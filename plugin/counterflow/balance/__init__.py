"""Expert placement: replicate, pack, split tokens, predict loads, move; no torch. See docs/balance.md."""
