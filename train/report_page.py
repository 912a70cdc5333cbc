"""The building blocks of the report's HTML: elements that escape what they hold, and the page around them."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

VOID = {"img", "meta", "wbr"}
# The report shows what others logged; nothing in it may run or load anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1d2226; --paper: #fff; --soft: #5b6670; --line: #d5dade; --mark: #fff1c7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8eb; --paper: #15191c; --soft: #9aa5ae; --line: #363d43; --mark: #4a3c11; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
figure h3 { margin: 0; }
p { margin: .5rem 0; max-width: 48rem; }
.soft { color: var(--soft); }
.state { display: inline-block; padding: .1rem .6rem; border: 1px solid currentColor; border-radius: 1rem; }
.state.finished { color: #1f8a4c; } .state.running { color: #2f7fc4; } .state.stopped { color: #bf6516; }
.charts { margin-bottom: 1rem; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.wide { overflow-x: auto; }
.wide:focus-visible { outline: 2px solid #2f7fc4; }
.wide img { display: block; max-width: none; }
.strip { display: flex; gap: .5rem; overflow-x: auto; padding-bottom: .5rem; }
.strip figure { flex: none; }
.strip img { display: block; }
figcaption { font-size: .85rem; color: var(--soft); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .25rem 0; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
table.facts th, table.recipe th { overflow-wrap: normal; }
table.numbers { overflow-wrap: normal; white-space: nowrap; }
tr.changed { background: var(--mark); }
summary { cursor: pointer; }
code { font-size: .9em; }
"""


class Markup(str):
    """HTML that is escaped already; every other string is text."""


def element(name: str, /, *content: str, **attributes: str) -> Markup:
    """Make an element; content is escaped unless it is Markup, attribute values always. `class_` is class."""
    pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(text)}"' for key, text in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{pairs}>")
    inside = "".join(item if isinstance(item, Markup) else html.escape(item) for item in content)
    return Markup(f"<{name}{pairs}>{inside}</{name}>")


def breakable(key: str) -> Markup:
    """Let a long key break after its dots and underscores."""
    text = html.escape(key)
    return Markup(text.replace(".", f".{element('wbr')}").replace("_", f"_{element('wbr')}"))


def join(items: Iterable[Markup]) -> Markup:
    """Put pieces of HTML one after the other."""
    return Markup("\n".join(items))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, class_: str = "numbers") -> Markup:
    """Make a table whose first column names the rows. It scrolls by itself where the screen is narrow."""
    header = element("tr", *(element("th", text, scope="col") for text in head))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", text) for text in row[1:])) for row in rows
    ]
    content = [element("caption", caption), element("thead", header), element("tbody", join(body))]
    return scrolling(element("table", *content, class_=class_), caption)


def scrolling(content: Markup, label: str) -> Markup:
    """Let something wide scroll within the page, with the keyboard too."""
    return element("div", content, class_="wide", tabindex="0", role="region", aria_label=label)


def facts(rows: Iterable[tuple[str, str]], *, caption: str) -> Markup:
    """Make a table of names and values."""
    return table(["what", "value"], rows, caption=caption, class_="facts")


def image(data: bytes, kind: str, *, alt: str, size: tuple[int, int]) -> Markup:
    """Inline a picture. kind: "png" or "jpeg"; size: (width, height) in CSS pixels."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return element("img", src=source, alt=alt, width=str(size[0]), height=str(size[1]))


def page(title: str, *content: Markup) -> str:
    """Make the whole document."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    ]
    body = element("body", element("main", join(content)))
    return f'<!DOCTYPE html>\n<html lang="en">\n{element("head", join(head))}\n{body}\n</html>\n'
