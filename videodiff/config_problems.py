"""What is wrong with a configuration, in words: pydantic's errors with dotted paths, plain reasons and suggestions."""

import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["problems", "show"]


def problems(schema: type[BaseModel], data: dict[str, Any], error: ValidationError) -> dict[str, str]:
    """Dotted path -> what is wrong there. The members of a union complain one by one: they share one entry."""
    found: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        path = _data_path(detail["loc"], data, keep_last=detail["type"] == "missing")
        text = _explain(schema, data, path, typing.cast("dict[str, Any]", detail))
        texts = found.setdefault(".".join(map(str, path)) or "the configuration", [])
        if text not in texts:
            texts.append(text)
    return {path: ", or ".join(texts) for path, texts in found.items()}


def _data_path(location: tuple[int | str, ...], data: Any, keep_last: bool) -> list[int | str]:
    """pydantic's location without the names of union members that it weaves in: only what is a key of the data."""
    path: list[int | str] = []
    for index, part in enumerate(location):
        is_index = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if is_index or (isinstance(data, dict) and part in data):
            data = data[part]
        elif not (keep_last and index == len(location) - 1):
            continue
        path.append(part)
    return path


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "`key: value` pairs",
    "model": "`key: value` pairs",
    "none": "null",
}


def _explain(schema: type[BaseModel], data: dict[str, Any], path: list[int | str], detail: dict[str, Any]) -> str:
    error_type, context, value = detail["type"], detail.get("ctx", {}), detail.get("input")
    if error_type == "missing":
        return "is required and has no default"
    if error_type == "extra_forbidden":
        return "unknown key" + _suggest_key(schema, data, path)
    if error_type == "union_tag_not_found":
        kinds = [kind for model in _models_at(schema, data, path) for kind in _kinds(model)]
        return f"needs a `kind`, one of {', '.join(kinds)}"
    if error_type in ("union_tag_invalid", "literal_error", "enum"):
        given = context.get("tag", value)
        expected = str(context.get("expected_tags") or context.get("expected"))
        choices = re.findall(r"'([^']*)'", expected)
        return f"expected one of {expected}, got {show(given)}" + _did_you_mean(str(given), choices)
    if error_type in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"]))
    expected_type = _EXPECTED.get(error_type.split("_")[0])
    if expected_type and error_type.endswith(("_type", "_parsing", "_from_float", "finite_number")):
        return f"expected {expected_type}, got {show(value)}"
    message = str(detail["msg"])
    return f"{message[:1].lower()}{message[1:]}, got {show(value)}"


def _suggest_key(schema: type[BaseModel], data: dict[str, Any], path: list[int | str]) -> str:
    name, parent = str(path[-1]), path[:-1]
    models = _models_at(schema, data, parent)
    siblings = list(dict.fromkeys(field for model in models for field in model.model_fields))
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean {'.'.join(map(str, [*parent, near[0]]))}?"
    if "kind" not in siblings:  # a key foreign to this kind of component is in no wrong place, it is one too many
        everywhere = {known.rpartition(".")[2]: known for known in reversed(list(_all_paths(schema)))}
        if near := difflib.get_close_matches(name, everywhere, n=1, cutoff=0.8):
            return f"; did you mean {everywhere[near[0]]}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _did_you_mean(given: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes that a value of this annotation, or an element of it, may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    return typing.get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _models_at(schema: type[BaseModel], data: Any, path: Sequence[int | str]) -> list[type[BaseModel]]:
    """The classes that may stand at this path of the data, narrowed by the `kind` found there."""
    models = [schema]
    for part in path:
        data = data[part]
        if isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models(field.annotation)] if fields else models
        kind = data.get("kind") if isinstance(data, dict) else None
        models = [model for model in models if kind in _kinds(model)] or models
    return models


def _all_paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for model in _models(field.annotation):
            yield from _all_paths(model, f"{prefix}{name}.")


def show(value: Any) -> str:
    """A value short enough for one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
