"""Pictures of a run: loss curves, sample panels, the learning-rate finder's plot."""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = tuple[np.ndarray, np.ndarray, np.ndarray]
GAIN = 4  # of the residual columns
TITLE_HEIGHT = 20
GAP = 4  # between columns
SMALLEST_CELL = 128  # a title needs that much; smaller pictures are enlarged by a whole factor
LAYOUT = "layout"  # the PNG text chunk that says where the pictures of a panel are
TRAIN_COLOUR, VALIDATION_COLOUR = "#3a86c8", "#d9661f"  # legible on white and on near-black
TITLES = {"psnr_y": "validation PSNR-Y [dB], EMA weights", "colour_drift": "validation colour drift [code values]"}
INK = "#010203"  # what becomes the page's text colour in SVG


# Panels


def write_panel(rows: Sequence[Row], path: Path) -> None:
    """Write rows of LR (nearest), bilinear, prediction, target, residual and ideal residual side by side.

    The residuals are prediction - bilinear and target - bilinear, GAIN times enlarged around mid-grey. At scale 1 the
    input stands for both of the first columns.

    rows: (lr, sr, hr) uint8 RGB, of the same sizes in each row; sr and hr have one size.
    Raises: ResourceError if the file cannot be written.
    """
    columns = ["nearest", "bilinear", "prediction", "target", f"residual x{GAIN}", f"ideal residual x{GAIN}"]
    is_same_size = rows[0][0].shape == rows[0][2].shape
    cells = [panel_cells(*row)[is_same_size:] for row in rows]
    if is_same_size:
        columns[:2] = ["input"]
    write_sheet([columns] * len(rows), cells, path, lr_size=rows[0][0].shape[:2])


def panel_cells(lr: np.ndarray, sr: np.ndarray, hr: np.ndarray) -> list[np.ndarray]:
    """Give the six pictures of a panel's row, each of hr's size, uint8 RGB."""
    size = (hr.shape[1], hr.shape[0])
    small = Image.fromarray(lr)
    nearest = np.asarray(small.resize(size, Image.Resampling.NEAREST))
    bilinear = np.asarray(small.resize(size, Image.Resampling.BILINEAR))
    return [nearest, bilinear, sr, hr, _residual(sr, bilinear), _residual(hr, bilinear)]


def _residual(image: np.ndarray, base: np.ndarray) -> np.ndarray:
    shown: np.ndarray = np.clip(128 + GAIN * (image.astype(np.int16) - base), 0, 255).astype(np.uint8)
    return shown


