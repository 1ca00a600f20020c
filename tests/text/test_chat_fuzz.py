"""Whatever a caller sends as a conversation: a prompt, or a `RequestError`; nothing of the caller's changes."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_zoo import byte_level, wrap

from nanoengine.api.errors import RequestError
from nanoengine.text import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}{{ tools }}"
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "user", "<s>", "</s", "{}", '{"a": 1}', "[", "\ud800", "\U000f0000", "x" * 50]),
    st.binary(max_size=2),
    st.sampled_from([object, Ellipsis, range(3), {1, 2}, (1, "<s>")]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(scalars.filter(lambda v: getattr(v, "__hash__", None) and not isinstance(v, tuple))),
                        inner, max_size=3),
        st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": inner}),
        st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": inner, "arguments": inner})}),
    ),
    max_leaves=8,
)  # fmt: skip
texts = st.lists(st.sampled_from(["a", " ", "<", "<s>", "</s>", "/s>", "\n", "é"]), max_size=5).map("".join)
arguments = st.one_of(st.dictionaries(texts, texts, max_size=2), st.sampled_from(["{}", '{"<s>": "</s>"}', "", None]))
calls = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": arguments})})
good = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.one_of(texts, st.lists(texts, max_size=3))},
    optional={"tool_calls": st.lists(calls, max_size=2), "thinking": texts, "name": st.one_of(texts, values)},
)
bad = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["user", "<s>"]), scalars)},
    optional={"content": values, "tool_calls": st.lists(values, max_size=2), "thinking": values, "name": values},
)
messages = st.one_of(good, good, good, bad)
COUNT: list[str] = []
KEYS = ["tools", "documents", "continue_final_message", "add_generation_prompt", "chat_template", "extra", "tokenize"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = wrap(byte_level(), chat_template=TEMPLATE)
    yield made
    made.close()


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    conversation=st.one_of(st.lists(messages, min_size=1, max_size=3), st.lists(good, min_size=1, max_size=3), values),
    options=st.dictionaries(st.sampled_from(KEYS), values, max_size=2),
    sanitize=st.booleans(),
)
def test_any_conversation_is_a_prompt_or_refused(
    tokenizer: Tokenizer, conversation: Any, options: dict[str, Any], sanitize: bool
) -> None:
    before = repr((conversation, options))
    with suppress(RequestError):
        ids, text = tokenizer.chat(conversation, sanitize_control_tokens=sanitize, **copy.copy(options))
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        if sanitize and options.get("chat_template") is None:
            written = len(conversation)
            assert [ids.count(i) for i in sorted(tokenizer.all_special_ids)] == [written, written]
        COUNT.append(text)
    assert repr((conversation, options)) == before


def test_the_fuzz_above_makes_prompts_too() -> None:
    assert COUNT
