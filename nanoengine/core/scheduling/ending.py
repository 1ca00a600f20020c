"""Which token ends a request."""

from __future__ import annotations

from nanoengine.core.request import Request
from nanoengine.core.scheduling.messages import Update
from nanoengine.core.step import LogprobRows


def append_token(request: Request, token: int) -> Update:
    """`append_tokens` of one token without log-probs: what nearly every row of every step brings."""
    num_tokens = request.num_tokens + 1
    if num_tokens >= request.max_len or token in request.stop_set or request.num_untold:
        return append_tokens(request, [token], None, None)
    request.output_token_ids.append(token)
    request.num_tokens = num_tokens
    return tuple.__new__(Update, (request, (token,), None, None, None, None, 0, None))  # its own __new__ is slower


def append_tokens(request: Request, new: list[int], drawn: LogprobRows | None, prompt: LogprobRows | None) -> Update:
    """Appends new tokens up to the one that ends the request, if one does; a stop token counts before the length.

    The sampler masks stop tokens below `min_tokens`; should one come nevertheless, it does not end the request.
    """
    num_tokens, stop_set, max_len = request.num_tokens, request.stop_set, request.max_len
    for i, token in enumerate(new, start=1):
        num_tokens += 1
        stops = token in stop_set and num_tokens > request.min_len
        if stops or num_tokens >= max_len:
            new = new[:i]
            break
    else:
        stops = False
    request.output_token_ids += new
    request.num_tokens = num_tokens
    told = take_untold(request, len(new)) if request.num_untold else tuple(new)
    if stops:
        return Update(request, told, "stop", None if token in request.params.eos_ids else token, drawn, prompt)
    if num_tokens >= max_len:
        return Update(request, told, "length", request.length_reason, drawn, prompt)
    return Update(request, told, None, None, drawn, prompt)


def take_untold(request: Request, num_new: int = 0) -> tuple[int, ...]:
    """Its last `num_new` tokens and those before them that no update has told; they count as told from here on."""
    first = len(request.output_token_ids) - num_new - request.num_untold
    request.num_untold = 0
    return tuple(request.output_token_ids[first:])
