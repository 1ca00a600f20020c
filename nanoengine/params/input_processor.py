"""`InputProcessor`: checks what a caller passes, and makes a request that the engine can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanoengine.api.errors import RequestError
from nanoengine.params.arguments import check_priority, check_request_id, checked_prompt
from nanoengine.params.generated import Beginning, TextReader, begin
from nanoengine.params.sampling_params import ParamsResolver, ResolvedParams, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """A checked request.

    Attributes:
        prompt: its text, if it is known. prompt_token_ids: empty if the prompt is wrong.
        begun: what each sample begins with; () if none has tokens.
        error: why the request cannot be run; None if it can.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: ResolvedParams
    prompt: str | None = None
    begun: tuple[Beginning, ...] = ()
    priority: int = 0
    error: RequestError | None = None


class InputProcessor:
    """Checks prompts and parameters for one engine, and encodes text. Thread-safe.

    Attributes:
        ctx: what parameters are checked against.
    """

    def __init__(
        self,
        resolver: ParamsResolver,
        encode: Callable[[str], list[int]],
        make_reader: Callable[[ResolvedParams], TextReader | None],
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        """`encode`: text -> token ids; raises `TokenizerMissing` if there is no tokenizer. `make_reader`: what makes
        the text of a sample; None if it has no text."""
        self._resolver, self._encode, self.ctx = resolver, encode, resolver.ctx
        self._make_reader, self._vocab_size, self._max_model_len = make_reader, vocab_size, max_model_len

    def preparations(self, request: CheckedRequest) -> list[Callable[[], Any]]:
        """What must be done, on another thread, before the request can start."""
        return [] if request.error is not None else self._resolver.preparations(request.params)

    def process(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        priority: int | None,
        prompt_text: str | None,
        generated: Any = (),
    ) -> CheckedRequest:
        """Checks the arguments of `Engine.add_request`. `priority` None: that of the parameters.

        Raises `ParamsError`, `PluginError` or `TokenizerMissing`. Wrong tokens are not raised: they are the `error` of
        the result.
        """
        check_request_id(request_id)
        resolved = self._resolver.resolve(params)
        level = check_priority(priority)
        ids, text = checked_prompt(prompt, prompt_text, self._encode, self._vocab_size, self._max_model_len)
        begun: tuple[Beginning, ...] | RequestError = ()
        if not isinstance(ids, RequestError):
            begun = begin(generated, len(ids), resolved, self._vocab_size, self._max_model_len, self._make_reader)
        error = next((found for found in (ids, begun) if isinstance(found, RequestError)), None)
        return CheckedRequest(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=() if isinstance(ids, RequestError) else ids,
            begun=() if isinstance(begun, RequestError) else begun,
            params=resolved,
            priority=resolved.priority if level is None else level,
            error=error,
        )
