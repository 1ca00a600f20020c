"""Grammars by llguidance: JSON schemas, regular expressions, choices, Lark and EBNF grammars, structural tags.

Its parser and lexer have limits of their own ("fuel"), so a constraint that is too complex is an error, not a hang.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Self

from llguidance import LLExecutor, LLMatcher, LLTokenizer

from nanoengine.api import Constraint, Grammar, GrammarBackend, GrammarContext, GrammarError, Matcher
from nanoengine.api.grammars import Advanced
from nanoengine.plugins.grammars.added_tokens import AddedTokens
from nanoengine.plugins.grammars.exact_schemas import allowed_escapes, exact, json_space
from nanoengine.plugins.grammars.notations import lark_of
from nanoengine.plugins.grammars.structural_tags import Tags, read_tags
from nanoengine.plugins.grammars.unchanged_text import with_unchanged_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from llguidance._lib import JsonCompileOptions

_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Without it llguidance looks for the text that must come next up to its end, and there may be none. For `start: A "a"`
with `A: /a+/`, which takes each "a", it would look for ever. Besides a user's grammar only a schema's separators could
have that, which are those of JSON."""
_MARKS: Mapping[Literal["whitespace_pattern", "item_separator", "key_separator"], str] = {
    "whitespace_pattern": "", "item_separator": ",", "key_separator": ":"
}  # fmt: skip
"""What the patterns of a schema's "x-guidance" have besides white space."""
_NO_TEXT = "NoExtensionBias"  # what llguidance calls a grammar that allows no text
_REFUSED = ("doesn't satisfy the grammar", "; no error message")  # no token follows the end of the grammar
_MOST_THREADS = 8
_SECONDS_ALONE, _SECONDS_LEFT = 5e-4, 1e-3  # threads take so long to wake that they do the rest only behind the first
_LOOK_EVERY = 4  # and if it were more than the second; most masks take some microseconds


