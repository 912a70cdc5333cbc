"""The first thing to run: enlarge a real photograph, look at it, see what it cost and gained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from PIL import Image

from sdk import SRError, Upscaler, files
from sdk.compare import side_by_side

from .pictures import BILINEAR, enlarge, read_picture
from .quality import crop_to_scale, reduce, score

# NASA's portrait of Eileen Collins, public domain, as distributed with scikit-image.
PHOTOGRAPH = Path(__file__).parent.parent / "export" / "pictures" / "astronaut.webp"
CROP = 160  # pixels of the original that the panel shows, enlarged
ZOOM = 2
FACE = (62, 168)  # top and left of the crop in the photograph above
REPEATS = 5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("photograph", type=click.Path(path_type=Path), default=PHOTOGRAPH)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder to write."
)
@click.option("--model", help="A shipped model or a bundle folder.")
def main(photograph: Path, out: Path, model: str | None) -> None:
    """Reduce PHOTOGRAPH, enlarge it again, and write the result and a side-by-side panel."""
    try:
        run(photograph, out, model)
    except SRError as exc:
        raise click.ClickException(str(exc)) from exc


def run(photograph: Path, out: Path, model: str | None) -> None:
    """Do it and print what was measured.

    Raises: SRError if the photograph cannot be read or the results cannot be written.
    """
    with Upscaler(model) as upscaler:
        scale = upscaler.scale
        hr = crop_to_scale(read_picture(photograph), scale, name=str(photograph))
        lr = reduce(hr, scale)
        upscaler.warmup((lr.shape[0], lr.shape[1]))
        ours, ours_ms = _timed(lambda: upscaler.upscale(lr))
        bilinear, bilinear_ms = _timed(lambda: enlarge(lr, scale, resample=BILINEAR))
        info = upscaler.info
    height, width = hr.shape[:2]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise click.ClickException(f"{out}: cannot be made ({exc.strerror})") from exc
    names = {"picture": out / f"{photograph.stem}_x{scale}.png", "panel": out / "panel.png"}
    middle = (height // 2 - CROP // 2, width // 2 - CROP // 2)
    panel = _panel(lr, bilinear, ours, hr, corner=FACE if photograph == PHOTOGRAPH else middle)
    for path, image in ((names["picture"], ours), (names["panel"], panel)):
        files.write(path, image, files.Metadata(), quality=95, overwrite=True)
    click.echo(f"picture  {names['picture']}\npanel    {names['panel']}")
    click.echo(f"model    {info['model']}, {info['engine']} on {info['device']}, {info['precision']}")
    click.echo(f"size     {lr.shape[1]}x{lr.shape[0]} -> {width}x{height}")
    click.echo(f"time     {ours_ms:.1f} ms; bilinear {bilinear_ms:.1f} ms")
    ours_db, bilinear_db = (score(sr, hr, scale=scale)["psnr_y_db"] for sr in (ours, bilinear))
    click.echo(f"PSNR-Y   {ours_db:.2f} dB; bilinear {bilinear_db:.2f} dB")


def _timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """Give the result and the median time in ms."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - start) * 1000)
    return result, statistics.median(times)


def _panel(
    lr: np.ndarray, bilinear: np.ndarray, ours: np.ndarray, hr: np.ndarray, *, corner: tuple[int, int]
) -> np.ndarray:
    """Show a crop of LR, nearest, bilinear, ours and the original, each pixel ZOOM times as large."""
    scale = hr.shape[0] // lr.shape[0]
    nearest = enlarge(lr, scale, resample=Image.Resampling.NEAREST)
    height, width = (min(CROP, side) for side in hr.shape[:2])
    top, left = (min(start, side - CROP) // scale * scale for start, side in zip(corner, hr.shape[:2]))
    top, left = max(0, top), max(0, left)

    def cell(image: np.ndarray) -> Image.Image:
        crop = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
        return crop.resize((width * ZOOM, height * ZOOM), Image.Resampling.NEAREST)

    small = Image.new("RGB", (width * ZOOM, height * ZOOM), "white")
    reduced = cell(nearest).reduce(scale)
    small.paste(reduced, ((small.width - reduced.width) // 2, (small.height - reduced.height) // 2))
    titles = ("nearest", "bilinear", "sr-sdk", "original")
    cells = [(title, cell(picture)) for title, picture in zip(titles, (nearest, bilinear, ours, hr))]
    return side_by_side([("low resolution", small), *cells])


if __name__ == "__main__":
    main()
