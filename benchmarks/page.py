"""One HTML page of many results, with everything inside it, and its plots as PNG files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdk.errors import OptionError, OutputError
from train.report_page import Markup, element, image, page, scrolling, table

from . import plots
from .result import SCHEMA
from .tables import Table, provenance, tables_of

PAGE = "report.html"
TITLE = "sr-sdk, measured"
SEAMS = (
    "The largest difference between a tiled and the untiled result, over the context that tiles get, measured when "
    "each shipped model was exported; the SDK takes the context that keeps it to 1."
)
TITLES = {
    "quality": "Quality",
    "restoration": "Restoration",
    "latency": "Latency",
    "tiling": "Tiles and their seams",
    "roofline": "Share of what the processor could do",
    "scaling": "How time grows",
    "soak": "Hours of mixed requests",
    "runtime": "What the SDK adds to the engine",
    "large": "Pictures larger than memory",
    "serve": "sr-serve under load",
    "train": "Speed of training",
}
CSS_PER_PIXEL = 0.75  # plots are drawn finer than they are shown


def read_result(path: Path) -> dict[str, Any]:
    """Read the JSON of a benchmark. Raises: OptionError if it is not one that this version shows."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise OptionError(f"{path}: not a readable JSON file ({exc})") from exc
    if not isinstance(result, dict) or result.get("kind") not in TITLES:
        raise OptionError(f"{path}: not a result of sr-bench {', '.join(TITLES)}")
    if result.get("schema") != SCHEMA:
        raise OptionError(f"{path}: has schema {result.get('schema')!r}, this version reads {SCHEMA}")
    return result


def write_page(results: Sequence[tuple[str, dict[str, Any]]], out: Path) -> list[Path]:
    """Write report.html and a PNG for each plot into a folder, which is made.

    results: each with the name that its PNG files get. The page's order is that of TITLES.
    Returns: the files, the page first.
    Raises: BackendUnavailable without matplotlib; OutputError if a file cannot be written.
    """
    order = list(TITLES)
    content = [element("h1", TITLE)]
    pictures: dict[str, bytes] = {}
    for name, result in sorted(results, key=lambda item: order.index(item[1]["kind"])):
        drawn = plots.draw_files(name, result)
        pictures |= drawn
        content += _section(f"{TITLES[result['kind']]} ({name})", result, list(drawn.values()))
    pictures |= plots.draw_seams_file()
    content += [
        element("h2", "Seams"),
        element("p", SEAMS),
        _picture(pictures["seams.png"], alt="Error over context: of every model it falls to 1 or less"),
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, data in pictures.items():
            (out / file).write_bytes(data)
        (out / PAGE).write_text(page(TITLE, *content), encoding="utf-8")
    except OSError as exc:
        raise OutputError(f"{out}: cannot be written ({exc.strerror})") from exc
    return [out / PAGE, *(out / file for file in pictures)]


def _section(title: str, result: dict[str, Any], drawn: Sequence[bytes]) -> list[Markup]:
    return [
        element("h2", title),
        *(_picture(data, alt=f"{title}: the figures are in the table") for data in drawn),
        *(_table(each) for each in tables_of(result)),
        element("p", provenance(result), class_="soft"),
        element("details", element("summary", "How it was measured"), element("p", result["protocol"])),
    ]


def _picture(data: bytes, *, alt: str) -> Markup:
    with Image.open(io.BytesIO(data)) as opened:
        width, height = (round(side * CSS_PER_PIXEL) for side in opened.size)
    return scrolling(image(data, "png", alt=alt, size=(width, height)), alt)


def _table(content: Table) -> Markup:
    rows = [[element("em", cell.strip("*")) if cell.startswith("*") else cell for cell in row] for row in content.rows]
    return table(content.headings, rows, caption=f"{len(rows)} rows")
