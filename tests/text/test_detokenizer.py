"""Incremental text equals the text of the whole; nothing shown is ever taken back; stop strings end it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from text_zoo import REPLACEMENT, TOKENIZERS, WORDS, ZOO

from nanoengine.params.resolver import ResolvedParams
from nanoengine.text import IncrementalDetokenizer, Tokenizer, detokenizer
from nanoengine.text.decoding import ByteLevelStream, TokenTable
from nanoengine.text.stops import StopMatcher

BYTES = TOKENIZERS["byte_level"]
FIRST_WORD = 256


@st.composite
def sequences(draw: st.DrawFn, names: Sequence[str] = tuple(ZOO)) -> tuple[str, list[int]]:
    """A tokenizer's name and ids: any, the awkward ones (words, specials, unknown), or bytes of a real text."""
    name = draw(st.sampled_from(names))
    size = TOKENIZERS[name].vocab_size
    first = {"byte_level": 0, "replace_bytes": 0}.get(name, 1)  # id of byte 0
    of_text = st.text(st.sampled_from("aé日\U0001f600\u0301\u200d\n "), max_size=4).map(
        lambda text: [first + byte for byte in text.encode()]
    )
    piece = st.one_of(
        st.integers(0, size + 2).map(lambda i: [i]),
        st.integers(FIRST_WORD, size - 1).map(lambda i: [i]),
        st.integers(0x7F, 0xFF).map(lambda byte: [first + byte]),
        of_text,
    )
    return name, [i for part in draw(st.lists(piece, max_size=14)) for i in part]


def run(
    tokenizer: Tokenizer, ids: Sequence[int], chunks: Sequence[int] = (1,), **options: Any
) -> tuple[list[str], Any]:
    """Pushes `ids` in chunks of the given sizes (repeated); (texts shown after each push, stop string)."""
    detokenizer, shown, at, turn = IncrementalDetokenizer(tokenizer, **options), [], 0, 0
    while at < len(ids):
        size = chunks[turn % len(chunks)]
        stop = detokenizer.push(ids[at : at + size])
        shown.append(detokenizer.text)
        if stop is not None:
            return shown, stop
        at, turn = at + size, turn + 1
    stop = detokenizer.finish()
    return [*shown, detokenizer.text], stop


def check_shown(shown: Sequence[str], stops: Sequence[str] = ()) -> None:
    """What the streaming promise says of the texts shown in turn."""
    final = shown[-1]
    for text in shown:
        assert final.startswith(text), f"{text!r} was taken back: {final!r}"
        assert not any(stop in text for stop in stops), f"a stop string in {text!r}"


@pytest.mark.parametrize("name", ZOO)
def test_each_decoder_is_decoded_the_way_meant_for_it(name: str) -> None:
    assert type(TOKENIZERS[name].stream()).__name__ == ZOO[name][1]


