"""The paths of the Open Inference Protocol, /v2 and what is below, told apart.

Not by the framework's router: a model's name may have slashes, written as they are (tritonclient does so) or as %2F, so
that only the end of the path tells what is asked. An encoded slash never separates: /v2/models/a%2Fready is the
metadata of the model "a/ready".
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from urllib.parse import unquote

Question: TypeAlias = Literal[
    "server_metadata", "server_live", "server_ready", "index", "metadata", "ready", "config", "infer"
]

MODELS = "/v2/models/"
MODEL = MODELS + "{model_name}"
VERSION = MODEL + "/versions/{model_version}"

_FIXED: dict[str, Question] = {
    "/v2": "server_metadata",
    "/v2/": "server_metadata",
    "/v2/health/live": "server_live",
    "/v2/health/ready": "server_ready",
    "/v2/repository/index": "index",
}
_OF_A_MODEL: dict[str, Question] = {"infer": "infer", "ready": "ready", "config": "config"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a path asks; `template` is the route's, whose values are few."""

    question: Question
    template: str
    names: dict[str, str] = field(default_factory=dict)


def read_path(path: str) -> Asked | None:
    """What a percent-encoded path asks; None where it leads nowhere."""
    if path in _FIXED:
        return Asked(_FIXED[path], path.rstrip("/"))
    if not path.startswith(MODELS):
        return None
    segments = path.removeprefix(MODELS).split("/")
    question: Question = "metadata"
    suffix = ""
    if len(segments) > 1 and segments[-1] in _OF_A_MODEL:
        question, suffix = _OF_A_MODEL[segments[-1]], f"/{segments.pop()}"
    names, template = {}, MODEL
    if len(segments) > 2 and segments[-2] == "versions":
        names["model_version"], template = unquote(segments[-1]), VERSION
        del segments[-2:]
    names["model_name"] = unquote("/".join(segments))
    return Asked(question, template + suffix, names) if all(names.values()) else None
