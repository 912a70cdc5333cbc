"""Low-resolution pictures that come as files: read with their photographs, or written for others to read."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image

from .atomic import read_json, replacing, write_json
from .commands import OneLineErrors, show_bar, silent
from .degrade import degrade
from .errors import DataError, RecipeError, ResourceError
from .pictures import describe_fault, find_pictures, read_picture
from .recipe import DegradeConfig, differences, load_recipe

if TYPE_CHECKING:
    from .data import PairedPhotographs

MARKER = "pairs.json"  # says how a folder of pairs was made
FORMAT = 1


# Reading


def match_pairs(lr_folder: Path, hr_folder: Path, *, scale: int) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Match the pictures below two folders by their path without suffix; "0801x4" is also a name of "0801" at x4.

    Returns: (LR, HR) paths sorted by HR path, and what is wrong: pictures without a partner, or with several.
    Raises: DataError if a folder is missing or holds no pictures.
    """
    lr_paths, faults = _by_name(lr_folder)
    hr_paths, more = _by_name(hr_folder)
    faults += more
    pairs = []
    for name, path in lr_paths.items():
        plain = name if name in hr_paths else name.removesuffix(f"x{scale}")
        if plain not in hr_paths:
            faults.append(f"{path} (no partner in {hr_folder})")
        elif plain != name and plain in lr_paths:
            faults.append(f"{path} ({lr_paths[plain].name} has the same partner)")
        else:
            pairs.append((path, hr_paths[plain]))
    matched = {hr for _, hr in pairs}
    faults += [f"{path} (no partner in {lr_folder})" for path in hr_paths.values() if path not in matched]
    return sorted(pairs, key=lambda pair: pair[1]), faults


def _by_name(folder: Path, *, tells_others: bool = False) -> tuple[dict[str, Path], list[str]]:
    """Give the pictures below a folder by relative path without suffix, and those whose name is taken."""
    paths: dict[str, Path] = {}
    faults = []
    for path in find_pictures(folder, tells_others=tells_others):
        first = paths.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
        if first != path:
            faults.append(f"{path} ({first.name} has the same name)")
    return paths, faults


def read_pairs(
    lr_folder: Path,
    hr_folder: Path,
    *,
    scales: Sequence[int],
    smallest_side: int,
    progress: Callable[[int, int], None] = silent,
) -> PairedPhotographs:
    """Decode two folders of pictures that belong together.

    scales: the recipe's; a single one, by which each HR picture is larger than its LR picture.
    smallest_side: of the HR pictures, the largest training size.
    Raises: DataError that lists every file without a partner, unreadable, too small, or of another scale;
    RecipeError for several scales; ResourceError if the pictures do not fit into memory.
    """
    from .data import PairedPhotographs, decode_all

    if len(scales) != 1:
        raise RecipeError(f"pairs have one scale, the recipe trains {list(scales)}; use --set model.scales=[2]")
    pairs, faults = match_pairs(lr_folder, hr_folder, scale=scales[0])
    total = 2 * len(pairs)
    lr_paths, hr_paths = [lr for lr, _ in pairs], [hr for _, hr in pairs]
    lr_pictures, unreadable = decode_all(lr_paths, folder=lr_folder, progress=lambda n, _: progress(n, total))
    faults += [f"{lr_folder / text}" for text in unreadable]
    hr_pictures, unreadable = decode_all(
        hr_paths, folder=hr_folder, progress=lambda n, _: progress(len(pairs) + n, total)
    )
    faults += [f"{hr_folder / text}" for text in unreadable]
    ratios = set()
    for path, lr, hr in zip(hr_paths, lr_pictures, hr_pictures, strict=True):
        if not (lr.size and hr.size):
            continue
        ratios.add(pair_scale(lr, hr))
        if pair_scale(lr, hr) != scales[0]:
            sizes = f"LR {lr.shape[1]}x{lr.shape[0]}, HR {hr.shape[1]}x{hr.shape[0]}"
            faults.append(f"{path} ({sizes}: not x{scales[0]})")
        elif min(hr.shape[:2]) < smallest_side:
            faults.append(f"{path} ({hr.shape[1]}x{hr.shape[0]} pixels, smaller than {smallest_side})")
    if faults:
        ratio = ratios.pop() if len(ratios) == 1 else None
        cure = f"all are x{ratio}: use --set model.scales=[{ratio}]; " if ratio not in (None, scales[0]) else ""
        raise DataError(f"{len(faults)} pictures cannot be trained on as pairs: {cure}{'; '.join(faults)}")
    return PairedPhotographs(tuple(hr_paths), tuple(hr_pictures), lr_pictures=tuple(lr_pictures))


def pair_scale(lr: np.ndarray, hr: np.ndarray) -> int | None:
    """Give the whole number by which hr (H, W, 3) is larger than lr (h, w, 3) on both sides; None if there is none."""
    scale = hr.shape[0] // lr.shape[0]
    return scale if scale and hr.shape[:2] == (lr.shape[0] * scale, lr.shape[1] * scale) else None


