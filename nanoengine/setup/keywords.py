"""Rejects keywords that a method of `LLM` does not have. The error says where the keyword belongs."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from nanoengine.api.errors import ConfigError, ParamsError, is_failure, nearest
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.sampling_fields import CORE_TYPES, NOT_SUPPORTED, processor_types
from nanoengine.setup.config.engine_options import OPTIONS_NOT_SUPPORTED
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry

_T = TypeVar("_T", bound=type[Any])
_BY_PLACE = inspect.Parameter.POSITIONAL_OR_KEYWORD
_KEYS: Mapping[str, str] = {  # keyword of the constructor -> key of a configuration
    "model": "model",
    "attention": "attention",
    "revision": "model.revision",
    "implementation": "model.implementation",
}
_MEMBERS: Mapping[str, str] = {
    "get_default_sampling_params": "it is the attribute default_params",
    "llm_engine": "it is the attribute engine",
    "beam_search": "there is no beam search; SamplingParams(n=...) draws several samples",
    "encode": "use embed, or hidden_states for the states of each token",
    "classify": "use embed, or hidden_states for the states of each token",
    "reward": "use embed, or hidden_states for the states of each token",
    "abort": "close the stream, or use AsyncLLM.abort",
    "get_metrics": "use stats",
    "start_profile": "use observe with a TraceFile",
    "stop_profile": "use observe with a TraceFile",
    "apply_model": "the model is the attribute model",
    "collective_rpc": "the model is the attribute model",
    "preprocess_chat": "use chat_prompt",
    "sleep": "use close, and make a new LLM",
    "wake_up": "use close, and make a new LLM",
}
"""Members of vLLM's `LLM`, and what to do instead of each."""
_ARGUMENTS: Mapping[str, str] = {
    "prompt_token_ids": "token ids are a prompt of generate: [[1, 2, 3]], or {'prompt_token_ids': [1, 2, 3]}",
    "lora_request": "adapters are not supported yet",
}
"""Keywords of vLLM's methods, and what to do instead of each."""
_ELSEWHERE = 0.75  # least likeness of a name that belongs to another method or object
_SHOWN = 60  # most characters of a value in an example


def names_keywords(cls: _T) -> _T:
    """Class decorator: public methods raise `ParamsError` for an unknown keyword. The error says where it belongs.

    The attribute `sampling_names` of an instance has the fields of `SamplingParams`.
    """
    methods = dict(_methods(cls))
    for name, method in methods.items():
        found = vars(cls)[name]
        checked = _checked(cls, name, method)
        setattr(cls, name, classmethod(checked) if isinstance(found, classmethod) else checked)
    return cls


def check_options(cls: type[Any], options: Mapping[str, Any], registry: Registry) -> None:
    """Raises `ConfigError` for an unknown engine option. The error says where it belongs."""
    own = [*_own(cls.__init__), *(f.name for f in fields(EngineOptions))]
    for name, value in options.items():
        if name not in own and name not in OPTIONS_NOT_SUPPORTED:
            where = _where(cls, "__init__", name, value, own, sampling_names(registry))
            raise ConfigError(f"unknown engine option {name!r}; {where}")


def sampling_names(registry: Registry) -> frozenset[str]:
    """The fields of `SamplingParams`: the engine's own, and those of the registered processors that are not broken."""
    names = set(CORE_TYPES)
    for found in registry.samplers.values():
        try:
            names |= processor_types(found.spec.name, found.spec.params).keys()
        except BaseException as error:  # reported when the processor is used
            if not is_failure(error):
                raise
    return frozenset(names)


def missing_member(cls: type[Any], name: str) -> str:
    """The message of an `AttributeError`: what to use in the place of vLLM's name, or the nearest public name."""
    if cls.__name__ == "LLM" and name in _MEMBERS:
        return f"{cls.__name__} has no {name!r}, which vLLM has: {_MEMBERS[name]}"
    public = [each for each in dir(cls) if not each.startswith("_")]
    return f"{cls.__name__!r} object has no attribute {name!r}; {nearest(name, public)}"


