"""From the fields of a request to the engine's `SamplingParams`."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import Any, Protocol

from nanoengine.api.errors import ParamsError, shown
from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.server.config import ServerConfig
from nanoengine.server.errors import invalid
from nanoengine.server.protocol.generate import GenerateRequest
from nanoengine.service.client import EngineInfo

# Fields of the request that are the engine's under the same name, but need a conversion or a check.
_OWN = frozenset({"n", "max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "structured_outputs", "cache_salt",
                  "priority"})  # fmt: skip

_ID = re.compile(r"-?[1-9][0-9]{0,18}|0")
_MOST = 16_384  # entries of a list of parameters; the engine has no room for more
_MOST_ENTRIES = {"bad_words": 1024}  # each is tokenized several times


def sampling_params(
    request: GenerateRequest,
    info: EngineInfo,
    config: ServerConfig,
    secret: bytes | None,
    constraint: StructuredOutputsParams | None,
    own: Mapping[str, Any],
) -> SamplingParams:
    """The parameters, over the defaults of the model or the configuration.

    Args:
        constraint: what the output must match: `constraint_of` the request, or what its tools demand.
        secret: of the caller's key, of which the cache salt is made; None: keys are not asked for.
        own: what the endpoint itself sets: max_tokens, logprobs and so on; it wins.

    Raises `ParamsError` or `ApiError`. The engine checks the values of processors' parameters.
    """
    fields = dict(info.default_sampling)
    for name in request.model_fields_set & info.sampling_names - _OWN:
        value = getattr(request, name)
        if isinstance(value, list | dict) and len(value) > (most := _MOST_ENTRIES.get(name, _MOST)):
            raise invalid(f"{name} must have at most {most} entries, not {len(value)}", name)
        if value is not None:
            fields[name] = value
    fields["n"] = checked_n(request, info, config)
    if request.logit_bias is not None:
        fields["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    if request.prompt_logprobs is not None:
        fields["prompt_logprobs"] = checked_logprobs("prompt_logprobs", request.prompt_logprobs, info, config)
    if constraint is not None:
        fields["structured_outputs"] = constraint
    salt = cache_salt(request.cache_salt, secret)
    if salt is not None:
        fields["cache_salt"] = salt
    return SamplingParams(**{**fields, **own})


def checked_n(request: GenerateRequest, info: EngineInfo, config: ServerConfig) -> int:
    n = 1 if request.n is None else request.n
    most = info.max_n if config.max_n is None else min(config.max_n, info.max_n)
    if not 1 <= n <= most:
        raise invalid(f"n must be from 1 to {most}, not {shown(n)}", "n")
    if request.best_of is not None and request.best_of != n:
        raise invalid(f"best_of is not supported, except with the value of n ({n}): request n samples", "best_of")
    return n


def checked_logprobs(name: str, count: int, info: EngineInfo, config: ServerConfig) -> int:
    """The count, within the limits of the server and the engine. There is no value for "all"."""
    most = config.max_logprobs if info.max_logprobs < 0 else min(config.max_logprobs, info.max_logprobs)
    if not 0 <= count <= most:
        raise invalid(f"{name} must be from 0 to {most}, not {shown(count)}", name)
    return count


class _Prioritised(Protocol):
    priority: int | None


def checked_priority(request: _Prioritised, info: EngineInfo) -> int | None:
    if request.priority and info.scheduling_policy == "fcfs":
        raise invalid(
            "priority has no effect, because the engine's scheduling_policy is 'fcfs': leave it out, or start the "
            "server with engine.scheduling_policy=priority",
            "priority",
        )
    return request.priority


def cache_salt(given: str | None, secret: bytes | None) -> str | None:
    """Only requests of the same key share prefixes; with the client's salt, of these only those that give the same."""
    if given == "":
        raise ParamsError("cache_salt must be a string that is not empty")
    if secret is None:
        return given
    return hmac.new(secret, (given or "").encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _token_id(key: str) -> int:
    if _ID.fullmatch(key) is None:  # one spelling for each id, or two keys could be one
        raise invalid(f"logit_bias: {shown(key)} is not a token id", "logit_bias")
    return int(key)
