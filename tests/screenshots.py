"""Take the screenshots of the README: `python tests/screenshots.py`, with Chromium on the machine.

sr-serve with the shipped model, after a photograph of export/pictures; and the report page of
benchmarks/results.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import serving
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from test_serve_page import CHROMIUM, QUIET

from benchmarks.page import read_result, write_page

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PHOTOGRAPH = ROOT / "export" / "pictures" / "astronaut.webp"


def main() -> None:
    """Write both pictures into benchmarks/results."""
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        _take_server(browser)
        _take_report(browser)
        browser.close()


def _take_server(browser: Browser) -> None:
    photograph = Image.open(PHOTOGRAPH).convert("RGB")
    small, stream = photograph.reduce(2), io.BytesIO()
    small.save(stream, "PNG")
    with tempfile.TemporaryDirectory() as state:
        server = serving.make_server(Path(state), models=("fast-x2", "fast-x2-perceptual"), backend="auto")
        with serving.running(server) as address:
            page = browser.new_page(viewport={"width": 900, "height": 960})
            page.goto(address)
            page.locator("#file").set_input_files(
                {"name": "astronaut.png", "mimeType": "image/png", "buffer": stream.getvalue()}
            )
            page.get_by_role("button", name="Enlarge").click()
            page.wait_for_selector("#result:not([hidden])")
            page.get_by_role("button", name="Zoom in").click()
            page.evaluate("document.getElementById('view').scrollTop = 40")
            _write(page.screenshot(), RESULTS / "sr-serve.png")


def _take_report(browser: Browser) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(RESULTS.glob("*.json"))
        page_file, *_ = write_page([(path.stem, read_result(path)) for path in files], Path(folder))
        page = browser.new_page(viewport={"width": 1500, "height": 1200})
        page.goto(page_file.as_uri())
        _write(page.screenshot(), RESULTS / "report.png")


def _write(data: bytes, path: Path) -> None:
    """Write a screenshot in 256 colours, which are enough for a page and a third of the bytes."""
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