@given(sequences(), st.booleans(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_pieces_joined_are_the_whole_decoding(case: tuple[str, list[int]], skip: bool, chunks: list[int]) -> None:
    name, ids = case
    tokenizer = TOKENIZERS[name]
    shown, stop = run(tokenizer, ids, chunks, skip_special_tokens=skip)
    assert stop is None
    assert shown[-1] == tokenizer.decode(ids, skip) == tokenizer.hf.decode(ids, skip_special_tokens=skip)
    check_shown(shown)


@given(sequences(names=[name for name in ZOO if ZOO[name][1] != "WholeStream"]))
def test_only_what_may_still_change_is_held_back(case: tuple[str, list[int]]) -> None:
    """After a plain word nothing is pending, whatever came before: all of it is shown at once."""
    name, ids = case
    tokenizer = TOKENIZERS[name]
    word = tokenizer.hf.convert_tokens_to_ids("a" if name not in ("byte_level", "replace_bytes") else "stop")
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.push([*ids, word])
    assert detokenizer.text == tokenizer.decode([*ids, word])
    assert detokenizer.num_tokens == len(ids) + 1


def test_a_push_decodes_a_few_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, windows = TOKENIZERS["llama2"], []
    real = TokenTable.decode

    def counted(self: TokenTable, token_ids: list[int]) -> str:
        windows.append(len(token_ids))
        return real(self, token_ids)

    monkeypatch.setattr(TokenTable, "decode", counted)
    ids = tokenizer.hf.convert_tokens_to_ids(["▁the", "▁", "日", "<0x0A>"]) * 50
    shown, _ = run(tokenizer, ids, stop=["never"])
    assert shown[-1] == tokenizer.decode(ids)
    assert max(windows) <= 4, "guard, last settled token, one byte token, the new one"
    assert len(windows) <= 3 * len(ids)


def test_an_unfinished_character_is_shown_when_complete_or_at_the_end() -> None:
    detokenizer, emoji = IncrementalDetokenizer(BYTES), list("\U0001f600".encode())
    texts = []
    for byte in [*emoji, *emoji[:2]]:
        detokenizer.push([byte])
        texts.append(detokenizer.text)
    assert texts == ["", "", "", *["\U0001f600"] * 3]
    detokenizer.finish()
    assert detokenizer.text == "\U0001f600\ufffd"


def test_special_tokens_are_left_out_or_shown() -> None:
    ids = [*BYTES.encode("<s>", add_special_tokens=False), FIRST_WORD, *BYTES.encode("</s>", add_special_tokens=False)]
    assert len(ids) == 3
    assert run(BYTES, ids)[0][-1] == "hello"
    assert run(BYTES, ids, skip_special_tokens=False)[0][-1] == "<s>hello</s>"


def reference(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], include: bool, least: int) -> Any:
    """The rule written down plainly: (text, stop, tokens used) by decoding everything again after every token."""
    ignored = 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:count]))
        if text.endswith(REPLACEMENT) and count < len(ids):
            continue
        if count <= least:
            ignored = len(text)
            continue
        found = [
            (start + len(stop), order, start, stop)
            for order, stop in enumerate(stops)
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > ignored
        ]
        if found:
            end, _, start, stop = min(found)
            return text[: end if include else start], stop, count
    return tokenizer.decode(list(ids)), None, len(ids)


STOP_LETTERS = "stop \n日e\u0301"
stop_lists = st.lists(st.text(st.sampled_from(STOP_LETTERS), min_size=1, max_size=5), min_size=1, max_size=4)
texts = st.lists(st.one_of(st.sampled_from(STOP_LETTERS), st.sampled_from([*WORDS, "stost", "ststop"])), max_size=16)


@given(texts, stop_lists, st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans(), st.integers(0, 6),
       st.data())  # fmt: skip
@example(["ststop", "x"], ["stop", "tstop"], [1], False, 0, None)
@example(["x", "stop"], ["op", "top", "stop"], [2], False, 0, None)
def test_stop_strings_follow_the_rule_in_any_chunking(
    parts: list[str], stops: list[str], chunks: list[int], include: bool, least: int, data: Any
) -> None:
    raw = "".join(parts).encode()
    ids = list(raw) if data is None else _cut_into_tokens(raw, data)
    text, stop, used = reference(BYTES, ids, stops, include, least)
    options = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": least}
    one_by_one, found = run(BYTES, ids, **options)
    assert (one_by_one[-1], found) == (text, stop)
    chunked, found = run(BYTES, ids, chunks, **options)
    assert (chunked[-1], found) == (text, stop)
    detokenizer = IncrementalDetokenizer(BYTES, **options)
    if detokenizer.push(ids) is not None:
        assert detokenizer.num_tokens == used
    check_shown(one_by_one, [] if include or least else stops)


def _cut_into_tokens(raw: bytes, data: Any) -> list[int]:
    """A tokenization of the bytes into single bytes and whole words of the vocabulary, drawn at random."""
    ids, words = [], [word.encode() for word in WORDS]
    while raw:
        fitting = [i for i, word in enumerate(words) if raw.startswith(word)]
        if fitting and data.draw(st.booleans()):
            ids.append(FIRST_WORD + fitting[0])
            raw = raw[len(words[fitting[0]]) :]
        else:
            ids.append(raw[0])
            raw = raw[1:]
    return ids


