"""A YAML file and `a.b=c` overrides become a typed, frozen tree, and the tree becomes YAML again.

Every configuration class derives from `Config`. A stateless component *is* its configuration: `DDIM(steps=50)` in
memory is `{kind: ddim, steps: 50}` in YAML, and a choice between components is a union told apart by `kind`.
Defaults live in the classes and nowhere else.
"""

import difflib
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from videodiff import resources
from videodiff.config_problems import problems, show
from videodiff.errors import UserError

__all__ = ["Config", "ConfigError", "Difference", "build", "differences", "load", "operational", "save", "to_dict"]


class Config(BaseModel):
    """Base of every configuration: frozen, and refusing keys it does not know."""

    # Numbers must be finite: a learning rate of nan passes every comparison that would refuse it.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), ser_json_inf_nan="constants"
    )


ConfigType = TypeVar("ConfigType", bound=Config)


class ConfigError(UserError):
    """The configuration can't be used. One line for one problem; with several, one line each after the first."""


@dataclass(frozen=True)
class Difference:
    """One value that two configurations of the same class do not share."""

    path: str
    old: Any
    new: Any
    operational: bool

    def __str__(self) -> str:
        return f"{self.path}: {show(self.old)} -> {show(self.new)}"


def operational(default: Any = ..., **keywords: Any) -> Any:
    """A pydantic field that may change when a run resumes (steps, save interval, ...)."""
    return Field(default, json_schema_extra={"operational": True}, **keywords)


def load(schema: type[ConfigType], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigType:
    """Read the YAML file `path` (None: all defaults), apply the overrides (`a.b=c`, c in YAML) in order, check it all.

    `${other.key}` stands for the value of another key. A path such as `configs/demo/image.yaml` that does not lie in
    the working folder is the file of that name that comes with the package. Raises ConfigError with every problem at
    once.
    """
    where = "the command line"
    tree = OmegaConf.create()
    if path is not None:
        path = Path(path)
        if not path.exists() and path.parts[:1] == ("configs",) and resources.path(path.as_posix()).is_file():
            path = resources.path(path.as_posix())
        where, tree = str(path), _read_yaml(path)
    keys = [_apply(tree, override) for override in overrides]
    try:
        data = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}; write \\${{ for a literal ${{") from error
    return _validate(schema, typing.cast("dict[str, Any]", data), where, keys)


def build(schema: type[ConfigType], data: Mapping[str, Any], where: str) -> ConfigType:
    """The same checks on a dictionary; `where` names its origin in the error. Raises ConfigError."""
    return _validate(schema, dict(data), where, ())


def to_dict(config: Config) -> dict[str, Any]:
    """Every field, defaults and `kind` included, as values that YAML and JSON can hold."""
    # serialize_as_any: a field annotated with a base class keeps the fields of the object that it holds.
    return config.model_dump(mode="json", serialize_as_any=True)


def save(config: Config, path: str | Path) -> None:
    """Write the whole tree as YAML that loads back equal. A reader never sees half a file."""
    path = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(_escape(to_dict(config))))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def differences(old: Config, new: Config) -> list[Difference]:
    """What differs, leaf by leaf. A field is operational when it, or a field that holds it, is marked so."""
    return list(_compare(old, new, "", False))


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)  # derives from yaml's SafeLoader: no tag makes an object or runs code
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, _yaml_names(path.parent), n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise ConfigError(f"{path}: no such configuration file; {hint}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {line}not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_first_line(error)}") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or _first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: a configuration is made of `key: value` lines, this file holds something else")
    return tree


def _apply(tree: DictConfig, override: str) -> str:
    """Set one `a.b=c` in the tree; its key is returned."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"override {override!r}: there is no '='; write key.path=value")
    if not key or any(not part for part in key.split(".")):
        raise ConfigError(f"override {override!r}: the key before '=' is not a dotted path; write key.path=value")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
        # merge=False: `sampler={kind: ddpm}` replaces the sampler, keys of the former one do not linger.
        OmegaConf.update(tree, key, parsed["value"], merge=False)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {problem}") from error
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"override {override!r}: {_first_line(error)}") from error
    return key


def _yaml_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.y*ml")) if folder.is_dir() else []


# --- checking ---------------------------------------------------------------------------------------------------------


def _validate(schema: type[ConfigType], data: dict[str, Any], where: str, overridden: Iterable[str]) -> ConfigType:
    for path in _odd_keys(data, ""):
        raise ConfigError(f"{where}: {path}: a key must be text; write it in quotes, or check the line")
    try:
        # Strict JSON is the right strictness: a list may become a tuple and a string a path, but "5", 7.5 and yes do
        # not become whole numbers.
        return schema.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        found = problems(schema, data, error)
    from_command_line = set(overridden)
    lines = [
        f"{path}: {problem}" + (f" (set by the override {path}=...)" if path in from_command_line else "")
        for path, problem in found.items()
    ]
    if len(lines) == 1:
        raise ConfigError(f"{where}: {lines[0]}")
    raise ConfigError("\n  ".join([f"{where}: {len(lines)} problems", *lines]))


def _odd_keys(tree: Any, where: str) -> Iterator[str]:
    """Keys that YAML read as a number, a date or yes and no."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        path = f"{where}.{key}" if where else str(key)
        if isinstance(tree, dict) and not isinstance(key, str):
            yield path
        yield from _odd_keys(value, path)


def _compare(old: Any, new: Any, path: str, is_operational: bool) -> Iterator[Difference]:
    if isinstance(old, Config) and type(old) is type(new):
        for name, field in type(old).model_fields.items():
            extra = field.json_schema_extra
            marked = isinstance(extra, dict) and bool(extra.get("operational"))
            child = f"{path}.{name}" if path else name
            yield from _compare(getattr(old, name), getattr(new, name), child, is_operational or marked)
    elif isinstance(old, (tuple, list)) and type(old) is type(new) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _compare(before, after, f"{path}.{index}", is_operational)
    elif isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from _compare(old[key], new[key], f"{path}.{key}", is_operational)
    elif type(old) is not type(new) or old != new:
        yield Difference(path, _plain(old), _plain(new), is_operational)


# --- small things -----------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    return to_dict(value) if isinstance(value, Config) else value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _escape(value: Any) -> Any:
    """`${` in a text is meant literally when it comes from an object: keep it from being read as a reference."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value
