"""Elements of SVG documents: on white, text as text."""

from xml.sax.saxutils import escape

from counterflow.report.colours import LIGHT

FONT = 10.0


def open_document(width: float, height: float) -> str:
    """Return the start of a document of so many pixels, with its ground; ``</svg>`` ends it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="{FONT:g}">\n'
        f'<rect width="{width:g}" height="{height:g}" fill="{LIGHT["ground"]}"/>'
    )


def draw_rectangle(name: str, x: float, y: float, width: float, height: float, fill: str, title: str) -> str:
    """Return a rectangle of a class, with a title to hover."""
    return (
        f'<rect class="{name}" x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{height:.2f}" fill="{fill}">'
        f"<title>{escape(title)}</title></rect>"
    )


def draw_line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return a thin line."""
    return f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{colour}" stroke-width="0.75"/>'


def draw_text(x: float, y: float, text: str, colour: str, anchor: str, more: str = "") -> str:
    """Return text, escaped, at its ``start``, ``middle`` or ``end``; ``more`` are attributes."""
    return f'<text x="{x:.2f}" y="{y:.2f}" fill="{colour}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
