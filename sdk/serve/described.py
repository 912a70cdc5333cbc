"""What the API's documentation says of bodies and answers that FastAPI cannot see in the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .orders import MEDIA_TYPES

Responses = dict[int | str, dict[str, Any]]


def told(description: str) -> dict[str, Any]:
    """Describe an answer that says in a sentence what is wrong."""
    schema = {"type": "object", "properties": {"detail": {}}, "required": ["detail"]}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def name_models(schema: dict[str, Any], names: Sequence[str]) -> None:
    """Put the models of this server into its OpenAPI document, in place."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model":
                    parameter["schema"] = {"type": "string", "enum": [*names], "description": parameter["description"]}


BINARY = {"type": "string", "format": "binary"}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A picture; what kind, its content tells.",
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": BINARY}, "required": ["file"]},
            },
            "application/octet-stream": {"schema": BINARY},
        },
    }
}
PICTURE: dict[str, Any] = {
    "description": "The enlarged picture.",
    "content": {media: {"schema": BINARY} for media in MEDIA_TYPES.values()},
}
TOO_MUCH: Responses = {
    400: told("The form cannot be read."),
    408: told("The body did not come in time."),
    413: told("The body is too large."),
    429: told("Too much is under way: try again after as many seconds as Retry-After says."),
    507: told("The server's disk is full."),
}
EVENTS = {"description": "Server-sent events, each a JobState.", "content": {"text/event-stream": {"schema": {}}}}
UNFINISHED = told("The job is not done, or has failed.")
METRICS = {
    "description": "Prometheus' text format.",
    "content": {"text/plain": {"schema": {"type": "string"}}},
}
