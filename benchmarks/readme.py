"""Write the README's tables from the JSON in benchmarks/results: `python -m benchmarks.readme`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and is made from NAME.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .tables import Table, provenance, tables_of

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
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
    return "\n".join([*map(_table, tables_of(result)), f"{provenance(result)}\n"])


def _table(table: Table) -> str:
    lines = [table.headings, ["---"] + ["---:"] * (len(table.headings) - 1), *table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    README.write_text(fill_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
