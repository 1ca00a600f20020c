"""The mock engine with a tokenizer of its own, whose every token's text is known: "A" to "J", "0" to "9", "A0" to "H6".

The words of truth about text (where a stop string ends a sample, what a bad word forbids) are plain string searches
over the whole text, by code the engine does not use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanoengine import LLM
from nanoengine.testing.mock_model import reference_logits

from .support import VOCAB, mock_llm

LETTERS, DIGITS = "ABCDEFGHIJ", "0123456789"
PAIRS = [(letter, digit) for letter in LETTERS for digit in DIGITS][: VOCAB - len(LETTERS + DIGITS)]
TEXTS = [*LETTERS, *DIGITS, *map("".join, PAIRS)]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}J9{% endif %}"


def text_llm(tmp_path: Path, *, decoder: Any = None, specials: Sequence[str] = (), **options: Any) -> LLM:
    """`mock_llm` with the tokenizer."""
    folder = tmp_path / "mock"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(TEXTS)}, merges=PAIRS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return mock_llm(tmp_path, **options)


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(TEXTS[i] for i in token_ids)


def ids_of(text: str) -> list[int]:
    """A letter joins the digit behind it where there is such a token."""
    found: list[int] = []
    while text:
        size = 2 if text[:2] in TEXTS else 1
        found.append(TEXTS.index(text[:size]))
        text = text[size:]
    return found


class Ended(NamedTuple):
    token_ids: tuple[int, ...]
    text: str
    stop: str | None


def stopped(token_ids: Sequence[int], stops: Sequence[str], *, include: bool = False, min_tokens: int = 0) -> Ended:
    """How a sample with these tokens ends: at the first token with which a stop string is complete."""
    late = len(text_of(token_ids[:min_tokens]))
    for count in range(1, len(token_ids) + 1):
        text = text_of(token_ids[:count])
        ends = [
            (end, stops.index(stop), stop)
            for stop in stops
            for end in range(late + 1, len(text) + 1)
            if text[:end].endswith(stop)
        ]
        if ends:
            end, _, stop = min(ends)
            return Ended(tuple(token_ids[:count]), text[: end if include else end - len(stop)], stop)
    return Ended(tuple(token_ids), text_of(token_ids), None)


def masked_greedy(
    prompt: Sequence[int], count: int, stop_ids: Sequence[int] = (), min_tokens: int = 0, bad: Sequence[str] = ()
) -> tuple[int, ...]:
    """Greedy tokens where `stop_ids` are masked below `min_tokens` and end it then, and no bad word is completed."""
    tokens, words = list(prompt), [ids_of(word) for word in bad]
    while len(tokens) < len(prompt) + count:
        logits, output = reference_logits(tokens, VOCAB), tokens[len(prompt) :]
        if len(output) < min_tokens:
            logits[list(stop_ids)] = float("-inf")
        for word in words:
            if word[:-1] == output[len(output) - len(word) + 1 :][: len(word) - 1]:
                logits[word[-1]] = float("-inf")
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stop_ids:
            break
    return tuple(tokens[len(prompt) :])
