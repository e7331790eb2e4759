"""Files and flags to one mapping: `includes:` first (paths relative to the file that names them), then the file's own
keys, then `--section.key=value`.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from faenet_ocp.common.files import expand_path
from faenet_ocp.config.schema import Config

_EXCLUSIVE = {"src": ("from_train",), "from_train": ("src", "index")}
_WHOLE = ("dataset.val", "dataset.test")


class _Whole(dict[str, Any]):
    """A mapping that takes the place of the one below it, instead of being merged with it."""


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping in which the values of `above` win; mappings in both are merged key by key.

    Where a split lies takes the place of its share of the training set, and the other way round. Another model comes
    without the options of the one below it.
    """
    result = type(below)(below) if isinstance(below, _Whole) else dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        whole = isinstance(value, _Whole) or (both and key == "model" and _is_other(result[key], value))
        result[key] = merge(result[key], value) if both and not whole else value
        if key in _EXCLUSIVE and value is not None:
            for other in _EXCLUSIVE[key]:
                result.pop(other, None)
    return result


def _is_other(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    return None not in (names := (below.get("name"), above.get("name"))) and names[0] != names[1]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def find_config(path: str | Path, flag: str = "--config") -> Path:
    """Resolves a config path: as given, else among the shipped configs (`configs/is2re/faenet.yml`)."""
    given = Path(expand_path(path))
    if given.is_file():
        return given
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    for base in (
        Path(str(resources.files("faenet_ocp"))) / "configs",
        Path(__file__).resolve().parents[2] / "configs",
    ):
        if not given.is_absolute() and (base / relative).is_file():
            return base / relative
    raise ValueError(f"{flag} {path}: there is no such file, here or among the shipped configs")


def load_yaml(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file with its `includes:` merged below it.

    Raises:
        ValueError: unreadable YAML, repeated key, missing or circular include; names file and line.
    """
    path = path.resolve()
    if path in _chain:
        raise ValueError(f"{path}: includes itself through {' -> '.join(p.name for p in _chain)}")
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError) as error:  # TypeError: a mapping or list as a key
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the top level has to be a mapping, not {type(content).__name__}")
    includes = content.pop("includes", [])
    if not isinstance(includes, list):
        raise ValueError(f"{path}: includes: expected a list of files, got {includes!r}")
    merged: dict[str, Any] = {}
    for include in includes:
        target = path.parent / expand_path(str(include))
        if not target.is_file():
            raise ValueError(f"{path}: includes: {include}: there is no such file")
        merged = merge(merged, load_yaml(target, (*_chain, path)))
    return merge(merged, content)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key=value` (or `--section.key value`) to a nested mapping; values are read as YAML.

    `--dataset.val={...}` and `--dataset.test={...}` name all splits: those of the files are not used.
    """
    result: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name[2:].split(".")[0] not in Config.model_fields:
            raise ValueError(
                f"{argument}: unknown argument; overrides are written --section.key=value (--help lists the flags)"
            )
        if not equals:
            if not rest:
                raise ValueError(f"{argument}: a value is missing: {argument}=value")
            value = rest.pop(0)
        nested: Any = parse_value(value)
        if name[2:] in _WHOLE and isinstance(nested, dict):
            nested = _Whole(nested)
        for part in reversed(name[2:].split(".")):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def parse_value(text: str) -> Any:
    """A value from the command line, read as YAML.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError) as error:  # TypeError: a mapping or list as a key
        raise ValueError(f"{text!r} is not a YAML value: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{text[:100]!r}...: nested too deeply") from error
