"""Look at every picture of a data folder before a run depends on it: what is broken, small, or there twice."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import PIL
from PIL import Image

from .atomic import read_json, write_json
from .commands import OneLineErrors, show_bar, silent, usable_cores
from .errors import ResourceError
from .pictures import (
    FORMATS,
    copies_before,
    decode,
    describe_fault,
    find_pictures,
    hold_out,
    perceptual_hash,
    pixel_digest,
)

LOG = logging.getLogger(__name__)
CACHE_FORMAT = 1
SHOWN = 20  # lines of each list on the terminal


# One picture


@dataclass(frozen=True)
class PictureFacts:
    """What is known of a file. size: (height, width) as it is read. error: why it cannot be, empty where it can.

    converted: what reading changes, such as "L pixels become RGB". fleeting: the error may go away by itself.
    """

    size: tuple[int, int] = (0, 0)
    digest: str = ""
    perceptual_hash: int = 0
    converted: tuple[str, ...] = ()
    error: str = ""
    fleeting: bool = False


def inspect_picture(path: Path) -> PictureFacts:
    """Decode a file to the end and hash it; what is wrong with it is an answer, not an exception.

    Raises: ResourceError if memory ends.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            converted = _conversions(image)
            picture = decode(image)
    except MemoryError as exc:
        raise ResourceError(f"{path}: memory ended while it was decoded; use fewer --processes") from exc
    except Exception as exc:  # decoders raise nearly anything on broken files
        return PictureFacts(error=describe_fault(exc), fleeting=isinstance(exc, OSError) and exc.errno is not None)
    height, width = picture.shape[:2]
    return PictureFacts((height, width), pixel_digest(picture), perceptual_hash(picture), tuple(converted))


def _conversions(image: Image.Image) -> list[str]:
    """List what is lost when an opened, not yet decoded picture is read as 8-bit RGB."""
    frames = getattr(image, "n_frames", 1)
    # The mode of 16-bit colour is RGB as well: only the decoder's name for what is in the file tells.
    is_deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    found = [f"{image.mode} pixels become RGB"] if image.mode != "RGB" else []
    found += ["16 bits become 8"] if is_deep else []
    return found + ([f"{frames} frames, the first is read"] if frames > 1 else [])


# What is remembered from one check to the next


def cache_dir(name: str) -> Path:
    """Name a folder of the user's cache: below SR_CACHE_DIR, else ~/.cache/sr-sdk, as in the SDK.

    Raises: RuntimeError for a user without a home folder.
    """
    return Path(os.environ.get("SR_CACHE_DIR") or Path.home() / ".cache" / "sr-sdk") / name


def _cache_file(folder: Path) -> Path | None:
    """Name the file for one data folder; None without a place for it."""
    try:
        return cache_dir("pictures") / f"{hashlib.sha256(bytes(folder.resolve())).hexdigest()[:20]}.json"
    except RuntimeError:
        return None


def _cache_head() -> dict[str, Any]:
    return {"format": CACHE_FORMAT, "pillow": PIL.__version__}


