"""Pages in a real browser: opened from a file, without network, silent."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = (os.environ.get("COUNTERFLOW_BROWSER"), "chromium", "chromium-browser", "google-chrome")
# Through a copy: a canvas that is itself read slows down and says so.
READ_PIXEL = """([index, x, y]) => {
    const canvas = document.querySelectorAll("canvas")[index], place = canvas.getBoundingClientRect();
    const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, Math.floor(x - place.left), Math.floor(y - place.top), 1, 1, 0, 0, 1, 1);
    const values = [...copy.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    return "#" + values.map((value) => value.toString(16).padStart(2, "0")).join("");
}"""

# Children of a part of the page that lie on each other, by their texts.
FIND_OVERLAPS = """() => {
    const found = [];
    const isLeft = (a, b) => a.right <= b.left + 0.5, isAbove = (a, b) => a.bottom <= b.top + 0.5;
    const isApart = (a, b) => isLeft(a, b) || isLeft(b, a) || isAbove(a, b) || isAbove(b, a);
    const parents = "header, main, section, .tables, .tools, .legend, .layers, .layer, .scale, .figures, figure";
    for (const parent of document.querySelectorAll(parents)) {
        const boxes = [...parent.children].map((node) => [node.textContent.trim() || node.tagName, node.getBoundingClientRect()]);
        boxes.forEach(([text, box], n) => boxes.slice(n + 1).forEach(([other, next]) => {
            if (!isApart(box, next)) found.push(`"${text}" and "${other}"`);
        }));
    }
    return found;
}"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in NAMES if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no chromium found; install it (scripts/find-browser.sh) or set COUNTERFLOW_BROWSER=/path/to/chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_text(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page from a file; afterwards fails for anything on the console and for any request beyond the file."""
    complaints: list[str] = []
    contexts = []

    def open_html(text: str, scheme: str, width: int) -> Any:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: request.url == path.as_uri() or complaints.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        return page

    yield open_html
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def read_pixel() -> Callable[[Any, int, float, float], str]:
    """Reads the colour that a page's canvas shows at a place in the window, as #rrggbb."""
    return lambda page, index, x, y: str(page.evaluate(READ_PIXEL, [index, x, y]))


@pytest.fixture
def find_overlaps() -> Callable[[Any], list[str]]:
    """Names what lies on each other in a page."""
    return lambda page: list(page.evaluate(FIND_OVERLAPS))