def _methods(cls: type[Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, found in vars(cls).items():
        method = found.__func__ if isinstance(found, classmethod) else found
        if not name.startswith("_") and inspect.isfunction(method):
            yield name, method


def _own(method: Callable[..., Any]) -> list[str]:
    """The keywords of a method, without `self` and `cls`; for `Unpack[SomeDict]`, the keys of the `TypedDict`."""
    names = []
    for parameter in [*inspect.signature(method).parameters.values()][1:]:
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.append(parameter.name)
        elif str(parameter.annotation).startswith("Unpack["):
            names += vars(sys.modules[method.__module__])[parameter.annotation[7:-1]].__annotations__
    return names


def _checked(cls: type[Any], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    own = frozenset(_own(method))

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **given: Any) -> Any:
        if not own.issuperset(given):
            wrong = next(each for each in given if each not in own)
            known = sampling_names(discover()) if isinstance(self, type) else self.sampling_names
            where = _where(cls, name, wrong, given[wrong], sorted(own), known)
            raise ParamsError(f"{cls.__name__}.{name} has no keyword {wrong!r}; {where}")
        return method(self, *args, **given)

    return checked


def _where(
    cls: type[Any], method: str, name: str, value: object, own: Collection[str], sampling: Collection[str]
) -> str:
    """Where `name` belongs. If it is unknown: the name that was probably meant, its place, and all valid names."""
    places = {**_places(cls), **dict.fromkeys(sampling, "SamplingParams"), **dict.fromkeys(own, method)}
    if name in places:
        return _place(cls, method, name, places[name], value)
    if name in _ARGUMENTS:
        return _ARGUMENTS[name]
    if name in dict(_methods(cls)):
        return _call(cls, method, name)
    if method.startswith("chat") and name not in NOT_SUPPORTED:
        variable = f"{{{name!r}: {_example(value)}}}"
        hint = f"; a variable of the chat template goes into chat_template_kwargs={variable}"
    else:
        hint = f"; vLLM's {name!r} is not supported: {NOT_SUPPORTED[name]}" if name in NOT_SUPPORTED else ""
    close = difflib.get_close_matches(name, sorted(own), n=1, cutoff=0.6)
    close = close or difflib.get_close_matches(name, sorted(places), n=1, cutoff=_ELSEWHERE)
    valid = f"Valid: {', '.join(own) or '(none)'}{hint}"
    if not close:
        return valid
    meant = close[0]
    elsewhere = "" if meant in own else f" {_place(cls, method, meant, places[meant], value)}."
    return f"did you mean {meant!r}?{elsewhere} {valid}"


def _places(cls: type[Any]) -> dict[str, str]:
    """Each keyword of the class's methods, and each engine option -> the first method that has it."""
    found: dict[str, str] = {}
    for name, method in _methods(cls):
        if name != "from_run_config":
            for keyword in _own(method):
                found.setdefault(keyword, name)
    start = [*_own(cls.__init__), *(f.name for f in fields(EngineOptions))]
    return {**found, **dict.fromkeys(start, "__init__")}


def _call(cls: type[Any], method: str, name: str) -> str:
    """How to call the method `name`, which was given as a keyword of `method`."""
    given = [each.name for each in inspect.signature(vars(cls)[name]).parameters.values() if each.kind is _BY_PLACE][1:]
    if method == "chat" and given[:1] == ["prompt"]:
        given[0] = "messages"
    return f"{name} is a separate method: {cls.__name__.lower()}.{name}({', '.join(given)})"


def _place(cls: type[Any], method: str, name: str, place: str, value: object) -> str:
    if method in ("from_config", "from_run_config") and place in ("SamplingParams", "__init__") and name != "plugins":
        section = "sampler" if place == "SamplingParams" else "engine"
        override = f'["{_KEYS.get(name, f"{section}.{name}")}={_yaml(value)}"]'
        where = f"overrides={override}" if method == "from_config" else f"load_config(path, {override})"
        return f"{name} is a key of the configuration: give {where}"
    if place == "SamplingParams":
        return f"{name} is a field of SamplingParams: pass SamplingParams({name}={_example(value)})"
    if place == "__init__":
        return f"{name} is an option of the engine: give it to {cls.__name__}(model, {name}={_example(value)})"
    return f"{name} is a keyword of {cls.__name__}.{place}"


def _yaml(value: object) -> str:
    if isinstance(value, str):
        return value if len(value) <= _SHOWN else "..."
    return json.dumps(value) if isinstance(value, bool | int | float | None) else "..."


def _example(value: object) -> str:
    plain = isinstance(value, bool | int | float | str | None)
    shown = repr(value) if plain and len(str(value)) <= _SHOWN else "..."
    return shown
