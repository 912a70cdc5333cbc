"""Build a network by its name in a table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import RecipeError

Built = TypeVar("Built")


def build_named(
    builders: Mapping[str, Callable[..., Built]], name: str, options: Mapping[str, Any], *, what: str, **given: Any
) -> Built:
    """Call the builder of that name with a recipe's options.

    what: the recipe's word for it, in messages. given: arguments that are not options.
    Raises: RecipeError for an unknown name or option, or a value that the builder refuses.
    """
    if name not in builders:
        raise RecipeError(f"unknown {what} {name!r}: one of {', '.join(builders)}")
    builder = builders[name]
    parameters = inspect.signature(builder).parameters
    known = set(parameters) - set(given)
    unknown = sorted(set(options) - known)
    if unknown:
        raise RecipeError(f"{what} options: {name} knows {', '.join(sorted(known))}, not {', '.join(unknown)}")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    for key, value in values.items():
        kind = type(parameters[key].default)
        if kind in (bool, int, str, tuple) and type(value) is not kind:
            raise RecipeError(f"{what}.options.{key}: expected {kind.__name__}, got {value!r}")
    try:
        return builder(**given, **values)
    except (TypeError, ValueError, IndexError) as exc:
        raise RecipeError(f"{what} {name}: {exc}") from exc
