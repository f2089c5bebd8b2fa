"""``python -m counterflow.platform.engine``: install the Python files of Transformer Engine for the CPU."""

from counterflow.platform.engine import fetch

if __name__ == "__main__":
    raise SystemExit(fetch())
