"""The record of a run, next to its results: configuration, parameters, versions and a summary.

`--resume` uses it to continue a run. The record of `results.jsonl` is `results.jsonl.run.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from nanoengine import __version__
from nanoengine.api.errors import ConfigError
from nanoengine.cli.config import plain
from nanoengine.cli.threads import CHOSEN
from nanoengine.observe.files import part_of, place_of
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.setup.config.config import RunConfig
from nanoengine.setup.plugins.registry import Registry

_FORMAT = 1
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "flash-attn", "llguidance")
_FREE = ("output", "prompts")  # may differ when a run is resumed, because each row has the hash of its prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of a run. All values are plain JSON values.

    Attributes:
        config: the composed configuration.
        params: the sampling parameters that were used, including the model's own defaults.
        versions: those of the packages that were used.
        started, command: local time and command line of the run that made it.
        machine: "cpu", "threads", "load" (processes that ran or waited in the last minute).
        summary: `Tally.summary()`; None until the run has ended.
    """

    config: Mapping[str, Any]
    params: Mapping[str, Any]
    versions: Mapping[str, str]
    started: str = ""
    command: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None

    def save(self, output: str) -> None:
        """Writes the record next to `output`, completely or not at all. Raises `OSError`."""
        write_whole(record_path(output), json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n")

    def with_summary(self, summary: Mapping[str, Any]) -> Record:
        return replace(self, summary=summary)


def new_record(config: RunConfig, params: SamplingParams, registry: Registry) -> Record:
    return Record(
        config=_json(plain(config)),
        params=plain_params(params),
        versions=_versions(registry),
        started=datetime.now().astimezone().isoformat(" ", "seconds"),
        command=shlex.join(["nanoengine", *sys.argv[1:]]),
        machine=_machine(),
    )


def _machine() -> dict[str, str]:
    found = {"cpu": platform.processor() or platform.machine()}
    with suppress(OSError):  # only Linux has it
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        found["cpu"] = names[0] if names else found["cpu"]
    with suppress(OSError, AttributeError):
        found["load"] = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    if (chosen := CHOSEN.get()) is not None:
        found["threads"] = chosen.line()
    return found


def record_path(output: str | Path) -> Path:
    path = Path(output).expanduser()
    return path.with_name(f"{path.name}.run.json")


def read_record(output: str | Path) -> Record | None:
    """The record of a results file; None if there is none. Raises `ConfigError` if it is broken."""
    path = record_path(output)
    try:
        found = json.loads(path.read_text("utf-8"))
        if found.pop("format") != _FORMAT:
            raise ValueError("it is of another version of nanoengine")
        return Record(**found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; without --resume a new one is written") from error


def check_same_config(record: Record, config: RunConfig, output: str) -> None:
    """Raises `ConfigError` that names the keys which were different in the run that wrote `output`."""
    _refuse(_differences(record.config, _json(plain(config)), _FREE), output)


def check_same_params(record: Record, params: SamplingParams, output: str) -> None:
    """Raises `ConfigError` if the used parameters are different: the model's own defaults may have changed."""
    _refuse([f"sampler.{each}" for each in _differences(record.params, plain_params(params))], output)


def plain_params(params: SamplingParams) -> dict[str, Any]:
    """All parameters as JSON values."""
    found: dict[str, Any] = _json(asdict(params.core) | dict(params.processor_fields))
    return found


def prompt_hash(prompt: Any, chat: bool, params: Mapping[str, Any]) -> str:
    """A hash of prompt and parameters (`plain_params`), 16 hexadecimal digits, to find the row of a prompt."""
    data = json.dumps([prompt, chat, params], sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file atomically: a reader gets the old content or the new one. Raises `OSError`.

    The target of a link is replaced, not the link. A device or a pipe is written to.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = place_of(path)
    part = part_of(path)
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def _refuse(differences: list[str], output: str) -> None:
    if differences:
        raise ConfigError(
            f"{output} was made with another configuration, so its rows cannot be kept: {'; '.join(differences)}. "
            "Use that configuration, give another output=, or leave out --resume to start again"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...] = ()) -> list[str]:
    """A text such as "engine.seed (0 there, 7 here)" for each key that differs."""
    there, here = dict(_flat(old, free)), dict(_flat(new, free))
    missing = "not given"
    return [
        f"{key} ({json.dumps(there[key]) if key in there else missing} there, "
        f"{json.dumps(here[key]) if key in here else missing} here)"
        for key in {**there, **here}
        if key not in there or key not in here or there[key] != here[key]
    ]


def _flat(value: Mapping[str, Any], free: tuple[str, ...] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if key in free:
            continue
        if isinstance(item, Mapping):
            yield from _flat(item, (), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _json(value: Any) -> Any:
    """The value as it is read from JSON: keys are strings, tuples are lists."""
    return json.loads(json.dumps(value, default=repr))


def _versions(registry: Registry) -> dict[str, str]:
    """Versions of nanoengine, Python, the used libraries and plugins; the GPU's name if this process uses one."""
    import torch

    found = {"nanoengine": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    # If worker processes compute, this process must not use GPU memory only to get the name.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["gpu"] = torch.cuda.get_device_name()
    kinds = ("models", "samplers", "attention_backends", "model_sources", "drafters", "grammars", "tool_parsers")
    for origin in (each.origin for kind in kinds for each in getattr(registry, kind).values()):
        if origin.file is not None:
            found[f"plugin file {origin.file}"] = hashlib.sha256(Path(origin.file).read_bytes()).hexdigest()[:16]
        elif origin.distribution is not None:
            found[origin.distribution] = str(origin.version)
    return found
