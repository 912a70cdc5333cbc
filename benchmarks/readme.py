"""Write the README's tables and plots from the JSON in benchmarks/results: `python -m benchmarks.readme`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and is made from NAME.json; plots are drawn of the
results in PLOTTED, and of the seams of the shipped models.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from .tables import Table, overviews_of, provenance

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PLOTTED = ("quality", "latency", "roofline", "scaling", "soak")
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(text: str, results: Path = RESULTS) -> str:
    """Replace every table of a README by the one that its JSON gives.

    Raises: KeyError for a result that no table is made of, OSError or ValueError for an unreadable result.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        result = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{_markdown(result)}{match[3]}"

    return BLOCK.sub(fill, text)


def _markdown(result: dict[str, Any]) -> str:
    return "\n".join([*map(_table, overviews_of(result)), f"{provenance(result)}\n"])


def _table(table: Table) -> str:
    lines = [table.headings, ["---"] + ["---:"] * (len(table.headings) - 1), *table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_plots(results: Path = RESULTS) -> None:
    """Draw the plots beside the results; those that are of the same figures already stay as they are."""
    from . import plots  # matplotlib

    drawn = plots.draw_seams_file()
    for name in PLOTTED:
        drawn |= plots.draw_files(name, json.loads((results / f"{name}.json").read_text(encoding="utf-8")))
    for file, data in drawn.items():
        if not (results / file).exists() or plots.source_of(results / file) != plots.source_of(io.BytesIO(data)):
            (results / file).write_bytes(data)


if __name__ == "__main__":
    README.write_text(fill_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    write_plots()
