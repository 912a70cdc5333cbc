"""Write a run's report: one HTML file that holds everything, for a browser without a network."""

from __future__ import annotations

import io
import math
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import click
from PIL import Image

from .atomic import read_json, replacing
from .checkpoint import FACTS as STATE
from .checkpoint import latest_checkpoint, stage_folder
from .commands import OneLineErrors
from .compare import as_text, flat
from .plots import GAIN, Metric, metric_svg, number, read_metrics, read_panel, stage_borders, validation_of
from .recipe import Recipe, load_recipe, recipe_names
from .report_page import Markup, breakable, element, facts, image, join, page, scrolling, table
from .run_folder import FACTS, LOG, load_run, read_log

PAGE = "report.html"  # in a run's folder
QUIET_SECONDS = 300  # a run that logged within this time is taken for running
STRIP_LENGTH = 12
THUMBNAIL = 160
NOT_KNOWN = "not known"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    out: the HTML file; default: report.html in the run folder.
    Returns: the file.
    Raises: CheckpointError if the folder is not a run; ResourceError if the file cannot be written.
    """
    recipe, log, known = load_run(run), read_log(run), _read_table(run / FACTS)
    name = run.resolve().name
    state, explanation = run_state(run, recipe, log)
    document = page(
        f"{name}: {state}",
        element("h1", name),
        element("p", element("span", state, class_=f"state {state}"), f" {explanation}"),
        element("p", f"Written {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}.", class_="soft"),
        *_training(recipe, known),
        *_curves(log),
        *_panels(run),
        *_measurements(run, recipe, log),
        *_circumstances(known),
    )
    out = out or run / PAGE
    with replacing(out) as temporary:
        # A log may hold halves of surrogate pairs, which UTF-8 cannot.
        temporary.write_text(document, encoding="utf-8", errors="replace")
    return out


def run_state(run: Path, recipe: Recipe, log: list[dict[str, Any]]) -> tuple[str, str]:
    """Tell "finished", "running" or "stopped", and why in a sentence."""
    last = log[-1] if log else {}
    position = f"step {_text(last.get('done_steps', 0))} of {_text(last.get('all_steps', NOT_KNOWN))}"
    stages = [_read_table(stage_folder(run, stage.name) / STATE) for stage in recipe.stages]
    if all(stages) and all(facts.get("complete", True) for facts in stages):
        return "finished", f"Every stage of the recipe is trained; {position}."
    try:
        quiet = max(0.0, time.time() - (run / LOG).stat().st_mtime)
    except OSError:
        return "stopped", "Nothing is logged yet."
    checkpoint = latest_checkpoint(run)
    # Whoever stops a run by a signal or --max-steps makes it save at the step where it ends.
    is_saved = checkpoint is not None and number(last.get("done_steps")) <= _step_of(checkpoint)
    if quiet < QUIET_SECONDS and not is_saved:
        return "running", f"At {position}; the last line was logged {quiet:.0f} s before this report."
    saved = f"the newest checkpoint is {checkpoint.name}" if checkpoint else "there is no checkpoint"
    return "stopped", f"At {position}; {saved}. The command goes on from there."


def _training(recipe: Recipe, known: dict[str, Any]) -> list[Markup]:
    """Say what is trained: in words, and all values with those that differ from the shipped recipe marked."""
    values = flat(recipe)
    shipped = flat(load_recipe(recipe.name)) if recipe.name in recipe_names() else None
    changed = [] if shipped is None else [key for key in (*values, *shipped) if values.get(key) != shipped.get(key)]
    changed = list(dict.fromkeys(changed))
    if shipped is None:
        difference = f"No recipe named {recipe.name!r} is shipped to compare with."
    else:
        count = "1 value differs" if len(changed) == 1 else f"{len(changed) or 'No'} values differ"
        difference = f"{count} from the shipped recipe {recipe.name!r}."
    head = ["value", "in this run"] + (["as shipped"] if shipped is not None else [])
    rows = []
    for key in dict.fromkeys([*changed, *values]):
        cells = [element("th", breakable(key), scope="row"), element("td", as_text(values.get(key)))]
        if shipped is not None:
            cells.append(element("td", as_text(shipped.get(key)) + " (differs)" * (key in changed)))
        rows.append(element("tr", *cells, class_="changed" if key in changed else "same"))
    header = element("thead", element("tr", *(element("th", text, scope="col") for text in head)))
    caption = element("caption", "Every value of the recipe in effect; those that differ come first, marked.")
    whole = element("table", caption, header, element("tbody", join(rows)), class_="recipe")
    return [
        element("h2", "What is trained"),
        *(element("p", sentence) for sentence in in_words(recipe, paired=known.get("low_resolution"))),
        element("p", _origin(known)),
        element("p", difference),
        element("details", element("summary", "The whole recipe"), scrolling(whole, "The whole recipe")),
    ]


def in_words(recipe: Recipe, *, paired: str | None = None) -> list[str]:
    """Describe a recipe for people: network, input, loss, and a sentence for each stage.

    paired: the folder that the input came from, ready made.
    """
    model, degrade, loss = recipe.model, recipe.degrade, recipe.loss
    options = ", ".join(f"{key} {_text(value)}" for key, value in model.options.items())
    scales = " and ".join(f"x{scale}" for scale in model.scales)
    shares = [key.removesuffix("_probability") for key in asdict(degrade) if key.endswith("_probability")]
    damages = [f"{name} on {share:.0%}" for name in shares if (share := getattr(degrade, f"{name}_probability"))]
    is_kept = model.scales == (1,)
    made = "has the photographs' size" if is_kept else f"is a {degrade.resize} reduction"
    damaged = f"damaged: {', '.join(damages)} of the samples" if damages else "not damaged otherwise"
    source = (
        f"The input {made}, {damaged}." if paired is None else f"The input comes from the folder {paired!r}, as it is."
    )
    terms = [f"{loss.pixel} {loss.pixel_weight:g}"] if loss.pixel_weight else []
    named = {"pixel_weight", "feature_weight", "style_weight"}
    others = [key for key in asdict(loss) if key.endswith("_weight") and key not in named]
    terms += [f"{key.removesuffix('_weight')} {weight:g}" for key in others if (weight := getattr(loss, key))]
    if loss.feature_net:
        terms.append(f"features of {loss.feature_net} {loss.feature_weight:g} and their style {loss.style_weight:g}")
    sentences = [
        f"Recipe {recipe.name or 'without a name'!r} trains the network {model.name!r}"
        + (f" ({options})" if options else "")
        + (", which keeps the size" if is_kept else f" to enlarge {scales}")
        + f", with seed {recipe.seed}."
        f" {source} The loss adds up {', '.join(terms) or 'nothing'}, with these weights."
    ]
    for stage in recipe.stages:
        phases = [
            f"{phase.epochs:g} epochs at rates up to {phase.learning_rate:g}"
            + (" with a frozen encoder" if phase.freeze_encoder else "")
            + (f" ({phase.kind})" if phase.kind != "generator" else "")
            for phase in stage.phases
        ]
        sentences.append(
            f"Stage {stage.name}: crops of {stage.size} pixels in batches of {stage.batch}, {'; then '.join(phases)}."
        )
    return sentences


def _origin(known: dict[str, Any]) -> str:
    init = known.get("init")
    if isinstance(init, dict) and "bundle" in init:
        return f"It starts from stage {_text(init.get('stage'))} of the bundle {_text(init['bundle'])}."
    if isinstance(init, dict):
        whole = "" if init.get("complete", True) else ", which was not complete,"
        return (
            f"It starts from stage {_text(init.get('stage'))}{whole} of another run, after {_text(init.get('steps'))} "
            f"steps (commit {_text(init.get('commit'))}, data {_text(init.get('fingerprint'))}), made by: "
            f"{_text(init.get('command'))}"
        )
    return f"It starts from new weights; pretrained ones, where it takes any, are from: {_text(known.get('weights'))}."


def _curves(log: list[dict[str, Any]]) -> list[Markup]:
    borders = stage_borders(log)
    figures: dict[bool, list[Markup]] = {False: [], True: []}
    for metric in read_metrics(log):
        for is_log in (False, True) if metric.is_loss else (False,):
            title = f"{metric.title}, logarithmic" if is_log else metric.title
            summary = _summary(metric)
            # The drawing holds nothing but what plots.py and matplotlib have escaped.
            drawing = Markup(metric_svg(metric, borders, is_log=is_log))
            described = element("div", drawing, role="img", aria_label=f"Curve of {title} over the steps. {summary}")
            figure = element("figure", element("h3", title), described, element("figcaption", summary))
            figures[metric.is_loss].append(figure)
    heading = element("h2", "Curves")
    if not any(figures.values()):
        return [heading, element("p", "Nothing is logged yet.")]
    note = "Bands reach from the lowest to the highest value that falls together in the picture; lines are their means."
    grids = [element("div", join(group), class_="charts") for group in figures.values() if group]
    return [heading, element("p", note, class_="soft"), *grids]


def _summary(metric: Metric) -> str:
    parts = []
    for name, curve in (("training", metric.train), ("validation", metric.validation)):
        if curve is not None:
            values = curve.values[~_is_nan(curve.values)]
            parts.append(f"{name} from {values[0]:.4g} to {values[-1]:.4g}")
    best = metric.best()
    return "; ".join(parts) + (f"; best {best[1]:.4g} at step {best[0]:.0f}." if best else ".")


def _is_nan(values: Any) -> Any:
    return values != values


def _panels(run: Path) -> list[Markup]:
    """Show the newest panel whole, and of some of all panels the first picture's prediction."""
    heading = element("h2", "Pictures")
    paths = sorted(path for path in (run / "panels").glob("*.png") if path.is_file())
    if not paths:
        return [heading, element("p", "There are no panels yet.")]
    count = min(STRIP_LENGTH, len(paths))
    chosen = [paths[round(index * (len(paths) - 1) / max(1, count - 1))] for index in range(count)]
    thumbnails, target = [], None
    for path in chosen:
        try:
            _, prediction, target = read_panel(path)[0]
        except (OSError, ValueError):
            continue
        thumbnails.append(_thumbnail(prediction, f"step {path.stem.lstrip('0')}", "Prediction of the first picture"))
    if target is not None:
        thumbnails.append(_thumbnail(target, "target", "The photograph itself"))
    content = [heading]
    try:
        with Image.open(paths[-1]) as newest:
            newest.load()
            size, is_png = newest.size, newest.format == "PNG"
    except (OSError, ValueError, Image.DecompressionBombError):
        is_png = False
    if is_png:
        step = paths[-1].stem.lstrip("0")
        text = (
            f"The newest panel, of step {step}. Residuals, where it shows them, are the differences from the bilinear "
        )
        text += f"enlargement (at scale 1 from the input), {GAIN} times enlarged around mid-grey."
        alt = f"Rows of validation pictures after step {step}: input, bilinear, prediction, target and residuals"
        picture = image(paths[-1].read_bytes(), "png", alt=alt, size=size)
        content += [element("p", text), scrolling(picture, "The newest panel")]
    else:
        content.append(element("p", f"The newest panel, {paths[-1].name}, cannot be read."))
    if thumbnails:
        strip = element("div", *thumbnails, class_="strip", tabindex="0", role="region", aria_label="Panels over time")
        content += [element("h3", "The first picture over time"), strip]
    return content


