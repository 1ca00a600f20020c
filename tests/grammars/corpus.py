"""Schemas to test with: 20 of our own, and three packages of the index, with pinned versions and digests.

The packages are downloaded through pip into the cache when a test marked `corpus` runs; nothing of them is committed.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nanoengine.api.json_schema import map_schemas
from nanoengine.api.sources import cache_root

PACKAGES = {  # version, SHA-256, whether it is the source package
    "jsonschema": ("4.26.0", "0c26707e2efad8aa1bfc5b7ce170f3fccc2e4918ff85989ba9ffa9facb2be326", True),
    "schemastore": ("0.2.3", "049b62589e7cc3a11fa5d1977cdbf0524cf1c905a81cd0f9d27075b7578cf2d3", False),
    "bfcl-eval": ("2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a", False),
}

_NAME = {"type": "string", "minLength": 1, "maxLength": 6}
_REF = {"$ref": "#/$defs/leaf"}
SAMPLE: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "integer", "minimum": -20, "maximum": 300},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"enum": ["red", "green", 12, None, {"deep": [True]}]},
    {"const": {"kind": "ping", "to": ["a", "b"]}},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, _NAME], "items": False, "minItems": 2},
    {"type": "object", "properties": {"name": _NAME, "ok": {"type": "boolean"}}, "required": ["ok"],
     "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"const": 1}}, "additionalProperties": False,
     "minProperties": 1},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}}, "additionalProperties": False,
     "required": ["x1"]},
    {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "object", "properties": {"id": _NAME},
     "required": ["id"], "additionalProperties": False}]},
    {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 42}]},
    {"$defs": {"leaf": _NAME}, "type": "object", "properties": {"left": _REF, "right": _REF}, "required": ["left"],
     "additionalProperties": False},
    {"$defs": {"node": {"type": "object", "properties": {"value": {"type": "boolean"}, "next": {"anyOf": [
     {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["value", "next"], "additionalProperties": False}},
     "$ref": "#/$defs/node"},
    {"type": "object", "properties": {"tool": {"enum": ["search", "open"]}, "arguments": {"type": "object",
     "properties": {"query": _NAME, "limit": {"type": "integer", "minimum": 1, "maximum": 50}}, "required": ["query"],
     "additionalProperties": False}}, "required": ["tool", "arguments"], "additionalProperties": False},
]  # fmt: skip


def package(name: str) -> Path:
    """The file of the package, downloaded once. Skips the test where it cannot be downloaded."""
    version, digest, source = PACKAGES[name]
    folder = cache_root() / "test-corpora" / f"{name}-{version}"
    found = [file for file in folder.glob("*") if hashlib.sha256(file.read_bytes()).hexdigest() == digest]
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    how = f"--no-binary={name}" if source else "--only-binary=:all:"
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", how, "-r", str(wanted), "-d",
             str(folder)], capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        pytest.skip(f"{name} {version} cannot be downloaded: {done.stderr.strip()[-300:]}")
    return package(name)


def suite(draft: str) -> Iterator[tuple[str, dict[str, Any] | bool, list[dict[str, Any]]]]:
    """(name, schema, tests) of the official JSON Schema test suite, which is in the source package of `jsonschema`."""
    with tarfile.open(package("jsonschema")) as tar:
        for member in sorted(tar.getmembers(), key=lambda each: each.name):
            if f"/json/tests/{draft}/" in member.name and member.name.endswith(".json"):
                file = tar.extractfile(member)
                assert file is not None
                for case in json.load(file):
                    yield f"{member.name.partition('/tests/')[2]}: {case['description']}", case["schema"], case["tests"]


def public_schemas(count: int = 150) -> list[tuple[str, Any]]:
    """(name, schema): so many of each of the two collections, chosen by digest."""
    return [*_chosen(_store(), count), *_chosen(_functions(), count)]


def _chosen(schemas: Iterator[tuple[str, Any]], count: int) -> list[tuple[str, Any]]:
    by_digest = {hashlib.sha256(json.dumps(schema).encode()).hexdigest(): (name, schema) for name, schema in schemas}
    return [by_digest[digest] for digest in sorted(by_digest)[:count]]


def _store() -> Iterator[tuple[str, Any]]:
    """The schemas of schemastore.org: saved answers of web servers, pickled by another library."""
    with zipfile.ZipFile(package("schemastore")) as archive, tempfile.NamedTemporaryFile() as file:
        file.write(archive.read("schemastore/cache.sqlite"))
        file.flush()
        rows = sqlite3.connect(file.name).execute("select key, value from responses order by key").fetchall()
    for key, value in rows:
        try:
            found = _OnlyPlain(io.BytesIO(value)).load()
            schema = json.loads(found["_content"].decode("utf-8-sig"))
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(schema, dict) and schema.keys() & {"$schema", "properties", "$ref"}:
            yield str(found.get("url", key)), schema


class _OnlyPlain(pickle.Unpickler):
    """Reads plain values. Instances of any class become empty objects, and no code of a class is run."""

    def find_class(self, module: str, name: str) -> Any:
        class Empty:
            def __init__(self, *args: Any, **kwargs: Any) -> None: ...

            def __setstate__(self, state: Any) -> None: ...

        return Empty


_TYPES = {
    "dict": "object",
    "float": "number",
    "double": "number",
    "long": "integer",
    "tuple": "array",
    "char": "string",
}


def _functions() -> Iterator[tuple[str, Any]]:
    """The parameters of the functions that the Berkeley function-calling data describe, in JSON Schema's types."""
    with zipfile.ZipFile(package("bfcl-eval")) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("bfcl_eval/data/BFCL_v4_") and "format_sensitivity" not in name:  # a JSON value a line
                for line in archive.read(name).decode().splitlines():
                    for function in json.loads(line).get("function", ()):
                        if isinstance(function, Mapping) and isinstance(function.get("parameters"), Mapping):
                            yield function["name"], map_schemas(function["parameters"], _typed)


def _typed(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    if kind in _TYPES:
        schema["type"] = _TYPES[kind]
    elif kind not in ("object", "array", "string", "number", "integer", "boolean", "null"):
        schema.pop("type", None)
    return schema


def bounded(schema: Any) -> Any:
    """A copy in which strings, numbers and arrays are short, and objects are closed: random output soon ends."""

    def bound(each: dict[str, Any]) -> dict[str, Any]:
        fixed = each.keys() & {"enum", "const", "$ref", "anyOf", "oneOf", "allOf"}
        kinds = each.get("type", () if fixed else ["string", "integer", "boolean", "null"])
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if not fixed and "type" not in each and not each.keys() & {"properties", "items", "pattern", "format"}:
            each["type"] = kinds
        if "string" in kinds and not each.keys() & {"enum", "const", "pattern", "format"}:
            each.setdefault("maxLength", max(8, each.get("minLength", 0)))
        if set(kinds) & {"integer", "number"} and not each.keys() & {"enum", "const"}:
            if not each.keys() & {"minimum", "exclusiveMinimum"}:
                each["minimum"] = min(0, each.get("maximum", 0), each.get("exclusiveMaximum", 0) - 1)
            if not each.keys() & {"maximum", "exclusiveMaximum"}:
                each["maximum"] = max(99, each.get("minimum", 0), each.get("exclusiveMinimum", 0) + 1)
        if "array" in kinds and not each.keys() & {"enum", "const"}:
            each["maxItems"] = max(each.get("minItems", 0), min(2, each.get("maxItems", 2)))
        if "object" in kinds or "properties" in each:
            each.setdefault("additionalProperties", False)
        return each

    return map_schemas(schema, bound)
