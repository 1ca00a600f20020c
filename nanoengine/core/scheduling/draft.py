"""The step that is being put together: who gets how many tokens. Nothing is booked before it is launched."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoengine.api.errors import RequestError, described, is_failure, nearest
from nanoengine.api.plugin_calls import place_and_fix
from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.plan_builder import ColumnValues
from nanoengine.params.arguments import too_long
from nanoengine.params.sampling_params import pack_column


@dataclass(slots=True)
class Draft:
    """picks: request -> tokens it gets. new: admitted request -> tokens that the prefix cache holds. grown: request
    -> index of its first block that the device does not know. writers: hash of a prompt block that this step
    completes -> the request that computes it. preempted: somebody had to yield. steady: all steady rows have a token,
    too. ending: requests whose last token is in flight: they get no row, and leave their place to others.
    """

    budget: int
    picks: dict[Request, int] = field(default_factory=dict)
    new: dict[Request, int] = field(default_factory=dict)
    grown: dict[Request, int] = field(default_factory=dict)
    writers: dict[bytes, Request] = field(default_factory=dict)
    host_values: ColumnValues = field(default_factory=dict)
    preempted: bool = False
    steady: bool = False
    ending: int = 0

    def admit(self, request: Request, num_new: int, cached: int, blocks: BlockManager) -> None:
        self.picks[request] = num_new
        self.budget -= num_new
        self.new[request] = cached
        self.grown[request] = 0
        self._note_writer(request, cached, cached + num_new, blocks)

    def drop(self, request: Request) -> None:
        """Takes a request out again, and its share of the budget back."""
        self.budget += self.picks.pop(request, 0)
        self.new.pop(request, None)
        self.grown.pop(request, None)
        kept = {key: {s: v for s, v in values.items() if s != request.slot} for key, values in self.host_values.items()}
        self.host_values = {key: values for key, values in kept.items() if values}

    def only(self, request: Request) -> tuple[dict[Request, int], dict[Request, int], ColumnValues]:
        """`new`, `grown` and `host_values` of one request."""
        slot = request.slot
        new, grown = ({request: d[request]} if request in d else {} for d in (self.new, self.grown))
        return new, grown, {key: {slot: values[slot]} for key, values in self.host_values.items() if slot in values}

    def note_writers(self, blocks: BlockManager) -> None:
        """Prompt blocks that running requests complete in this step."""
        for request, num_new in self.picks.items():
            if request.num_computed < request.prompt_len:
                self._note_writer(request, request.num_computed, request.num_computed + num_new, blocks)

    def _note_writer(self, request: Request, start: int, end: int, blocks: BlockManager) -> None:
        if blocks.enable_prefix_caching:
            for key in blocks.prompt_hashes(request, start, end):
                self.writers.setdefault(key, request)

    def writes_next_block(self, request: Request, num_hits: int, blocks: BlockManager) -> bool:
        """Whether this step computes the first block that the request misses: it had better wait for the hit."""
        if not self.writers or num_hits >= (request.num_tokens - 1) // blocks.block_size:
            return False
        writer = self.writers.get(request.block_hashes[num_hits])
        return writer is not None and blocks.same_block(writer, request, num_hits)


def ask_host_processors(request: Request, into: ColumnValues) -> RequestError | None:
    """Fills in the columns of the request's host-token processors for the token to be drawn; returns what they raise.

    A processor is a plugin: whatever goes wrong in it fails this request alone.
    """
    values: ColumnValues = {}
    for processor in request.params.processors:
        if not processor.params.host_tokens:
            continue
        try:
            columns = processor.params.host_columns(request.prompt_token_ids, tuple(request.output_token_ids))
            for column, value in columns.items():
                if column not in processor.params.columns:
                    raise KeyError(f"no column {column!r}: {nearest(column, processor.params.columns)}")
                array = pack_column(processor.name, column, processor.params.columns[column], value)
                values[processor.name, column] = {request.slot: array}
        except BaseException as error:
            if not is_failure(error):
                raise
            text = f"host_columns() of logits processor {processor.name!r} raised {described(error)}"
            failure = RequestError("processor_failed", text + place_and_fix(error, type(processor.params), text))
            failure.__cause__ = error
            return failure
    for key, value in values.items():
        into.setdefault(key, {}).update(value)
    return None


def refuse_misfit(request: Request, max_model_len: int, blocks: BlockManager) -> None:
    """Raises `RequestError`, with the numbers, where the request could never run."""
    num_prompt = request.prompt_len
    if num_prompt == 0:
        raise RequestError("invalid_prompt", "the prompt is empty: it must have one token at least")
    if num_prompt >= max_model_len:
        raise too_long(num_prompt, max_model_len)
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