# Writing


def write_pairs(
    hr_folder: Path,
    out: Path,
    *,
    config: DegradeConfig,
    scale: int,
    seed: int,
    progress: Callable[[int, int], None] = silent,
) -> int:
    """Degrade every picture of a folder and write PNG pairs: out/lr and out/hr, the latter cut to the scale's grid.

    The damage depends on the seed and the picture's name below the folder alone. Pairs that are there already are
    left, so the same call goes on where one was ended. config: its crop_scale is for crops, and does nothing here.
    Returns: how many pairs are in the folder.
    Raises: DataError if `out` holds anything else, or lists, after the others are written, what is unreadable or small;
    ResourceError if the disk is full or cannot be written.
    """
    if out.resolve().is_relative_to(hr_folder.resolve()):
        raise DataError(f"{out}: inside {hr_folder}, whose pictures it is made of; name a folder elsewhere")
    sources, faults = _by_name(hr_folder, tells_others=True)
    if faults:
        raise DataError(f"{hr_folder}: names must differ in more than the suffix: {'; '.join(faults)}")
    _claim(out, {"format": FORMAT, "scale": scale, "seed": seed, "degrade": asdict(config)})
    for index, (name, path) in enumerate(sources.items()):
        targets = [out / part / f"{name}.png" for part in ("lr", "hr")]
        # Both are made anew if one is missing or empty: the picture may be another by now.
        if not all(target.is_file() and target.stat().st_size for target in targets):
            try:
                hr = _read_on_grid(path, scale)
            except MemoryError as exc:
                raise ResourceError(f"{path}: memory ended; make it smaller, or leave it out") from exc
            except Exception as exc:  # decoders raise nearly anything on broken files
                faults.append(f"{path.relative_to(hr_folder)} ({describe_fault(exc)})")
            else:
                lr = degrade(hr, scale=scale, config=config, rng=_rng(seed, name))
                for picture, target in zip((lr, hr), targets):
                    _write_png(picture, target)
        progress(index + 1, len(sources))
    if faults:
        raise DataError(f"{hr_folder}: {len(faults)} pictures have no pair, remove them: {'; '.join(faults)}")
    return len(sources)


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng((seed, *hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()))


def _read_on_grid(path: Path, scale: int) -> np.ndarray:
    """Read a picture and cut it at right and bottom to multiples of the scale: (H, W, 3) uint8 RGB."""
    hr = read_picture(path)
    height, width = (side // scale * scale for side in hr.shape[:2])
    if not (height and width):
        raise ValueError(f"{hr.shape[1]}x{hr.shape[0]} pixels, too small for x{scale}")
    return hr[:height, :width]


def _write_png(picture: np.ndarray, path: Path) -> None:
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary, "PNG")


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Mark a new or empty folder as ours, or see that it was made with the same settings."""
    marker = out / MARKER
    wanted = json.loads(json.dumps(settings))
    if marker.is_file():
        try:
            changes = differences(read_json(marker), wanted)
        except (OSError, ValueError) as exc:
            raise DataError(f"{marker}: damaged ({exc}); name a new folder") from exc
        if changes:
            raise DataError(f"{out}: holds pairs that were made otherwise ({'; '.join(changes)}); name a new folder")
    elif out.exists() and not (out.is_dir() and _is_empty(out.iterdir())):
        raise DataError(f"{out}: holds other files, which are not overwritten; name a new folder")
    else:
        write_json(wanted, marker)


def _is_empty(items: Iterator[Path]) -> bool:
    return next(items, None) is None


# The command


@click.command("degrade", cls=OneLineErrors)
@click.argument("hr_folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", default="fast", show_default=True, help="Whose damages and scale are taken.")
@click.option("--task", help="Take the damages, and the scale if it has one, of a task.")
@click.option("--scale", type=click.IntRange(1, 64), help="Default: the first one of the recipe.")
@click.option("--seed", type=click.IntRange(min=0), help="Default: the recipe's.")
def degrade_command(
    hr_folder: Path, out: Path, recipe_name: str, task: str | None, scale: int | None, seed: int | None
) -> None:
    """Write what a network would be trained on: the pictures in HR_FOLDER and, in OUT/lr, what a recipe makes of them.

    OUT is a new folder, or one that this command has begun: then it goes on.
    """
    recipe = load_recipe(recipe_name, task=task)
    with click.progressbar(length=0, label="degrading", file=sys.stderr) as bar:
        count = write_pairs(
            hr_folder,
            out,
            config=recipe.degrade,
            scale=scale or recipe.model.scales[0],
            seed=recipe.seed if seed is None else seed,
            progress=partial(show_bar, bar),
        )
    click.echo(f"{count} pairs in {out}")
