"""What the caller's side of a service knows of a request: enough to make text and outputs of its deltas."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nanoengine.api.errors import RequestError
from nanoengine.params.arguments import checked_ids
from nanoengine.params.generated import Beginning, begin
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.resolver import unchecked_params
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.service.client import EngineInfo
from nanoengine.text import IncrementalDetokenizer, TemplateProcesses, Tokenizer, load_tokenizer


def tokenizer_of(info: EngineInfo) -> Tokenizer | None:
    """The engine's tokenizer, for this process. None: it has none."""
    if info.tokenizer is None:
        return None
    processes = TemplateProcesses(info.chat_template_timeout, info.chat_template_memory)
    return load_tokenizer(Path(info.tokenizer), max_tokens=info.max_model_len, processes=processes)


def checked_on_this_side(
    request_id: str,
    prompt_token_ids: Any,
    params: SamplingParams,
    generated: Any,
    info: EngineInfo,
    tokenizer: Tokenizer | None,
) -> CheckedRequest:
    """The request as an `OutputAssembler` takes it. The engine checks its parameters; tokens are checked here too,
    because a stop string in `generated` is found here alone."""
    end_ids = frozenset(i for i in info.end_ids if 0 <= i < info.vocab_size)
    resolved = unchecked_params(params.core, info.vocab_size, end_ids)
    ids = checked_ids(prompt_token_ids, info.vocab_size, info.max_model_len)
    begun: tuple[Beginning, ...] | RequestError = ()
    if not isinstance(ids, RequestError):
        make_reader = partial(IncrementalDetokenizer.from_params, tokenizer)
        begun = begin(generated, len(ids), resolved, info.vocab_size, info.max_model_len, make_reader)
    return CheckedRequest(
        request_id=request_id,
        prompt_token_ids=() if isinstance(ids, RequestError) else ids,
        params=resolved,
        begun=() if isinstance(begun, RequestError) else begun,
        error=next((found for found in (ids, begun) if isinstance(found, RequestError)), None),
    )
