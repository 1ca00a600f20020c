"""From a request's deltas to what a user gets: text, stop strings, log-probs, metrics. On the caller's side.

A stop string is found here, and not by the engine: `OutputAssembler.take` says which samples are to be aborted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from nanoengine.api.deltas import FinishReason, LogprobRows, RequestDelta, SampleDelta
from nanoengine.api.errors import RequestError, is_failure, text_failure
from nanoengine.api.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    copy_when_read,
    mutable_twin,
)
from nanoengine.params.generated import NOTHING, Beginning
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.resolver import ResolvedParams
from nanoengine.text.detokenizer import IncrementalDetokenizer
from nanoengine.text.tokenizer import Tokenizer

Logprobs = dict[int, Logprob]
_NewCompletion, _NewRequest, _NewMetrics = map(mutable_twin, (CompletionOutput, RequestOutput, RequestMetrics))


@dataclass(slots=True)
class SampleOutput:
    """What one sample has so far.

    Attributes:
        token_ids: without those that come after a stop string.
        num_given, given_chars: tokens that it began with, and characters of their text.
        reported: tokens that `new_output` has returned, with those that it began with.
        ended: the output of a sample that has ended.
    """

    index: int
    detokenizer: IncrementalDetokenizer | None
    logprobs: list[Logprobs | None] | None
    token_ids: list[int] = field(default_factory=list)
    num_given: int = 0
    given_chars: int = 0
    reported: int = 0
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    ended: CompletionOutput | None = None

    @classmethod
    def begin(cls, index: int, params: ResolvedParams, tokenizer: Tokenizer | None, begun: Beginning) -> SampleOutput:
        """A sample that begins so. Tokens that no reader has read yet are read here; a stop string cuts them."""
        given = begun.reader is not None
        sample = cls(
            index,
            begun.reader if given else IncrementalDetokenizer.from_params(tokenizer, params),
            None if params.logprobs is None else [],
            [*begun.token_ids],
            finish_reason=begun.finish_reason,
            stop_reason=begun.stop_reason,
        )
        if sample.token_ids and not given and sample.detokenizer is not None:
            sample.decode(begun.token_ids)
        sample.num_given = len(sample.token_ids)
        sample.given_chars = len(sample.detokenizer.text) if sample.detokenizer is not None else 0
        if sample.logprobs is not None:
            sample.logprobs += [None] * sample.num_given
        return sample

    def take(self, delta: SampleDelta, logprobs: Sequence[Logprobs]) -> None:
        """Add what is new. `logprobs`: those of the delta."""
        _, token_ids, _, self.finish_reason, self.stop_reason = delta
        before = len(self.token_ids)
        self.token_ids += token_ids
        if self.detokenizer is not None:
            self.decode(token_ids)
        if self.logprobs is not None and delta.logprobs is not None:
            kept = len(self.token_ids) - before
            self.logprobs += logprobs[:kept]
            for value in delta.logprobs.logprobs[:kept].tolist():  # one by one, to round as in steps of one
                self.cumulative_logprob += value

    def decode(self, new: Sequence[int]) -> None:
        """Decode the newest tokens. A stop string found there ends the sample, and cuts them."""
        assert self.detokenizer is not None
        reader, reason = self.detokenizer, self.finish_reason
        matched = reader.push(new) if reason is None else reader.read(new, reason)
        if matched is not None:
            self.finish_reason, self.stop_reason = "stop", matched
            del self.token_ids[reader.num_tokens :]

    def new_output(self) -> CompletionOutput | None:
        """What is new since the last one; None: nothing is. Its cost does not grow with the sample."""
        start, ends = max(self.reported, self.num_given), self.finish_reason is not None and self.ended is None
        text = self.detokenizer.take() if self.detokenizer is not None else ""
        if start > self.reported:  # the first time: without what was given
            text = text[self.given_chars :]
        tokens = tuple(self.token_ids[start:])
        self.reported = start + len(tokens)
        if not (text or tokens or ends):
            return None
        output: CompletionOutput = _NewCompletion(
            index=self.index,
            text=text,
            token_ids=tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else tuple(self.logprobs[start:]),
        )
        output.__class__ = CompletionOutput
        if ends:
            self.ended = output
        return output

    def output(self) -> CompletionOutput:
        """The sample's output now, at a cost that does not grow with the sample."""
        if self.ended is not None:
            return self.ended
        output: CompletionOutput = _NewCompletion(
            index=self.index,
            text=self.detokenizer.text if self.detokenizer is not None else "",
            token_ids=(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            num_given_tokens=self.num_given,
            num_given_chars=self.given_chars,
        )
        output.__class__ = CompletionOutput
        lists: dict[str, list[Any]] = {"token_ids": self.token_ids}
        if self.logprobs is not None:
            lists["logprobs"] = self.logprobs
        copy_when_read(output, lists)
        if self.finish_reason is not None:
            self.ended = output = replace(output)  # which reads all fields: it does not need the lists
        return output


class OutputAssembler:
    """Makes one request's cumulative outputs of its deltas.

    Attributes:
        finished: its last output is there. If the delta that brought it is not the request's last one, the request must
            be aborted: its samples have ended by stop strings, or the tokenizer failed.
        error: why it was refused or failed.
    """

    def __init__(self, given: CheckedRequest, tokenizer: Tokenizer | None, prompt: str | None = None) -> None:
        """`tokenizer`: None: there is no text. `prompt`: its text, if it is known.

        Raises what the tokenizer raises over tokens that the request begins with.
        """
        self._given, self._tokenizer, self._prompt = given, tokenizer, prompt
        self._arrival = time.monotonic()
        self._first_token: float | None = None
        self._ended: float | None = None
        self._taking = self._newest = RequestDelta(given.request_id)  # _newest: the last one that was taken whole
        self._prompt_logprobs: tuple[Logprobs | None, ...] | None = None
        self._reported = 0  # of them, those that `new_output` has returned
        if given.params.prompt_logprobs is not None:
            self._prompt_logprobs = (None,)  # of the first token: there is no token before it
        self.finished = False
        self.error: RequestError | None = None
        begun = given.begun or (NOTHING,) * given.params.n
        self._samples: list[SampleOutput] = []
        if given.error is None:
            self._samples = [SampleOutput.begin(i, given.params, tokenizer, each) for i, each in enumerate(begun)]
        self._open = sum(sample.finish_reason is None for sample in self._samples)  # that have not ended

    def take(self, delta: RequestDelta) -> Sequence[int]:
        """Add a delta. Returns the samples to abort: a stop string ended them, and the engine does not know it.

        A delta that comes again, because Ctrl-C came while it was delivered, is not added again. If it came in the
        middle of `take`, the request fails ("interrupted"). What the tokenizer raises fails it, too ("text_failed").
        """
        if self.finished or delta is self._newest:
            return ()
        if self._taking is not self._newest:
            self._fail(RequestError("interrupted", "the text of this request was interrupted while it was made"))
            return ()
        self._taking = delta
        _, samples, _, prompt_logprobs, _, _, _, _, _, error = delta
        stopped: tuple[int, ...] = ()
        try:
            for new in samples:
                sample = self._samples[new[0]]
                if sample.finish_reason is None:  # else a stop string has ended it: the rest is dropped
                    if self._first_token is None and new[1]:
                        self._first_token = time.monotonic()
                    sample.take(new, () if new[2] is None else logprobs_by_id(new[2], self._token_text))
                    if sample.finish_reason is not None:
                        self._open -= 1
                        stopped += (sample.index,) if new[3] is None else ()
            if prompt_logprobs is not None and self._prompt_logprobs is not None:
                self._prompt_logprobs += tuple(logprobs_by_id(prompt_logprobs, self._token_text))
        except BaseException as raised:
            if not is_failure(raised):
                raise
            self._fail(text_failure(raised))
            return ()
        self._newest = delta
        if not self._open and self._samples:
            self.finished, self._ended = True, time.monotonic()
        elif error is not None:
            self._fail(error)
        return stopped

    def output(self) -> RequestOutput:
        """What the request has so far."""
        prompt_logprobs = None if self.error else self._prompt_logprobs
        return self._output([] if self.error else [sample.output() for sample in self._samples], prompt_logprobs)

    def new_output(self) -> RequestOutput | None:
        """What is new since the last one: of the samples that have something new, and of the prompt's log-probs, which
        wait for the first of them. None: nothing is. Not to be used beside `output`."""
        found = [] if self.error else [new for sample in self._samples if (new := sample.new_output()) is not None]
        if not found and not self.finished:
            return None
        logprobs, start = self._prompt_logprobs, self._reported
        if logprobs is not None:
            self._reported, logprobs = len(logprobs), logprobs[start:] or None
        return self._output(found, logprobs)

    def _output(
        self, outputs: list[CompletionOutput], prompt_logprobs: tuple[Logprobs | None, ...] | None
    ) -> RequestOutput:
        generated = longest = 0
        for sample in self._samples:
            length = len(sample.token_ids) - sample.num_given
            generated, longest = generated + length, length if length > longest else longest
        metrics: RequestMetrics = _NewMetrics(
            arrival=self._arrival,
            first_scheduled=self._newest.first_scheduled,
            first_token=self._first_token,
            finished=self._ended,
            num_generated=generated,
            longest=longest,
        )
        metrics.__class__ = RequestMetrics
        output: RequestOutput = _NewRequest(
            request_id=self._given.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._given.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            metrics=metrics,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self._newest.num_cached_tokens,
            seed=self._newest.seed,
            error=self.error,
        )
        output.__class__ = RequestOutput
        return output

    def _fail(self, error: RequestError) -> None:
        self.error, self.finished, self._ended = error, True, time.monotonic()

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


def logprobs_by_id(rows: LogprobRows, text: Callable[[int], str | None]) -> list[Logprobs]:
    """One dict for each position: the best tokens first, then the token itself if it is not one of them.

    Of tokens with equal log-probs each has the lowest of their ranks. `text`: of a token.
    """
    out: list[Logprobs] = []
    ids, values = rows.top_ids.tolist(), rows.top_logprobs.tolist()
    own = zip(rows.token_ids.tolist(), rows.logprobs.tolist(), rows.ranks.tolist(), strict=True)
    for (start, end), (chosen, value, place) in zip(pairwise(rows.top_offsets.tolist()), own, strict=True):
        best: Logprobs = {}
        rank = 1
        for at in range(start, end):
            rank = at - start + 1 if at > start and values[at] < values[at - 1] else rank
            best[ids[at]] = Logprob(values[at], rank, text(ids[at]))
        best[chosen] = Logprob(value, place, text(chosen))
        out.append(best)
    return out
