"""`InputProcessor`: checks what a caller passes, and makes a request that the engine can run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanoengine.api.deltas import Pooling
from nanoengine.api.errors import RequestError
from nanoengine.params.arguments import check_priority, checked_ids, checked_name
from nanoengine.params.generated import Beginning, TextReader, begin
from nanoengine.params.pooling import pooled_params
from nanoengine.params.resolver import ParamsResolver, ResolvedParams
from nanoengine.params.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """A checked request.

    Attributes:
        prompt_token_ids: empty if the prompt is wrong.
        begun: what each sample begins with; () if none has tokens.
        error: why the request cannot be run; None if it can.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: ResolvedParams
    begun: tuple[Beginning, ...] = ()
    priority: int = 0
    client: str = ""
    error: RequestError | None = None

    @property
    def cache_key(self) -> bytes:
        """What the prefix cache hashes and compares with each block: at most 64 bytes, however long the salt is."""
        key = (self.params.cache_salt or "").encode()
        return key if len(key) < 64 else hashlib.blake2b(key).digest()


class InputProcessor:
    """Checks prompts and parameters for one engine. Thread-safe.

    Attributes:
        ctx: what parameters are checked against.
    """

    def __init__(self, resolver: ParamsResolver, vocab_size: int, max_model_len: int, generates: bool = True) -> None:
        """generates: the model has an output layer; else requests must pool."""
        self._generates = generates
        self._resolver, self.ctx = resolver, resolver.ctx
        self._vocab_size, self._max_model_len = vocab_size, max_model_len

    def preparations(self, request: CheckedRequest) -> list[Callable[[], Any]]:
        """What must be done, on another thread, before the request can start."""
        return [] if request.error is not None else self._resolver.preparations(request.params)

    def process(
        self,
        request_id: str,
        prompt_token_ids: Any,
        params: SamplingParams,
        priority: int | None,
        generated: Any = (),
        pooling: Pooling | None = None,
        client: str = "",
        make_reader: Callable[[ResolvedParams], TextReader | None] | None = None,
    ) -> CheckedRequest:
        """Checks the arguments of `Engine.add_request`.

        Args:
            prompt_token_ids: or the `RequestError` for which the caller refuses the prompt.
            priority: None: that of the parameters. client: who asks.
            pooling: the request wants a vector. Then its prompt may have as many tokens as `max_model_len`, and of the
                parameters only cache_salt and priority may be given.
            make_reader: makes what reads the text of a sample (None: it has no text): a stop string in generated tokens
                counts then.

        Raises:
            ParamsError, PluginError. Wrong tokens are not raised: they are the `error` of the result.
        """
        checked_name("request_id", request_id)
        resolved = self._resolver.resolve(params)
        level = check_priority(priority)
        if pooling is not None:
            resolved = pooled_params(resolved, params, pooling, generated)
        ids = checked_ids(prompt_token_ids, self._vocab_size, self._max_model_len, new_tokens=pooling is None)
        begun: tuple[Beginning, ...] | RequestError = ()
        if not isinstance(ids, RequestError) and pooling is None:
            begun = begin(generated, len(ids), resolved, self._vocab_size, self._max_model_len, make_reader)
        error = next((found for found in (ids, begun) if isinstance(found, RequestError)), None)
        if pooling is None and not self._generates:
            text = "this model has no output layer, and so generates no tokens: it makes embeddings"
            error = RequestError("not_supported", text)
        return CheckedRequest(
            request_id=request_id,
            prompt_token_ids=() if isinstance(ids, RequestError) else ids,
            begun=() if isinstance(begun, RequestError) else begun,
            params=resolved,
            priority=resolved.priority if level is None else level,
            client=checked_name("client", client),
            error=error,
        )
