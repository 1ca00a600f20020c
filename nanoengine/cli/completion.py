"""What the shell completes, and what is an override and no option: recipes, models, groups, keys. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from nanoengine.cli.config_list import RECIPES, options_of
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.sampling_fields import NOT_SUPPORTED, legal_fields
from nanoengine.setup.config.engine_options import OPTIONS_NOT_SUPPORTED
from nanoengine.setup.config.sampler_section import logits_processors
from nanoengine.setup.config.sections import section_keys, section_names
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry

_RUN = ("model=", "output=", "chat=", "prompts=")


def configurations(incomplete: str) -> list[str]:
    """Recipes, models, and YAML files of the folder that is being typed; or an override."""
    if "=" in incomplete:
        return overrides([], incomplete)
    names = [option.name for option in options_of(discover())[0] if option.group in (RECIPES, "model")]
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    found = sorted(folder.iterdir()) if folder.is_dir() else ()
    files = [f"{each}/" if each.is_dir() else str(each) for each in found if each.is_dir() or _is_yaml(each)]
    return _beginning([*names, *files, "model="], incomplete)


def overrides(words: Sequence[str], incomplete: str) -> list[str]:
    """`group=option`, and keys up to their "=". `words`: the overrides before; bash gives `a=b` as three words."""
    registry = discover()
    options = [f"{each.group}={each.name}" for each in options_of(registry)[0] if each.group != RECIPES]
    if len(words) > 1 and words[-1] == "=":
        prefix = f"{words[-2]}="
        return [each.removeprefix(prefix) for each in _beginning(options, f"{prefix}{incomplete}")]
    return _beginning([*options, *keys(registry)], incomplete)


def keys(registry: Registry) -> list[str]:
    """Every key that an override may set, with its "="."""
    sections = {"engine": [each.name for each in fields(EngineOptions)]}
    sections["sampler"] = list(legal_fields(logits_processors(registry)))
    sections |= {name: list(section_keys(registry, name)) for name in section_names(registry)}
    return [*_RUN, *(f"{section}.{name}=" for section, names in sections.items() for name in names)]


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _beginning(found: Sequence[str], incomplete: str) -> list[str]:
    return list(dict.fromkeys(each for each in found if each.startswith(incomplete)))


def instead_of_option(registry: Registry, option: str, words: Sequence[str]) -> str:
    """The tail of the message about an option that is an override here, or an option of Hydra or vLLM; "" for others.

    Of an unknown name, the override whose name is most like it.
    """
    name = option.lstrip("-").replace("-", "_")
    if name in ("cfg", "info", "resolve"):
        return ". nanoengine config show CONFIG [OVERRIDES]... prints the composed configuration"
    instead = OPTIONS_NOT_SUPPORTED.get(name) or NOT_SUPPORTED.get(name)
    by_name: dict[str, list[str]] = {}
    for key in [*keys(registry), *(f"{option.group}=" for option in options_of(registry)[0])]:
        by_name.setdefault(key.rstrip("=").rpartition(".")[2], []).append(key)
    if name not in by_name and instead:
        return f". {instead[0].upper()}{instead[1:]}"
    longer = [each for each in by_name if len(name) > 2 and each.startswith(name)]
    close = [name] if name in by_name else get_close_matches(name, by_name, n=1, cutoff=0.75) or longer[:1]
    found = list(dict.fromkeys(key for each in close for key in by_name[each]))
    at = next((n for n, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    word, following = "".join(words[at : at + 1]), "".join(words[at + 1 : at + 2])
    value = word.partition("=")[2] or ("" if following.startswith("-") or "=" in following else following) or "VALUE"
    return f". Write {' or '.join(f'{key}{value}' for key in found)}" if found else ""


def example_of(command: str) -> str:
    """The tail of the message about a command line without a configuration. `command`: its path."""
    prompts = " 'prompts=[hi]'" if command.endswith((" run", " sweep")) else ""
    return f"For example: {command} smollm2-135m{prompts}, {command} quickstart, {command} config.yaml"
