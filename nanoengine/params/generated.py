"""Output tokens that a request begins with: their checks, their text, and where tokens end a sample."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

from nanoengine.api.errors import RequestError, described, is_failure, shown, text_failure
from nanoengine.params.arguments import as_int, in_vocabulary, kind_of
from nanoengine.params.resolver import ResolvedParams

Generated = Sequence[int] | Sequence[Sequence[int]]
"""Of a request's only sample, or a sequence for each of its n samples."""
EndReason = Literal["stop", "length"]


class TextReader(Protocol):
    """What makes the text of a sample: `text.IncrementalDetokenizer`."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def text(self) -> str: ...
    def read(self, token_ids: Sequence[int], reason: str | None) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a sample begins with. reader: has read the tokens; None: there is no text. finish_reason, stop_reason: of a
    sample that ends with its last token, else None."""

    token_ids: tuple[int, ...] = ()
    reader: Any = None
    finish_reason: EndReason | None = None
    stop_reason: int | str | None = None


NOTHING = Beginning()


def first_end(
    token_ids: Sequence[int], num_tokens: int, stop_set: Collection[int], min_len: int, max_len: int
) -> tuple[int, EndReason | None]:
    """How many of these tokens a sample with `num_tokens` keeps, and why it ends with the last one. Lengths include the
    prompt.

    A stop token counts before the length. The sampler masks stop tokens up to `min_len` tokens; should one come there
    nevertheless, it does not end the sample.
    """
    for count, token in enumerate(token_ids, start=1):
        if token in stop_set and num_tokens + count > min_len:
            return count, "stop"
        if num_tokens + count >= max_len:
            return count, "length"
    return len(token_ids), None


def begin(
    generated: Any,
    prompt_len: int,
    params: ResolvedParams,
    vocab_size: int,
    max_model_len: int,
    make_reader: Callable[[ResolvedParams], TextReader | None] | None,
) -> tuple[Beginning, ...] | RequestError:
    """What each sample begins with; () where no sample has tokens. Or the error that rejects the request."""
    try:
        given = _checked(generated, params.n, vocab_size, max_model_len)
    except BaseException as error:  # the class of a list or an id may be any code
        if not is_failure(error):
            raise
        return RequestError("invalid_generated", f"reading the generated tokens raised {described(error)}")
    if isinstance(given, RequestError):
        return given
    limit = max_model_len if params.max_tokens is None else min(max_model_len, prompt_len + params.max_tokens)
    try:
        return _begun(given, prompt_len, params, limit, make_reader)
    except BaseException as error:  # a tokenizer's
        if not is_failure(error):
            raise
        return text_failure(error)


def _checked(generated: Any, n: int, vocab_size: int, max_model_len: int) -> list[tuple[int, ...]] | RequestError:
    valid = "token ids" if n == 1 else f"a list of {n} lists of token ids, one for each sample"
    if isinstance(generated, str | bytes | Mapping):
        return RequestError("invalid_generated", f"generated must be {valid}, not {kind_of(generated)}")
    each = list(islice(generated, max_model_len))
    if n == 1 and any(as_int(token) is not None for token in each):
        each = [each]
    if each and (len(each) != n or not all(map(_may_be_ids, each))):
        return RequestError("invalid_generated", f"generated must be {valid}, not {shown(generated)}")
    found = list[tuple[int, ...]]()
    for i, ids in enumerate(each):
        name = "generated" if n == 1 else f"generated[{i}]"
        checked = in_vocabulary(list(islice(ids, max_model_len)), vocab_size, name, "invalid_generated")
        if isinstance(checked, RequestError):
            return checked
        found.append(checked)
    return found if any(found) else []


def _may_be_ids(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)


def _begun(
    given: Sequence[tuple[int, ...]],
    prompt_len: int,
    params: ResolvedParams,
    limit: int,
    make_reader: Callable[[ResolvedParams], TextReader | None] | None,
) -> tuple[Beginning, ...] | RequestError:
    """`limit`: tokens at which a sample ends by length."""
    found, min_len = list[Beginning](), prompt_len + params.min_tokens if params.min_tokens else 0
    for index, ids in enumerate(given):
        kept, reason = first_end(ids, prompt_len, params.stop_set, min_len, limit)
        ended_by: int | str | None = ids[kept - 1] if reason == "stop" and ids[kept - 1] not in params.eos_ids else None
        reader = make_reader(params) if make_reader is not None else None
        matched = None if reader is None else reader.read(ids[:kept], reason)
        if reader is not None and matched is not None:
            kept, reason, ended_by = reader.num_tokens, "stop", matched
        begun = Beginning(ids[:kept], reader, reason, ended_by)
        found.append(begun)
        name = "generated" if len(given) == 1 else f"generated[{index}]"
        if kept < len(ids):
            return _already_ended(name, begun, len(ids))
    if found and all(begun.finish_reason is not None for begun in found):
        return _already_ended("generated" if len(given) == 1 else "each of generated", found[-1], len(given[-1]))
    return tuple(found)


def _already_ended(name: str, begun: Beginning, given: int) -> RequestError:
    kept, last = len(begun.token_ids), begun.token_ids[-1]
    if begun.finish_reason == "length":
        how = f"with {kept} tokens it has max_tokens, or reaches max_model_len"
    elif isinstance(begun.stop_reason, str):
        how = f"the stop string {begun.stop_reason!r} is complete"
    else:
        how = f"{last} is an end token" if begun.stop_reason is None else f"{last} is a stop token"
    more = f", and {given - kept} more follow" if kept < given else ""
    return RequestError(
        "already_ended",
        f"{name} ends the output at its token {kept} of {given}{more}: {how}. Nothing is left to be generated: take "
        f"the first {kept} tokens as the finished output, or change the parameter that ends it",
    )