@given(sequences(), stop_lists)
def test_stop_strings_with_every_kind_of_tokenizer(case: tuple[str, list[int]], stops: list[str]) -> None:
    name, ids = case
    shown, stop = run(TOKENIZERS[name], ids, stop=stops)
    check_shown(shown, stops)
    whole = TOKENIZERS[name].decode(ids)
    if stop is None:
        assert shown[-1] == whole
        assert not any(stop in whole for stop in stops)


def test_a_stop_string_in_a_run_of_byte_tokens_ends_the_sample_at_once() -> None:
    """The run is shown only at its end, yet a newline as stop string needs no further token."""
    tokenizer = TOKENIZERS["llama2"]
    a, newline = tokenizer.hf.convert_tokens_to_ids(["a", "<0x0A>"])
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["\n"])
    assert detokenizer.push([a]) is None
    assert detokenizer.push([newline]) == "\n"
    assert detokenizer.text == "a"
    kept = IncrementalDetokenizer(tokenizer, stop=["\n"], include_stop_str_in_output=True)
    assert kept.push([a, newline, a]) == "\n"
    assert (kept.text, kept.num_tokens) == ("a\n", 2)


def test_part_of_a_stop_string_is_held_back_and_given_back() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, stop=["stop!"])
    seen = []
    for char in "no stopping":
        assert detokenizer.push([ord(char)]) is None
        seen.append(detokenizer.text)
    assert seen[2:8] == ["no ", "no ", "no ", "no ", "no ", "no stopp"]
    kept = IncrementalDetokenizer(BYTES, stop=["stop!"], include_stop_str_in_output=True)
    kept.push(b"no sto")
    assert kept.text == "no sto", "a stop string that is kept needs no holding back"
    ended = IncrementalDetokenizer(BYTES, stop=["stop!"])
    ended.push(b"no sto")
    assert ended.finish() is None
    assert ended.text == "no sto"


def test_min_tokens_lets_early_stop_strings_pass() -> None:
    early = IncrementalDetokenizer(BYTES, stop=["b"], min_tokens=2)
    assert early.push(b"abcab") == "b"
    assert (early.text, early.num_tokens) == ("abca", 5)
    across = IncrementalDetokenizer(BYTES, stop=["bc"], min_tokens=2)
    assert across.push(b"abc") == "bc", "a match that ends after the first two tokens counts"
    assert across.text == "a"


@pytest.mark.parametrize(
    ("skip", "include", "token", "text"),
    [
        (True, False, "</s>", "hello"),
        (False, False, "</s>", "hello"),
        (True, True, "</s>", "hello"),
        (False, True, "</s>", "hello</s>"),
        (True, False, "a", "hello"),
        (True, True, "a", "helloa"),
    ],
)
def test_text_of_the_stop_token(skip: bool, include: bool, token: str, text: str) -> None:
    detokenizer = IncrementalDetokenizer(BYTES, skip_special_tokens=skip, include_stop_str_in_output=include)
    detokenizer.push([FIRST_WORD])
    assert detokenizer.finish(stop_token=BYTES.hf.convert_tokens_to_ids(token)) is None
    assert (detokenizer.text, detokenizer.num_tokens) == (text, 2)


def test_made_from_resolved_parameters() -> None:
    params = ResolvedParams(stop=("b",), min_tokens=3, include_stop_str_in_output=True, skip_special_tokens=False)
    detokenizer = IncrementalDetokenizer.from_params(BYTES, params)
    assert detokenizer is not None
    eos = BYTES.hf.eos_token_id
    assert detokenizer.push([ord("b"), ord("a"), eos, ord("a"), ord("b"), ord("a")]) == "b"
    assert detokenizer.text == "ba</s>ab"
    assert IncrementalDetokenizer.from_params(BYTES, replace(params, detokenize=False)) is None
    assert IncrementalDetokenizer.from_params(None, params) is None


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3), st.data())
def test_matcher_against_a_search(text: str, stops: list[str], data: Any) -> None:
    assume(len(set(stops)) == len(stops))
    matcher, at, found = StopMatcher(stops), 0, None
    while at < len(text) and found is None:
        size = data.draw(st.integers(1, 6))
        ahead = matcher.peek(text[at : at + size])
        found = matcher.feed(text[at : at + size])
        assert ahead == found
        at += size
        if found is None:
            ends = [k for stop in stops for k in range(1, len(stop)) if text[:at].endswith(stop[:k])]
            assert matcher.held == max(ends, default=0)
    matches = [(i + len(s), k, i, s) for k, s in enumerate(stops) for i in range(len(text)) if text.startswith(s, i)]
    expected = min(matches)[2:] if matches else None
    assert (None if found is None else (found.start, found.stop)) == expected


