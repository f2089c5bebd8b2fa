"""One set of colours for all renderings: a hue per direction, a shade per kind of action (W lightest, then F, I, B)."""

SINGLES = ("F", "B", "I", "W")
KIND_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
DIRECTION_NAMES = {"up": "up: rank 0 to last", "down": "down: last rank to 0"}

# Blue and orange stay apart for every common colour blindness; the shades differ in lightness.
BLOCKS = {
    "up-F": "#a8c8f4",
    "up-B": "#2f66b8",
    "up-I": "#6397df",
    "up-W": "#dce8fa",
    "down-F": "#f8c48e",
    "down-B": "#ad5a0a",
    "down-I": "#e08f3c",
    "down-W": "#fce6cf",
}
LIGHT = BLOCKS | {
    "ground": "#ffffff",
    "ink": "#1d1f23",
    "muted": "#59616c",
    "grid": "#e3e5e8",
    "frame": "#14161a",
    "idle": "#f6f6f4",
    "hatch": "#d9d9d4",
    "activations": "#2c7a4b",
    "queued": "#a3338c",
}
DARK = BLOCKS | {
    "up-W": "#c9dcf7",
    "down-W": "#f7dcbd",
    "ground": "#14171c",
    "ink": "#e6e8eb",
    "muted": "#9ba4ae",
    "grid": "#2a2f37",
    "frame": "#f5f6f7",
    "idle": "#1b1f25",
    "hatch": "#333a43",
    "activations": "#62c58a",
    "queued": "#e383cf",
}
# Text on a block: the B's are dark in both themes.
ON_DARK, ON_LIGHT = "#ffffff", "#14161a"


def choose_text_colour(kind: str) -> str:
    """Return the colour of a label on a block of that kind."""
    return ON_DARK if kind == "B" else ON_LIGHT