def _load_cache(path: Path | None) -> dict[str, tuple[list[int], PictureFacts]]:
    """Read name -> (size in bytes and mtime_ns, facts); nothing if the file is missing, damaged or of another form."""
    if path is None:
        return {}
    try:
        stored = read_json(path)
        if {key: stored[key] for key in _cache_head()} != _cache_head():
            return {}
        return {name: (_stamp_from(entry), _facts_from(entry["facts"])) for name, entry in stored["pictures"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        LOG.warning("%s: not used, pictures are decoded anew (%s)", path, exc)
        return {}


def _stamp_from(entry: dict[str, Any]) -> list[int]:
    size, modified = entry["stamp"]
    return [int(size), int(modified)]


def _facts_from(value: dict[str, Any]) -> PictureFacts:
    height, width = map(int, value["size"])
    error, digest, bits = str(value["error"]), str(value["digest"]), int(value["perceptual_hash"])
    if not error and not (len(digest) == 64 and height > 0 and width > 0 and 0 <= bits < 1 << 64):
        raise ValueError("an entry without a hash or size")
    return PictureFacts((height, width), digest, bits, tuple(map(str, value["converted"])), error)


def _save_cache(path: Path | None, known: dict[str, tuple[list[int], PictureFacts]]) -> None:
    if path is None:
        return
    pictures = {
        name: {"stamp": stamp, "facts": asdict(facts)} for name, (stamp, facts) in known.items() if not facts.fleeting
    }
    try:
        write_json(_cache_head() | {"pictures": pictures}, path)
    except ResourceError as exc:
        LOG.warning("what was found is not remembered: %s", exc)


def inspect_folder(
    folder: Path, *, processes: int = 1, progress: Callable[[int, int], None] = silent
) -> dict[str, PictureFacts]:
    """Inspect every picture below a folder, by its relative name; those that have not changed are not decoded again.

    processes: that decode, 1 is this one alone.
    Raises: DataError if the folder is missing or holds no pictures; ResourceError if memory ends.
    """
    paths = find_pictures(folder, tells_others=True)
    cache_file = _cache_file(folder)
    cache = _load_cache(cache_file)
    names = [path.relative_to(folder).as_posix() for path in paths]
    stamps = [_stamp(path) for path in paths]
    known = {name: cache[name] for name, stamp in zip(names, stamps) if name in cache and cache[name][0] == stamp}
    wanted = [index for index, name in enumerate(names) if name not in known]
    progress(len(known), len(paths))
    try:
        for index, facts in zip(wanted, _inspect_all([paths[index] for index in wanted], processes)):
            known[names[index]] = stamps[index], facts
            progress(len(known), len(paths))
    finally:  # also what was found before Ctrl-C
        if wanted or len(cache) != len(known):
            _save_cache(cache_file, known)
    return {name: known[name][1] for name in names}


def _stamp(path: Path) -> list[int]:
    try:
        facts = path.stat()
    except OSError:  # gone since it was listed: opening it will say so
        return [-1, -1]
    return [facts.st_size, facts.st_mtime_ns]


def _inspect_all(paths: list[Path], processes: int) -> Iterator[PictureFacts]:
    if processes < 2 or len(paths) < 2:
        yield from map(inspect_picture, paths)
        return
    # spawn, because a fork copies the locks of whatever threads the caller runs.
    pool = ProcessPoolExecutor(min(processes, len(paths)), mp_context=get_context("spawn"))
    try:
        yield from pool.map(inspect_picture, paths)
    except BrokenProcessPool as exc:
        raise ResourceError("a process that decodes was ended, by little memory perhaps; use --processes 1") from exc
    finally:
        pool.shutdown(cancel_futures=True)


# All of them


@dataclass(frozen=True)
class Finding:
    """A file, by its name below the folder, and what there is to say about it."""

    file: str
    what: str


@dataclass(frozen=True)
class Copy:
    """A file that shows what another one shows; bits: of 64 that their perceptual hashes differ in."""

    file: str
    partner: str
    bits: int = 0


@dataclass(frozen=True)
class Report:
    """What a data folder holds. Files that cannot be read end a run, tiny ones are left out, others are used.

    duplicates have equal pixels, near_duplicates equal looks; each names the first, or the nearest, file before it.
    overlap: training pictures that show what a picture to validate or test on shows.
    """

    folder: str
    pictures: int
    megapixels: float
    train: int
    validation: int
    unreadable: tuple[Finding, ...]
    tiny: tuple[Finding, ...]
    converted: tuple[Finding, ...]
    duplicates: tuple[Copy, ...]
    near_duplicates: tuple[Copy, ...]
    overlap: tuple[Copy, ...]

    @property
    def can_be_trained_on(self) -> bool:
        """Tell whether a run can begin, and its figures mean something."""
        return bool(self.train) and not self.unreadable and not self.overlap


def check_data(
    folder: Path,
    *,
    smallest_side: int,
    validation_pictures: int = 16,
    against: Sequence[Path] = (),
    processes: int = 1,
    progress: Callable[[int, int], None] = silent,
) -> Report:
    """Decode every picture of a folder and tell what a run would stumble over.

    smallest_side: of HR crops; photographs below it are not trained on. validation_pictures: set aside, as in training.
    against: folders of pictures that must not be trained on, such as test sets.
    progress: called with pictures done and in all, for each folder.
    Raises: DataError if a folder is missing or holds no pictures; ResourceError if memory ends.
    """
    found = inspect_folder(folder, processes=processes, progress=progress)
    readable = {name: facts for name, facts in found.items() if not facts.error}
    usable = {name: facts for name, facts in readable.items() if min(facts.size) >= smallest_side}
    held_out = hold_out(
        [facts.digest for facts in usable.values()],
        [facts.perceptual_hash for facts in usable.values()],
        validation_pictures,
    )
    names = list(usable)
    train = {name: usable[name] for index, name in enumerate(names) if index not in held_out}
    kept_apart = {names[index]: usable[names[index]] for index in held_out}
    unreadable = [Finding(name, facts.error) for name, facts in found.items() if facts.error]
    for other in against:
        tests = inspect_folder(other, processes=processes, progress=progress)
        unreadable += [Finding(str(other / name), facts.error) for name, facts in tests.items() if facts.error]
        kept_apart |= {str(other / name): facts for name, facts in tests.items() if not facts.error}
    return Report(
        folder=str(folder),
        pictures=len(found),
        megapixels=sum(facts.size[0] * facts.size[1] for facts in usable.values()) / 1e6,
        train=len(train),
        validation=len(held_out),
        unreadable=tuple(unreadable),
        tiny=tuple(
            Finding(name, f"{facts.size[1]}x{facts.size[0]} pixels, smaller than {smallest_side}")
            for name, facts in readable.items()
            if name not in usable
        ),
        converted=tuple(Finding(n, "; ".join(facts.converted)) for n, facts in readable.items() if facts.converted),
        duplicates=tuple(_duplicates(readable)),
        near_duplicates=tuple(_near_duplicates(readable)),
        overlap=tuple(_overlap(train, kept_apart)),
    )


def _duplicates(facts: dict[str, PictureFacts]) -> Iterator[Copy]:
    first: dict[tuple[str, tuple[int, int]], str] = {}
    for name, each in facts.items():
        partner = first.setdefault((each.digest, each.size), name)
        if partner != name:
            yield Copy(name, partner)


def _near_duplicates(facts: dict[str, PictureFacts]) -> Iterator[Copy]:
    first = {(each.digest, each.size): name for name, each in reversed(facts.items())}  # one of each set of duplicates
    names = [name for name, each in facts.items() if first[each.digest, each.size] == name]
    for index, near, bits in copies_before([facts[name].perceptual_hash for name in names]):
        nearest = int(bits.argmin())
        yield Copy(names[index], names[near[nearest]], int(bits[nearest]))


def _overlap(train: dict[str, PictureFacts], kept_apart: dict[str, PictureFacts]) -> Iterator[Copy]:
    """Find the training pictures that show what a picture shows that is not to be trained on."""
    names = [*kept_apart, *train]
    hashes = [facts.perceptual_hash for facts in (*kept_apart.values(), *train.values())]
    for index, near, bits in copies_before(hashes):
        apart = near < len(kept_apart)
        if index >= len(kept_apart) and apart.any():
            nearest = int(bits[apart].argmin())
            yield Copy(names[index], names[near[apart][nearest]], int(bits[apart][nearest]))


# The command


def render(report: Report) -> str:
    """Write a report as text; long lists are cut."""
    lines = [
        f"{report.folder}: {report.pictures} pictures, {report.megapixels:.1f} megapixels to use; "
        f"{report.train} to train on, {report.validation} to validate"
    ]
    findings = {
        "cannot be read, and end a run": report.unreadable,
        "too small, left out": report.tiny,
        "converted when read": report.converted,
    }
    copies = {
        "equal pixels": report.duplicates,
        "nearly equal": report.near_duplicates,
        "trained on, although kept apart to validate or test": report.overlap,
    }
    for title, found in findings.items():
        lines += _listed(title, [f"{each.file}: {each.what}" for each in found])
    for title, pairs in copies.items():
        lines += _listed(title, [f"{pair.file} = {pair.partner} ({pair.bits} of 64 bits differ)" for pair in pairs])
    return "\n".join(lines)


def _listed(title: str, items: Sequence[str]) -> list[str]:
    more = [f"  and {len(items) - SHOWN} more; --json FILE lists all"] if len(items) > SHOWN else []
    return [f"{title}: {len(items)}", *(f"  {item}" for item in items[:SHOWN]), *more] if items else []


@click.command("check", cls=OneLineErrors)
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", default="fast", show_default=True, help="Its largest crop: smaller is tiny.")
@click.option("--task", help="Lay a task over the recipe, as sr-train does.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--against", type=click.Path(path_type=Path), multiple=True, help="Folder that must not be trained on.")
@click.option("--processes", type=click.IntRange(min=1), help="That decode. Default: the cores, at most 8.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the whole report here too.")
def check_command(
    data: Path,
    recipe_name: str,
    task: str | None,
    overrides: tuple[str, ...],
    against: tuple[Path, ...],
    processes: int | None,
    json_path: Path | None,
) -> None:
    """Decode every picture in folder DATA and list what is broken, too small, or there more than once.

    Exit code 1 if a picture cannot be read, none is left to train on, or one is kept apart and trained on.
    """
    from .recipe import load_recipe

    recipe = load_recipe(recipe_name, task=task, overrides=overrides)
    with click.progressbar(length=0, label="decoding", file=sys.stderr) as bar:
        report = check_data(
            data,
            smallest_side=max(stage.size for stage in recipe.stages),
            validation_pictures=recipe.validation_pictures,
            against=against,
            processes=processes or min(8, usable_cores()),
            progress=partial(show_bar, bar),
        )
    if json_path is not None:
        write_json({"schema": 1, "kind": "check", **asdict(report)}, json_path)
    click.echo(render(report))
    if not report.can_be_trained_on:
        raise SystemExit(1)