# -- stop strings that hold a special token ---------------------------------------------------------------------------

SPECIALS = ("<s>", "</s>")
BYTE_WORDS = {"<s>": BYTES.encode("<s>", False)[0], "</s>": BYTES.encode("</s>", False)[0], "stop": FIRST_WORD + 4}
with_specials = st.lists(st.sampled_from([*SPECIALS, "stop", *"stop </"]), max_size=14)


def visible(text: str) -> str:
    """A place in the text with its special tokens, in the text without."""
    return text.replace("</s>", "").replace("<s>", "")


def reference_with_specials(parts: Sequence[str], stops: Sequence[str], include: bool, least: int) -> Any:
    """(text, stop): each character of the written-out text, and whether it is shown, one after the other."""
    chars = [(char, part not in SPECIALS, number) for number, part in enumerate(parts, 1) for char in part]
    for count in range(1, len(parts) + 1):
        taken = [each for each in chars if each[2] <= count]
        found = []
        for order, stop in enumerate(stops):
            special = any(special in stop for special in SPECIALS)
            looked = [i for i, (_, shown, _) in enumerate(taken) if special or shown]
            text = "".join(taken[i][0] for i in looked)
            late = sum(taken[i][2] <= least for i in looked)
            found += [
                (sum(shown for _, shown, _ in taken[: looked[at + len(stop) - 1] + 1]), order, looked[at])
                for at in range(len(text) - len(stop) + 1)
                if text.startswith(stop, at) and at + len(stop) > late
            ]
        if found and count > least:
            _, order, start = min(found)
            before = "".join(char for char, shown, _ in taken[:start] if shown)
            return before + (stops[order] if include else ""), stops[order]
    return "".join(char for char, shown, _ in chars if shown), None


@given(with_specials, st.lists(st.lists(st.sampled_from([*SPECIALS, *"stop </"]), min_size=1, max_size=4).map("".join),
                               min_size=1, max_size=3, unique=True), st.booleans(), st.integers(0, 4))  # fmt: skip