class LLGuidance(GrammarBackend):
    def __init__(self, ctx: GrammarContext) -> None:
        self._ends = sorted(ctx.end_ids) or None
        try:
            text = with_unchanged_text(ctx.tokenizer_json)
            self._tokenizer = LLTokenizer(text, n_vocab=ctx.vocab_size, eos_token=self._ends)
        except ValueError as error:
            raise GrammarError(f"llguidance does not support this model's tokenizer: {error}") from error
        affinity = getattr(os, "sched_getaffinity", None)  # only Linux has it
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        threads = min(cores // 2, _MOST_THREADS)
        self._executor = LLExecutor(threads) if threads > 1 else None
        self._added = AddedTokens(self._tokenizer, self._tokenizer.eos_tokens)

    def compile(self, constraint: Constraint) -> Grammar:
        matcher = LLMatcher(self._tokenizer, self._source(constraint), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # its lexer makes states when they are first needed: now, not in a step
        if matcher.is_error():
            raise GrammarError(_refusal(constraint, _first_part(matcher.get_error())))
        spaces, forces = self._added.may_be_space(constraint.text), constraint.kind != "grammar"
        return _Grammar(matcher, self._executor, self._added, spaces=spaces, forces=forces)

    def _source(self, constraint: Constraint) -> str:
        try:
            if constraint.kind == "json":
                schema = _schema(constraint)
                return LLMatcher.grammar_from_json_schema(
                    json.dumps(schema), overrides=self._options(schema, constraint)
                )
            if constraint.kind == "structural_tag":
                return self._lark_of(read_tags(constraint.text, "llguidance"), constraint)
            if constraint.kind == "regex":
                return LLMatcher.grammar_from_regex(_complete(constraint.text))
            if constraint.kind == "choice":
                return LLMatcher.grammar_from_lark(_lark_of_choice(json.loads(constraint.text)))
            return LLMatcher.grammar_from_lark(lark_of(constraint.text, self._strict) + _NO_FORCING)
        except (ValueError, RecursionError) as error:
            raise GrammarError(_refusal(constraint, str(error))) from error

    def _strict(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema in a grammar of a user, with the user's white space."""
        given = schema.get("x-guidance")
        options = {**(given if isinstance(given, dict) else {}), **self._options(schema)}
        return {**exact(schema), "x-guidance": options}

    def _options(self, schema: Any, constraint: Constraint | None = None) -> JsonCompileOptions:
        """Options that a schema cannot change. It could ask in "x-guidance" to be read leniently, which is weaker; and
        what it says there of white space and separators may match nothing that is not JSON's.

        constraint: whose white space the schema has; None: the schema's own.
        """
        options: JsonCompileOptions = {"lenient": False, "coerce_one_of": False}
        options["json_allowed_escapes"] = allowed_escapes(schema)
        given = schema.get("x-guidance") if isinstance(schema, dict) else None
        for name, mark in _MARKS.items():
            if isinstance(given, dict) and isinstance(given.get(name), str):
                options[name] = self._json_text(name, given[name], mark)
        if constraint is not None:
            options["whitespace_flexible"] = constraint.any_whitespace
            if constraint.whitespace_pattern is not None:
                options["whitespace_pattern"] = self._json_text("whitespace_pattern", constraint.whitespace_pattern)
        return options

    def _json_text(self, name: str, pattern: str, mark: str = "") -> str:
        """A pattern of JSON's white space, around this mark. Raises `ValueError` for one that matches anything else."""
        text, space = json_space(_complete(pattern)), r"[ \t\r\n]*"
        other = "start: OTHER\nOTHER: /(?:" + text.replace("/", r"\/") + f")/ & ~/{space}{mark}{space}/"
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(other), log_level=0)
        if matcher.is_error():
            raise ValueError(f"{name}: {_first_part(matcher.get_error())}")
        matcher.compute_bitmask()
        if _NO_TEXT not in matcher.get_error():
            around = f"{mark!r} with " if mark else ""
            raise ValueError(
                f"{name} {pattern!r:.80} must match {around}spaces, \\t, \\n and \\r alone, as JSON has them"
            )
        return text

    def _lark_of(self, tags: Tags, constraint: Constraint) -> str:
        """Free text in which each trigger begins one of its tags; or tags with a separator between them."""
        lines = ["%llguidance {}", f"start: {self._start(tags)}", "end_text: TEXT", r"TEXT: /(.|\n)*/"]
        for i, trigger in enumerate(tags.triggers):
            lazy = "" if any(map(self._tokenizer.is_special_token, self._ids(trigger))) else "[lazy]"
            lines.append(f"trigger_{i}{lazy}: TEXT {self._literal(trigger)}")
        for i, tag in enumerate(tags.tags):
            schema = exact(tag.schema)
            options = self._options(schema, constraint)
            body = json.dumps({**schema, "x-guidance": options} if isinstance(schema, dict) else schema)
            lines.append(f"content_{i}: {self._literal(tag.rest)} %json {body} {self._literal(tag.end)}")
            trigger = "" if tags.separator is not None else self._literal(tags.triggers[tag.trigger])
            lines.append(f"first_{i}: {trigger} content_{i}")
            lines += [f"tag_{i}: trigger_{tag.trigger} content_{i}"] if trigger else []
        return LLMatcher.grammar_from_lark("\n".join(lines) + "\n")

    def _start(self, tags: Tags) -> str:
        some, first = ("(" + " | ".join(f"{n}_{i}" for i in range(len(tags.tags))) + ")" for n in ("tag", "first"))
        if tags.separator is not None:
            several = first if tags.ends else f"{first} ({self._literal(tags.separator)} {first})*"
            return several if tags.begins else f'{several} | ""'
        return {
            (False, False): f"{some}* end_text",
            (False, True): f"{some} | end_text",
            (True, False): f"{first} {some}* end_text",
            (True, True): first,
        }[tags.begins, tags.ends]

    def _literal(self, text: str) -> str:
        """The text in Lark: special tokens as their ids, other text quoted."""
        parts = []
        for token in filter(self._tokenizer.is_special_token, self._ids(text)):
            plain, _, text = text.partition(self._tokenizer.decode_str([token]))
            parts += [_quoted(plain), f"<[{token}]>"]
        return " ".join(part for part in [*parts, _quoted(text)] if part)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.tokenize_str(text, parse_special=True)


class _Grammar(Grammar):
    def __init__(
        self, start: LLMatcher, executor: LLExecutor | None, added: AddedTokens, *, spaces: bool, forces: bool
    ) -> None:
        self._start, self._executor, self._lock = start, executor, threading.Lock()
        self._added, self._spaces, self._forces = added, spaces, forces

    def matcher(self) -> Matcher:
        with self._lock:
            own = self._start.deep_copy()
            return _Matcher(own, self._executor, self._added, spaces=self._spaces, forces=self._forces)


class _Matcher(Matcher):
    def __init__(
        self,
        matcher: LLMatcher,
        executor: LLExecutor | None = None,
        added: AddedTokens | None = None,
        *,
        spaces: bool = False,
        forces: bool = True,
    ) -> None:
        """executor: threads that compute masks of several matchers; None: there are no cores for them.

        added: corrects masks; None: they stay as they are. spaces: each one is to be looked at. forces: llguidance
        looks for text that must come next."""
        self._matcher, self._executor, self._added = matcher, executor, added
        self._spaces, self._forces = spaces, forces

    def consume(self, token_ids: Sequence[int]) -> int:
        taken = int(self._matcher.try_consume_tokens(list(token_ids)))
        if taken < len(token_ids):
            self._check()  # the token may be allowed, and the state behind it too large
        return taken

    def rollback(self, count: int) -> None:
        if count:
            self._matcher.rollback(count)
            self._check()

    def mask(self, out: npt.NDArray[np.int32]) -> None:
        self._matcher.unsafe_compute_mask_ptr(out.__array_interface__["data"][0], out.nbytes)  # quicker than out.ctypes
        self._check()
        if self._added is not None:
            self._added.correct(self._matcher, out, each=self._spaces)

    @classmethod
    def advance(cls, matchers: Sequence[Self], token_ids: Sequence[int | None], out: npt.NDArray[np.int32]) -> Advanced:
        """One after the other, each in the caches where its token was. If that takes long, the others by threads."""
        own, executor, refused = [each._matcher for each in matchers], matchers[0]._executor, list[int]()
        address, size = out.__array_interface__["data"][0], out.strides[0]
        done, begun = 0, perf_counter()
        for done, (matcher, token) in enumerate(zip(own, token_ids, strict=True), 1):
            if token is not None and not matcher.consume_token(token):
                refused.append(done - 1)
            matcher.unsafe_compute_mask_ptr(address, size)
            address += size
            if executor is not None and done % _LOOK_EVERY == 1 and _pays(perf_counter() - begun, done, len(own)):
                refused += _advance_others(executor, own, token_ids, out, done)
                break
        failed, complete, added = {i: _error_of(own[i]) for i in refused}, list[int](), matchers[0]._added
        for i, each in enumerate(matchers):
            if each._spaces and each._added is not None:
                each._added.correct(own[i], out[i], each=True)
        for i in range(len(own)) if added is None else added.correct_each(own, out):
            if own[i].is_error():
                failed.setdefault(i, _failure(own[i]))
            elif own[i].is_accepting():
                complete.append(i)
        return Advanced(failed, complete)

    @property
    def is_accepting(self) -> bool:
        return bool(self._matcher.is_accepting())

    def forced(self, most: int, width: int) -> list[int]:
        if self._forces and len(self._matcher.compute_ff_tokens()) < 2:  # quicker than masks; one token saves nothing
            return []
        return super().forced(most, width)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _failure(self._matcher)


def _pays(seconds: float, done: int, every: int) -> bool:
    """Whether the threads are to do the rest, if so many of all matchers took so long."""
    return done < every and seconds > _SECONDS_ALONE and seconds * (every - done) > _SECONDS_LEFT * done


def _advance_others(
    executor: LLExecutor, own: Sequence[LLMatcher], tokens: Sequence[int | None], out: npt.NDArray[np.int32], first: int
) -> list[int]:
    """Those from `first` on, by threads. Returns the places of those that refused their token."""
    given = [(i, token) for i, token in enumerate(tokens[first:], first) if token is not None]
    taken = executor.consume_token_par([(own[i], token) for i, token in given]) if given else []
    masks, start = [(own[i], i) for i in range(first, len(own))], out.__array_interface__["data"][0]
    executor.unsafe_compute_mask_ptr(masks, start, out.strides[0], len(out))
    return [i for (i, _), done in zip(given, taken, strict=True) if not done]


def _failure(matcher: LLMatcher) -> GrammarError:
    return GrammarError(f"llguidance: {_first_part(matcher.get_error())}")


def _error_of(matcher: LLMatcher) -> GrammarError | None:
    """Why it did not take a token; None: the grammar refuses it."""
    text = _first_part(matcher.get_error())
    return None if not text or any(each in text for each in _REFUSED) else GrammarError(f"llguidance: {text}")


def _schema(constraint: Constraint) -> Any:
    schema = json.loads(constraint.text)
    if schema is False:
        raise ValueError("the schema false allows nothing")
    return exact({} if schema is True else schema)


def _complete(regex: str) -> str:
    """llguidance ignores a backslash at the end."""
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise ValueError(f"it ends inside of an escape: {regex!r:.80}")
    return regex


def _lark_of_choice(texts: Sequence[str]) -> str:
    """One token of the lexer. As alternatives of the parser, more than about 2,000 would be too many for it."""
    some = [_quoted(text) for text in texts if text]
    start = " | ".join(["CHOICE"] * bool(some) + ['""'] * ("" in texts))
    return f"%llguidance {{}}\nstart: {start}\n" + (f"CHOICE: {' | '.join(some)}\n" if some else "")


def _quoted(text: str) -> str:
    """Empty for an empty text. JSON may have DEL as it is, and Lark not."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") if text else ""


def _first_part(message: str) -> str:
    """llguidance's message without the dump of its state and of the grammar."""
    text = message.partition("\n<state>")[0].strip()
    advice = "Enable 'coerce_one_of' option to approximate oneOf with anyOf"
    text = text.replace(_NO_TEXT, "no text matches it")
    return text.replace(advice, "Use anyOf, or alternatives that exclude each other: by type, or by a const or enum")


def _refusal(constraint: Constraint, why: str) -> str:
    what = "the JSON schema" if constraint.kind == "json" else f"the {constraint.kind.replace('_', ' ')}"
    return f"llguidance does not accept {what}: {why}"