def _thumbnail(picture: Any, caption: str, alt: str) -> Markup:
    """Show the middle of a picture, pixel by pixel."""
    height, width = picture.shape[:2]
    side = min(THUMBNAIL, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    buffer = io.BytesIO()
    Image.fromarray(picture[top : top + side, left : left + side]).save(buffer, "PNG")
    drawn = image(buffer.getvalue(), "png", alt=f"{alt}, {caption}", size=(THUMBNAIL, THUMBNAIL))
    return element("figure", drawn, element("figcaption", caption))


def _measurements(run: Path, recipe: Recipe, log: list[dict[str, Any]]) -> list[Markup]:
    """Tabulate each stage, and the first, last and best of all that validation measured."""
    rows, steps_before, skipped_before = [], 0.0, 0.0
    for stage in recipe.stages:
        lines = [line for line in log if line.get("stage") == stage.name]
        facts = _read_table(stage_folder(run, stage.name) / STATE)
        done = facts and ("complete" if facts.get("complete", True) else "as it stands")
        if not lines:
            rows.append([stage.name, *["-"] * 7, done or "not begun"])
            continue
        psnr = [(value, line) for line in lines if (value := validation_of(line).get("psnr_y", math.nan)) == value]
        drift = [value for line in lines if (value := validation_of(line).get("colour_drift", math.nan)) == value]
        best = max(psnr, key=lambda pair: pair[0]) if psnr else None
        speeds = [value for line in lines if (value := number(line.get("images_per_second"))) == value]
        steps, skipped = number(lines[-1].get("done_steps")), number(lines[-1].get("skipped"))
        rows.append(
            [
                stage.name,
                f"{steps - steps_before:.0f}",
                f"{best[0]:.3f}" if best else "-",
                _text(best[1].get("done_steps")) if best else "-",
                f"{psnr[-1][0]:.3f}" if psnr else "-",
                f"{drift[-1]:.3g}" if drift else "-",
                f"{median(speeds):.3g}" if speeds else "-",
                f"{skipped - skipped_before:.0f}" if skipped == skipped else "not logged",
                done or "not written yet",
            ]
        )
        steps_before, skipped_before = steps, skipped if skipped == skipped else 0.0
    head = ["stage", "steps", "best PSNR-Y [dB]", "at step", "last PSNR-Y [dB]", "last colour drift"]
    head += ["images/s (median)", "skipped steps", "weights"]
    content = [element("h2", "Measurements"), table(head, rows, caption="Stage by stage")]
    values = []
    for metric in read_metrics(log):
        if metric.validation is not None and (best_one := metric.best()):
            finite = metric.validation.values[~_is_nan(metric.validation.values)]
            numbers = [f"{value:.5g}" for value in (finite[0], finite[-1], best_one[1])]
            values.append([metric.title, *numbers, f"{best_one[0]:.0f}"])
    if values:
        caption = "Validation, of the averaged (EMA) weights"
        content.append(table(["what", "first", "last", "best", "at step"], values, caption=caption))
    return content


def _circumstances(known: dict[str, Any]) -> list[Markup]:
    """Tabulate on what and with what the run was made; facts this version does not know stand there too."""
    if not known:
        return [element("h2", "Circumstances"), element("p", f"{FACTS} is missing or cannot be read.")]
    versions = known.get("versions")
    listed = ", ".join(f"{key} {_text(value)}" for key, value in versions.items()) if isinstance(versions, dict) else ""
    data = {"data": "folder", "pictures": "pictures to train on", "fingerprint": "fingerprint of the pixels"}
    environment = {"device": "device", "precision": "precision", "commit": "commit of the code", "command": "command"}
    rows = [(title, _text(known.get(key))) for key, title in environment.items()]
    rows.insert(2, ("versions", listed or NOT_KNOWN))
    rows.append(("pretrained weights", _text(known.get("weights"))))
    others = sorted(known.keys() - data.keys() - environment.keys() - {"recipe", "versions", "weights", "init"})
    content = [
        element("h2", "Data"),
        facts([(title, _text(known.get(key))) for key, title in data.items()], caption="The photographs"),
        element("h2", "Environment"),
        facts([*rows, *((key, _text(known[key])) for key in others)], caption="What it ran on"),
    ]
    if isinstance(known.get("init"), dict):
        rows = [(str(key), _text(value)) for key, value in known["init"].items()]
        content += [element("h2", "Where the weights came from"), facts(rows, caption="The run it started from")]
    return content


def _read_table(path: Path) -> dict[str, Any]:
    """Read a JSON table; {} if there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _step_of(checkpoint: Path) -> float:
    digits = checkpoint.name.rpartition("-")[2]
    return float(digits) if digits.isdecimal() else math.nan


def _text(value: Any) -> str:
    return NOT_KNOWN if value is None else as_text(value)


@click.command("report", cls=OneLineErrors)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The HTML file. Default: report.html in the run folder.")
def report_command(run: Path, out: Path | None) -> None:
    """Write one HTML file about the run in folder RUN, finished or not."""
    click.echo(f"report: {write_report(run, out)}")