@example(["s", "<s>", "t", "</s>"], ["st", "</s>"], False, 0)
@example(["t", "<s>", "o", "p"], ["t<s>op", "op"], True, 0)
@example(["<s>", "<s>", "</s>"], ["<s></s>"], False, 2)
@example(["stop", "</s>"], ["op</s>"], False, 0)
def test_a_stop_string_that_holds_a_special_token_is_found(
    parts: list[str], stops: list[str], include: bool, least: int
) -> None:
    ids = [BYTE_WORDS.get(part, ord(part[0])) for part in parts]
    text, stop = reference_with_specials(parts, stops, include, least)
    shown, found = run(BYTES, ids, stop=stops, include_stop_str_in_output=include, min_tokens=least)
    assert (shown[-1] if shown else "", found) == (text, stop)
    check_shown(shown or [""])


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("wordpiece", "none", "bpe_suffix")])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("tail", "stop", "text"),
    [
        (["</s>"], "</s>", "aa"),
        (["</s>", "a"], "</s>", "aa"),
        (["b", "</s>", "b"], "b</s>b", "aa"),
        (["b", "</s>", "b"], "</s>b", "aab"),
        (["<s>", "</s>"], "<s></s>", "aa"),
    ],
)
def test_a_special_token_stops_with_every_kind_of_tokenizer(
    name: str, include: bool, tail: list[str], stop: str, text: str
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.hf.convert_tokens_to_ids(["a", "a", *tail])
    shown, found = run(tokenizer, ids, stop=[stop, "never"], include_stop_str_in_output=include)
    if name == "across":  # its decoder writes Q for aa
        text = text.replace("aa", "Q")
    assert (shown[-1], found) == (text + stop if include else text, stop)
    check_shown(shown)


@pytest.mark.parametrize("name", ZOO)
def test_a_special_token_alone_stops_behind_the_text_before_it(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.hf.convert_tokens_to_ids(["a", "b", "</s>", "b"])
    shown, found = run(tokenizer, ids, stop=["</s>"])
    assert (shown[-1], found) == (tokenizer.decode(ids[:2]), "</s>")


def test_special_tokens_at_an_open_character_and_behind_bytes() -> None:
    emoji = list("\U0001f600".encode())
    end = BYTES.hf.eos_token_id
    assert run(BYTES, [ord("a"), *emoji[:2], end], stop=["</s>"])[0][-1] == "a\ufffd"
    assert run(BYTES, [ord("a"), *emoji[:2], end], stop=["b</s>"])[0][-1] == "a\ufffd"
    assert run(BYTES, [*emoji, end, ord("b")], stop=["\U0001f600</s>"]) == (["", "", "", "", ""], "\U0001f600</s>")
    llama = TOKENIZERS["llama2"]
    a, newline, end = llama.hf.convert_tokens_to_ids(["a", "<0x0A>", "</s>"])
    assert run(llama, [a, newline, end, a], stop=["\n</s>"]) == (["a", "a", "a"], "\n</s>")
    assert run(llama, [a, newline, end, a], stop=["</s>"])[0][-1] == "a\n"


def test_a_stop_string_in_several_byte_tokens_of_one_character() -> None:
    """It ends with the token that completes the character, or lies within a run of byte tokens."""
    llama = TOKENIZERS["llama2"]
    ids = llama.hf.convert_tokens_to_ids(["a", *(f"<0x{byte:02X}>" for byte in "x日\ny".encode()), "b"])
    for stop, text in (("日", "ax"), ("x日", "a"), ("日\n", "ax"), ("\ny", "ax日"), ("yb", "ax日\n")):
        shown, found = run(llama, ids, stop=[stop])
        assert (shown[-1], found) == (text, stop)
        kept, _ = run(llama, ids, stop=[stop], include_stop_str_in_output=True)
        assert kept[-1] == text + stop


def test_a_stop_token_and_a_stop_string_of_the_same_special_token() -> None:
    """As in vLLM, EOS ends the sample before stop strings are looked for."""
    detokenizer = IncrementalDetokenizer(BYTES, stop=["b</s>", "</s>"])
    detokenizer.push(b"ab")
    assert detokenizer.finish(stop_token=BYTES.hf.eos_token_id) is None
    assert detokenizer.text == "ab"


def test_the_end_of_a_text_that_is_decoded_as_a_whole_is_read_once() -> None:
    """Read twice, the stop string would stand where the text begins again."""
    across = TOKENIZERS["across"]
    a, b = across.hf.convert_tokens_to_ids(["a", "b"])
    assert run(across, [a, b], stop=["ba"]) == (["", "", "ab"], None)


# Mutants: each must break a promise that the checks above hold.


class _ShowsBrokenCharacters(ByteLevelStream):
    __slots__ = ()

    def push(self, token_id: int) -> str:
        return self._bytes[token_id].decode("utf-8", "replace")

    def extend(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self.push, token_ids))


def test_a_stream_that_shows_broken_characters_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BYTES), "stream", lambda self, skip: _ShowsBrokenCharacters(self._table._bytes[skip]))
    shown, _ = run(BYTES, list("日".encode()))
    assert shown[-1] != BYTES.decode(list("日".encode()))


def test_a_detokenizer_that_holds_nothing_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detokenizer._Text, "held", 0)
    shown, stop = run(BYTES, list(b"a stop"), stop=["stop"])
    assert stop == "stop"
    with pytest.raises(AssertionError, match="taken back"):
        check_shown(shown, ["stop"])


def test_a_matcher_that_forgets_between_tokens_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = StopMatcher.feed

    def forgetful(self: StopMatcher, text: str, min_end: int = 0) -> Any:
        self._states = [0] * len(self._stops)
        return real(self, text, min_end)

    monkeypatch.setattr(StopMatcher, "feed", forgetful)
    shown, stop = run(BYTES, list(b"a stop"), stop=["stop"])
    assert stop is None
    with pytest.raises(AssertionError, match="a stop string in"):
        check_shown(shown, ["stop"])
