"""As much of JSON Schema as our schemas use, so that testing needs no library for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dbo_compile

TYPES = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KNOWN = {
    "$schema", "title", "description", "$defs", "$ref", "type", "enum", "anyOf", "required", "properties",
    "additionalProperties", "items",
}  # fmt: skip


def report_schema() -> dict[str, Any]:
    return json.loads((Path(dbo_compile.__file__).parent / "report.schema.json").read_text())


def faults(value: Any, schema: dict[str, Any]) -> list[str]:
    """Where `value` is not what `schema` says, as `path: what is wrong`."""
    return list(_faults(value, schema, "", schema))


def _faults(value: Any, schema: dict[str, Any], at: str, root: dict[str, Any]) -> Iterator[str]:
    assert schema.keys() <= KNOWN, f"{schema.keys() - KNOWN}: not checked here"
    if "$ref" in schema:
        yield from _faults(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], at, root)
    if "anyOf" in schema and all(list(_faults(value, choice, at, root)) for choice in schema["anyOf"]):
        yield f"{at}: none of the choices"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is not one of {schema['enum']}"
    if "type" in schema:
        is_number = isinstance(value, bool) and schema["type"] != "boolean"
        if is_number or not isinstance(value, TYPES[schema["type"]]):
            yield f"{at}: {value!r} is no {schema['type']}"
            return
    if isinstance(value, dict):
        yield from _faults_inside(value, schema, at, root)
    if isinstance(value, list) and "items" in schema:
        for i, inner in enumerate(value):
            yield from _faults(inner, schema["items"], f"{at}/{i}", root)


def _faults_inside(value: dict[str, Any], schema: dict[str, Any], at: str, root: dict[str, Any]) -> Iterator[str]:
    yield from (f"{at}: lacks {name}" for name in schema.get("required", ()) if name not in value)
    for name, inner in value.items():
        rule = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
        if rule is False:
            yield f"{at}: has {name}"
        else:
            yield from _faults(inner, rule, f"{at}/{name}", root)
