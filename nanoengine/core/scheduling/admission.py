"""Judging a request that wants in: could it ever run, and what does the prefix cache hold for it."""

from __future__ import annotations

from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockManager, Hits


def refuse_misfit(request: Request, max_model_len: int, blocks: BlockManager) -> None:
    """Raises `RequestError`, with the numbers, where the request could never run."""
    num_prompt = request.prompt_len
    if num_prompt == 0:
        raise RequestError("invalid_prompt", "the prompt is empty: it must have one token at least")
    if num_prompt >= max_model_len:
        raise RequestError(
            "too_long",
            f"the prompt has {num_prompt} tokens and max_model_len is {max_model_len}, which must leave room for one "
            f"new token: shorten the prompt to {max_model_len - 1} tokens or raise max_model_len",
        )
    need, have = blocks.blocks_for(num_prompt), blocks.num_blocks
    if need > have:
        raise RequestError(
            "does_not_fit",
            f"the prompt's {num_prompt} tokens need {need} KV blocks of {blocks.block_size} and the cache has {have}: "
            "shorten the prompt or give the KV cache more memory",
        )


def may_read_cache(request: Request) -> bool:
    """Prompt log-probs need every prompt position computed, until all are delivered; and no request is broken twice by
    what another one computed."""
    return request.void < 0 and (
        request.params.prompt_logprobs is None or request.prompt_logprobs_done >= request.prompt_len
    )


def find_hits(request: Request, blocks: BlockManager) -> Hits:
    return blocks.match(request) if may_read_cache(request) else blocks.no_hits()
