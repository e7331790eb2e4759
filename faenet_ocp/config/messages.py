"""Messages about wrong configurations: the key's dotted path, what is wrong with it, and what would be right."""

import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from faenet_ocp.common.checks import nearest

_USE_CHECK = "a sample that cannot be used ends the run; --mode check lists all of them before"
REMOVED = {
    "dataset.on_bad_sample": _USE_CHECK,
    "dataset.max_bad_share": _USE_CHECK,
    "job.compile": "torch.compile brought 6 % at best where it was measured; leave the key out",
}
"""Keys of earlier versions, and what to do instead."""


def without_removed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version wrote (into a checkpoint or a run's folder), without `REMOVED` keys."""
    return {
        section: {key: value for key, value in content.items() if f"{section}.{key}" not in REMOVED}
        if isinstance(content, Mapping)
        else content
        for section, content in raw.items()
    }


def explain(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One of pydantic's errors in words; `root` is the class of the whole configuration."""
    location = [str(part) for part in problem["loc"]]
    # pydantic adds the tried branch of a union to the path; users know only the keys.
    keys = [part for part in location if not re.search(r"[\[\](]|Config$|^(str|int|float|bool|dict|list)$", part)]
    if problem["type"] == "extra_forbidden":
        keys = [*keys[: -1 if keys[-1:] == location[-1:] else None], location[-1]]  # whatever the user has called it
    path = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        if path in REMOVED:
            return f"{path}: is no key any more: {REMOVED[path]}"
        allowed = _allowed_keys(root, keys[:-1])
        return f"{path}: unknown key{nearest(keys[-1], allowed) if allowed else ''}"
    if problem["type"] == "missing":
        return f"{path}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and not keys:
        return message
    return f"{path}: {message} (got {problem['input']!r})"


def _allowed_keys(root: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """The valid keys of the section that a dotted path leads to."""
    section: Any = root
    for part in parents:
        if isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(part)
            section = field.annotation if field else None
        else:  # a mapping or list: go on with the type of its values
            section = _value_type(section)
        section = section_in(section) or section
    section = section_in(section)
    return sorted(section.model_fields) if section else []


def _value_type(annotation: Any) -> Any:
    arguments = get_args(annotation)
    return arguments[-1] if get_origin(annotation) in (dict, list) and arguments else annotation


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        for branch in get_args(annotation):
            if found := section_in(branch):
                return found
    return None