def write_sheet(
    titles: Sequence[Sequence[str]],
    cells: Sequence[Sequence[np.ndarray]],
    path: Path,
    *,
    lr_size: tuple[int, ...],
) -> None:
    """Write rows of pictures of one size, each below its title; pictures too narrow for a title are enlarged.

    titles: of each row, one for each column. cells: (H, W, 3) uint8 RGB. lr_size: (height, width), for `read_panel`.
    Raises: ResourceError if the file cannot be written.
    """
    height, width = cells[0][0].shape[:2]
    zoom = -(-SMALLEST_CELL // width)
    pitch = (width * zoom + GAP, height * zoom + TITLE_HEIGHT)
    sheet = Image.new("RGB", (pitch[0] * len(cells[0]) - GAP, pitch[1] * len(cells)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for row, (names, pictures) in enumerate(zip(titles, cells, strict=True)):
        for column, (name, picture) in enumerate(zip(names, pictures, strict=True)):
            left, top = column * pitch[0], row * pitch[1]
            draw.text((left + 3, top + 1), _fitting(name, font, width * zoom - 6), fill="black", font=font)
            sheet.paste(Image.fromarray(picture.repeat(zoom, 0).repeat(zoom, 1)), (left, top + TITLE_HEIGHT))
    layout = {"rows": len(cells), "size": [height, width], "lr_size": list(lr_size), "zoom": zoom}
    layout |= {"gap": GAP, "title_height": TITLE_HEIGHT, "columns": list(titles[0])}
    info = PngInfo()
    info.add_text(LAYOUT, json.dumps(layout))
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG", pnginfo=info)


def _fitting(text: str, font: Any, width: int) -> str:
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def read_panel(path: Path) -> list[Row]:
    """Cut (lr, sr, hr) out of a panel that `write_panel` wrote.

    Raises: ValueError or OSError if it is none.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(LAYOUT)
            panel = np.asarray(image.convert("RGB"))
        layout = json.loads(text or "null")
        zoom, titles, columns = layout["zoom"], layout["title_height"], layout["columns"]
        (height, width), (lr_height, lr_width) = layout["size"], layout["lr_size"]
        rows = []
        for row in range(layout["rows"]):
            top = titles + row * (height * zoom + titles)
            cell = {
                name: panel[top : top + height * zoom : zoom, left : left + width * zoom : zoom]
                for name, left in zip(columns, range(0, panel.shape[1], width * zoom + layout["gap"]), strict=True)
            }
            # Sampled in the middle, where any whole factor's enlargement keeps the low-resolution value.
            factor = height // lr_height
            lr = cell["nearest" if "nearest" in cell else "input"]
            rows.append((lr[factor // 2 :: factor, factor // 2 :: factor], cell["prediction"], cell["target"]))
        if any(lr.shape[:2] != (lr_height, lr_width) or hr.shape[:2] != (height, width) for lr, _, hr in rows):
            raise ValueError(f"{path}: the pictures are not where its layout says")
    except (KeyError, TypeError, ZeroDivisionError, RecursionError, Image.DecompressionBombError) as exc:
        raise ValueError(f"{path}: not a panel of sr-train ({exc})") from exc
    return [(np.ascontiguousarray(lr), np.ascontiguousarray(sr), np.ascontiguousarray(hr)) for lr, sr, hr in rows]


# Curves


@dataclass(frozen=True)
class Curve:
    """Values over steps, both float64 of one length; NaN where a value is missing or not finite."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Metric:
    """What was measured in training, in validation or in both; a loss is looked at on logarithmic axes too.

    span: first and last step of the log.
    """

    name: str
    span: tuple[float, float]
    train: Curve | None = None
    validation: Curve | None = None
    is_loss: bool = True

    @property
    def title(self) -> str:
        """Name it for people, with its unit."""
        return TITLES.get(self.name, f"loss term {self.name}" if self.is_loss and self.name != "loss" else self.name)

    def best(self) -> tuple[float, float] | None:
        """Give (step, value) of the best validation: the highest of a similarity, the lowest of an error."""
        if self.validation is None:
            return None
        is_similarity = self.name.startswith(("psnr", "ssim"))
        place = int((np.nanargmax if is_similarity else np.nanargmin)(self.validation.values))
        return float(self.validation.steps[place]), float(self.validation.values[place])


def number(value: object) -> float:
    """Take a value of the log for a number; NaN if it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return math.nan
    return float(value)


def validation_of(entry: dict[str, Any]) -> dict[str, float]:
    """Give what an entry of the log measured on the validation pictures; {} if nothing."""
    values = entry.get("validation")
    if not isinstance(values, dict):
        return {}
    return {str(name): number(value) for name, value in values.items() if value is not None}


def read_metrics(entries: Sequence[Any]) -> list[Metric]:
    """Sort a log by what was measured: qualities first, then the loss and its terms. Lines may lack anything."""
    lines = [entry for entry in entries if isinstance(entry, dict) and not math.isnan(number(entry.get("done_steps")))]
    steps = np.array([number(entry["done_steps"]) for entry in lines])
    terms = [entry["terms"] if isinstance(entry.get("terms"), dict) else {} for entry in lines]
    validations = [validation_of(entry) for entry in lines]
    term_names = sorted({str(name) for values in terms for name in values})
    validated = sorted({name for values in validations for name in values})

    def curve(rows: Sequence[dict[str, Any]], name: str, *, is_sparse: bool) -> Curve | None:
        kept = [index for index, row in enumerate(rows) if name in row or not is_sparse]
        values = np.array([number(rows[index].get(name)) for index in kept])
        return Curve(steps[kept], values) if np.isfinite(values).any() else None

    shared = [name for name in term_names if name in validated]
    if len(shared) > 1:  # the sums are then of the same terms, so they can be compared
        terms = [row | {"loss": sum(number(row.get(name)) for name in shared)} for row in terms]
        validations = [
            {"loss": sum(row[name] for name in shared), **row} if row.keys() >= set(shared) else row
            for row in validations
        ]
        validated = sorted({"loss", *validated})
    qualities = [name for name in validated if name not in term_names and name != "loss"]
    qualities.sort(key=lambda name: (list(TITLES).index(name) if name in TITLES else len(TITLES), name))
    span = (float(steps.min()), float(steps.max())) if lines else (0.0, 0.0)
    found = [Metric(name, span, None, curve(validations, name, is_sparse=True), is_loss=False) for name in qualities]
    for name in ["loss"] * ("loss" in validated) + [name for name in term_names if name != "loss"]:
        found.append(Metric(name, span, curve(terms, name, is_sparse=False), curve(validations, name, is_sparse=True)))
    return [metric for metric in found if metric.train is not None or metric.validation is not None]


def stage_borders(entries: Sequence[Any]) -> list[tuple[float, str]]:
    """List after which step each stage began, with its name."""
    borders: list[tuple[float, str]] = []
    for entry in entries:
        if isinstance(entry, dict) and (not borders or str(entry.get("stage")) != borders[-1][1]):
            begin = number(entry.get("done_steps")) - number(entry.get("step"))
            if not math.isnan(begin):
                borders.append((max(0.0, begin), str(entry.get("stage"))))
    return borders


def thin(curve: Curve, *, buckets: int = 160) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reduce a curve to (steps, lowest, mean, highest) of at most so many buckets of equal width; spikes remain.

    A bucket whose values are all missing is NaN, a gap; a curve of fewer points is left as it is.
    """
    order = np.argsort(curve.steps, kind="stable")
    steps, values = curve.steps[order], curve.values[order]
    if len(steps) <= buckets or steps[0] == steps[-1]:
        return steps, values, values, values
    bucket = np.minimum((steps - steps[0]) / (steps[-1] - steps[0]) * buckets, buckets - 1).astype(int)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    sums, counts = np.add.reduceat(np.nan_to_num(values), starts), np.add.reduceat(~np.isnan(values) + 0.0, starts)
    middles = np.add.reduceat(steps, starts) / np.diff(starts, append=len(steps))
    mean = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    return middles, np.fmin.reduceat(values, starts), mean, np.fmax.reduceat(values, starts)


def write_loss_curve(entries: Sequence[Any], path: Path) -> None:
    """Plot validation qualities, and every loss term on linear and logarithmic axes, over the steps of a run.

    entries: the log, see train.run_folder.read_log; lines and keys may be missing.
    Raises: ResourceError if the file cannot be written.
    """
    found, borders = read_metrics(entries), stage_borders(entries)
    charts: list[tuple[Metric, bool] | None] = [(metric, False) for metric in found if not metric.is_loss]
    charts += [None] * (len(charts) % 2)  # the place stays empty
    charts += [(metric, is_log) for metric in found if metric.is_loss for is_log in (False, True)]
    with _drawing():
        rows = max(1, len(charts) // 2)
        figure, places = new_figure(rows, 2, size=(12, 3 * rows))
        for place, chart in zip(places.flat, charts or [None, None], strict=True):
            if chart is None:
                place.set_axis_off()
                continue
            metric, is_log = chart
            title = f"{metric.title}, logarithmic" if is_log else metric.title
            if not metric.is_loss and (best := metric.best()):
                title += f": best {best[1]:.4g} at step {best[0]:.0f}"
            place.set_title(printable(title), fontsize=10, loc="left")
            draw_metric(place, metric, borders, is_log=is_log)
        if not charts:
            places[0, 0].text(0, 1, "nothing logged yet", va="top")
        _save(figure, path)


def draw_metric(axes: Axes, metric: Metric, borders: Sequence[tuple[float, str]], *, is_log: bool) -> None:
    """Draw a metric in training and in validation, and where stages begin."""
    if metric.train is not None:
        draw_curve(axes, metric.train, "training", TRAIN_COLOUR)
    if metric.validation is not None:
        draw_curve(axes, metric.validation, "validation", VALIDATION_COLOUR)
    curves = [curve for curve in (metric.train, metric.validation) if curve is not None]
    if is_log and any((curve.values > 0).any() for curve in curves):
        axes.set_yscale("log", nonpositive="mask")
    first, last = metric.span
    margin = max(1.0, 0.02 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    _finish(axes)
    if metric.validation is not None and not metric.is_loss:
        _look_at_late_values(axes, [metric.validation])
    for step, name in borders if len(borders) > 1 else ():
        axes.axvline(step, color=INK, alpha=0.4, linewidth=0.8, linestyle="--")
        label = printable(f"stage {name}")[:24]
        axes.annotate(
            label, (step, 0), (2, 3), ("data", "axes fraction"), "offset points", rotation=90, fontsize=7, va="bottom"
        )
    if len(curves) == 2:
        axes.legend(fontsize=8, frameon=False)


def _look_at_late_values(axes: Axes, curves: Sequence[Curve]) -> None:
    """Leave the beginnings out of the view if they make all that follows flat lines, and say so."""
    is_late = [curve.steps >= curve.steps[0] + 0.05 * (curve.steps[-1] - curve.steps[0]) for curve in curves]
    if not curves:
        return
    late = np.concatenate([curve.values[chosen] for curve, chosen in zip(curves, is_late, strict=True)])
    everything = np.concatenate([curve.values for curve in curves])
    if np.isfinite(late).sum() < 3:
        return
    low, high, lowest, highest = np.nanmin(late), np.nanmax(late), np.nanmin(everything), np.nanmax(everything)
    if low == high or highest - lowest < 4 * (high - low):
        return
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    outside = [f"down to {lowest:.4g}"] * bool(lowest < low) + [f"up to {highest:.4g}"] * bool(highest > high)
    note = f"outside, at the beginning: {' and '.join(outside)}"
    height = 0.22 if lowest < low else 0.88  # beside where the curve leaves the view
    axes.annotate(note, (0.98, height), xycoords="axes fraction", fontsize=8, ha="right")


def draw_curve(axes: Axes, curve: Curve, label: str, colour: str) -> None:
    """Draw a curve; one of many points as the means of its buckets in a band from their lowest to highest values."""
    steps, low, mean, high = thin(curve)
    axes.plot(steps, mean, label=label, color=colour, linewidth=1.2, marker="." if len(steps) < 100 else None)
    if len(steps) < len(curve.steps):
        axes.fill_between(steps, low, high, color=colour, alpha=0.3, linewidth=0)


def metric_svg(metric: Metric, borders: Sequence[tuple[float, str]], *, is_log: bool = False) -> str:
    """Draw a metric as an SVG element for an HTML page, in the page's text colour; without a title."""
    buffer = io.BytesIO()
    with _drawing(salt=repr((metric.name, is_log))):
        figure, places = new_figure(1, 1, size=(6, 3))
        draw_metric(places[0, 0], metric, borders, is_log=is_log)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("xlink:href=", "href=")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    return re.sub(r'<g id="[^"]*"', "<g", svg)  # they are the same in every chart


def write_rate_plot(rates: Sequence[float], losses: Sequence[float], suggestion: float | None, path: Path) -> None:
    """Plot loss over learning rate with the suggestion marked, if there is one.

    Raises: ResourceError if the file cannot be written.
    """
    with _drawing():
        figure, axes = new_figure(1, 1, size=(6, 4))
        place = axes[0, 0]
        place.plot(rates, losses)
        place.set(xlabel="learning rate", ylabel="smoothed loss", xscale="log")
        place.xaxis.set_major_formatter("{x:.0e}")
        if suggestion is not None:
            place.axvline(suggestion, linestyle="--", color="tab:red", label=f"suggestion {suggestion:.1e}")
            place.legend()
        _save(figure, path)


def write_comparison(curves: Sequence[tuple[str, Sequence[Curve | None]]], labels: Sequence[str], path: Path) -> None:
    """Plot several runs in one picture. curves: the title of each plot, and a curve for each label, if there is one.

    Raises: ResourceError if the file cannot be written.
    """
    with _drawing():
        figure, places = new_figure(1, len(curves), size=(6 * len(curves), 4.5))
        shown: dict[str, Any] = {}
        for place, (title, run_curves) in zip(places[0], curves, strict=True):
            for index, (label, curve) in enumerate(zip(labels, run_curves, strict=True)):
                if curve is not None:
                    draw_curve(place, curve, printable(label), f"C{index}")
            place.set_title(printable(title), fontsize=10, loc="left")
            _finish(place)
            _look_at_late_values(place, [curve for curve in run_curves if curve is not None])
            handles, names = place.get_legend_handles_labels()
            shown |= dict(zip(names, handles, strict=True))
        if shown:
            columns = min(3, len(shown))
            figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns, fontsize=8)
        _save(figure, path)


def printable(text: str) -> str:
    """Replace what no font and no file can show."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        decades = math.log10(high / low)
        # 0.02 instead of powers of ten, and as many between them as there is room for.
        digits = {1} if decades > 2.5 else {1, 2, 5}

        def label(y: float, _: object) -> str:
            is_shown = decades < 1 or (y > 0 and round(y / 10 ** math.floor(math.log10(y))) in digits)
            return f"{y:.3g}" if is_shown else ""

        if decades < 1:
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(label))
        axes.yaxis.set_minor_formatter(FuncFormatter(label))
    else:
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("step")
    axes.grid(alpha=0.25, linewidth=0.5)


@contextmanager
def _drawing(*, salt: str = "") -> Iterator[None]:
    """Set what holds for every picture: names are no formulas, and characters that the font lacks are no news."""
    from matplotlib import rc_context

    ink: Any = {f"{key}.color": INK for key in ("text", "xtick", "ytick")}
    ink |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "grid.color": INK}
    with warnings.catch_warnings(), rc_context({"text.parse_math": False, "svg.fonttype": "none", **ink}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with rc_context({"svg.hashsalt": salt} if salt else {}):
            yield


def new_figure(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Make a figure of `size` inches and its axes, an array (rows, columns). Raises: ImportError without matplotlib."""
    # The object interface needs no display and no global state, unlike pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
