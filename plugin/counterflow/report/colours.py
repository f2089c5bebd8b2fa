"""One set of colours for all renderings: a hue per direction, a shade per kind of action (W lightest, then F, I, B).

A balance replay has a line per method and one scale of loads: blue below the mean, orange above, neutral at it.
"""

SINGLES = ("F", "B", "I", "W")
KIND_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
REDUCTION_NAME = "gradient reduction, beside"
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
# Kernels: what computes is blue, what communicates orange.
KERNELS = {
    "products": "#2f66b8",
    "attention": "#6397df",
    "computing": "#a8c8f4",
    "exchange": "#e08f3c",
    "collective": "#f3bd7f",
    "notify": "#ad5a0a",
    "copying": "#8f98a3",
    "alone": "#86b0ea",
}
FIXED = BLOCKS | KERNELS
LIGHT = FIXED | {
    "ground": "#ffffff",
    "ink": "#1d1f23",
    "muted": "#59616c",
    "grid": "#e3e5e8",
    "frame": "#14161a",
    "idle": "#f6f6f4",
    "hatch": "#d9d9d4",
    "activations": "#2c7a4b",
    "queued": "#a3338c",
    "reduction": "#0f8577",
    "communication": "#7b2fc4",
    "waiting": "#d02f4b",
    "fixed": "#8b929b",
    "eplb": "#c96a12",
    "counterflow": "#1f5fc4",
    "oracle": "#2c7a4b",
    "load-0": "#1d4f9e",
    "load-1": "#94bbec",
    "load-2": "#f3f2ef",
    "load-3": "#eea253",
    "load-4": "#8f4304",
}
DARK = FIXED | {
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
    "reduction": "#3fd0bd",
    "communication": "#c79bff",
    "waiting": "#ff7d92",
    "fixed": "#8b949f",
    "eplb": "#f09a4a",
    "counterflow": "#6ea8ff",
    "oracle": "#62c58a",
    "load-0": "#a9ccff",
    "load-1": "#3c6bb0",
    "load-2": "#272c34",
    "load-3": "#b3661c",
    "load-4": "#ffcc94",
}
# Text on a block: the B's are dark in both themes.
ON_DARK, ON_LIGHT = "#ffffff", "#14161a"


def choose_text_colour(kind: str) -> str:
    """Return the colour of a label on a block of that kind."""
    return ON_DARK if kind == "B" else ON_LIGHT


def mix_shades(share: float, shades: list[str]) -> str:
    """Return the colour at a share of the way through some shades that lie evenly apart."""
    place = share * (len(shades) - 1)
    lower = min(int(place), len(shades) - 2)
    pairs = zip(_split_channels(shades[lower]), _split_channels(shades[lower + 1]), strict=True)
    return "#" + "".join(f"{int(one + (other - one) * (place - lower) + 0.5):02x}" for one, other in pairs)


def _split_channels(colour: str) -> list[int]:
    return [int(colour[n : n + 2], 16) for n in (1, 3, 5)]
