"""Loading a folder's tokenizer, chat templates, and the errors both tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from text_zoo import TOKENIZERS, byte_alphabet, byte_level, wrap
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from nanoengine.api.errors import ModelError, RequestError
from nanoengine.text import Tokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def digits_backend() -> Backend:
    """Splits numbers into digits, as its file says; a merge of two digits shows when that is not respected."""
    vocab = {char: i for i, char in enumerate(byte_alphabet())}
    vocab["12"] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[("1", "2")]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = byte_level().decoder
    backend.add_special_tokens(["<s>", "</s>"])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return backend


def folder(path: Path, config: dict[str, Any] | None = None, backend: Backend | None = None) -> Path:
    (backend or digits_backend()).save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"} | (config or {})
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def load(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    return tokenizer


def test_the_file_wins_over_the_class_it_names(tmp_path: Path) -> None:
    tokenizer = load(folder(tmp_path))
    one, two = ord("1"), ord("2")
    assert tokenizer.encode("12", add_special_tokens=False) == [one, two]
    assert tokenizer.hf.encode("12", add_special_tokens=False) == [one, two]
    assert tokenizer.encode("12") == [tokenizer.hf.bos_token_id, one, two]
    assert tokenizer.hf.eos_token == "</s>"
    assert tokenizer.all_special_ids == {257, 258}
    assert tokenizer.vocab_size == len(tokenizer.hf) == 259
    from transformers import AutoTokenizer  # the mutant: it replaces the pre-tokenizer

    assert AutoTokenizer.from_pretrained(str(tmp_path)).encode("12", add_special_tokens=False) == [256]


def test_prompts_are_never_cut_or_padded(tmp_path: Path) -> None:
    backend = digits_backend()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=12)
    tokenizer = load(folder(tmp_path, backend=backend))
    assert len(tokenizer.encode("a b c d e", add_special_tokens=False)) == 9
    assert tokenizer.hf.backend_tokenizer.truncation["max_length"] == 4  # the user's is as the file has it
    assert tokenizer.hf.backend_tokenizer.padding["length"] == 12


def test_what_a_user_does_with_the_tokenizer_cuts_no_prompt(tmp_path: Path) -> None:
    tokenizer = load(folder(tmp_path))
    theirs = tokenizer.hf
    assert theirs is tokenizer.hf
    assert len(theirs("a b c d e", truncation=True, max_length=3)["input_ids"]) == 3
    theirs.add_tokens(["a b"])
    assert len(tokenizer.encode("a b c d e", add_special_tokens=False)) == 9
    assert tokenizer.eos_token_id == theirs.eos_token_id


def test_cleaning_up_blanks_is_off(tmp_path: Path) -> None:
    tokenizer = load(folder(tmp_path, {"clean_up_tokenization_spaces": True}))
    ids = tokenizer.encode("a , b", add_special_tokens=False)
    assert tokenizer.decode(ids) == tokenizer.hf.decode(ids) == "a , b"


def test_special_tokens_map_is_read(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": {"content": "<pad>"}}')
    tokenizer = load(tmp_path)
    assert tokenizer.hf.eos_token == "</s>"
    assert tokenizer.decode([tokenizer.hf.pad_token_id, ord("a")]) == "a"


def test_a_folder_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


def test_vocabulary_and_merges_files_are_converted(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(digits_backend().get_vocab()))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n1 2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}')
    tokenizer = load(tmp_path)
    assert tokenizer.encode("a12") == [ord("a"), 256]
    assert tokenizer.stream().push(256) == "12"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_an_unreadable_file_is_named_with_the_fix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("no tokenizer at all")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match=r"cannot be read.*tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer_config.json"])
def test_a_folder_with_only_other_tokenizer_files_says_what_is_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"{name} but no tokenizer\.json.*skip_tokenizer_init"):
        load_tokenizer(tmp_path)


def test_loading_uses_neither_network_nor_torch_nor_transformers(tmp_path: Path) -> None:
    program = """
import os, socket, sys
del os.environ["HF_HUB_OFFLINE"]
def refuse(*args): raise SystemExit("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from nanoengine.text import load_tokenizer
assert "transformers" not in sys.modules
assert load_tokenizer(Path(sys.argv[1])).encode("1") == [257, 49]
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    folder(tmp_path, {"chat_template": CHATML})
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_text_of_single_tokens() -> None:
    tokenizer, words = TOKENIZERS["llama2"], ["▁the", "<0x0A>", "</s>", "<0xF0>"]
    ids = tokenizer.hf.convert_tokens_to_ids(words)
    assert [tokenizer.token_text(i) for i in ids] == [" the", "\n", "</s>", "\ufffd"]
    assert [tokenizer.token_text(i) for i in ids] == [" the", "\n", "</s>", "\ufffd"], "from the cache"
    byte_tokenizer = TOKENIZERS["byte_level"]
    assert byte_tokenizer.token_text(257) == " the"
    assert byte_tokenizer.token_text(0xF0) == "\ufffd"
    assert byte_tokenizer.token_text(10**6) == byte_tokenizer.token_text(-1) == ""


@pytest.mark.parametrize("prompt", [12, None, ["a"], "\ud800"])
def test_prompts_that_are_no_text_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        TOKENIZERS["byte_level"].encode(prompt)
    assert caught.value.code == "invalid_prompt"


class _Panics:
    """A tokenizer's backend whose every call ends in a panic of Rust's."""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            decoders.Strip("a", 0, 2).decode(["a"])

        return call


def test_a_panic_is_that_text_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = wrap(byte_level(), chat_template=CHATML)
    monkeypatch.setattr(tokenizer, "_backend", _Panics())
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.apply_chat_template(HELLO)):
        with pytest.raises(RequestError, match="the tokenizer failed on the text: PanicException") as caught:
            call()
        assert caught.value.code == "invalid_prompt"
    tokenizer.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_an_interrupt_is_no_tokenizer_s_failure(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    class Interrupted:
        def encode(self, *args: Any, **options: Any) -> Any:
            raise error

    tokenizer = wrap(byte_level())
    monkeypatch.setattr(tokenizer, "_backend", Interrupted())
    with pytest.raises(error):
        tokenizer.encode("a")


def test_a_text_longer_than_any_prompt_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(wrap(byte_level())._hf, max_tokens=4)
    most = 4 * max(map(len, tokenizer.hf.get_vocab()))
    assert tokenizer.encode("a" * most)
    monkeypatch.setattr(tokenizer, "_backend", _Panics())
    with pytest.raises(RequestError, match=f"{most + 1} characters, but at most {most} fit ") as caught:
        tokenizer.encode("a" * (most + 1))
    assert caught.value.code == "too_long"


# Chat templates


def write_template(path: Path, form: str) -> None:
    """The default template in each of the places where it may stand."""
    other = {"name": "other", "template": "other"}
    config = {
        "key": {"chat_template": CHATML},
        "list": {"chat_template": [{"name": "default", "template": CHATML}, other]},
    }.get(form)
    folder(path, config)
    if form == "file":
        (path / "chat_template.jinja").write_text(CHATML)


@pytest.mark.parametrize("form", ["key", "list", "file"])
def test_templates_are_found_and_special_tokens_added_once(tmp_path: Path, form: str) -> None:
    write_template(tmp_path, form)
    tokenizer = load(tmp_path)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(HELLO) == "<s>user\nhello</s><s>assistant\n"
    ids = tokenizer.apply_chat_template(HELLO)
    assert ids == [257, *b"user\nhello", 258, 257, *b"assistant\n"]
    if form == "list":
        assert tokenizer.render_chat(HELLO, chat_template="other") == "other"


def test_template_options() -> None:
    tokenizer = wrap(byte_level(), chat_template=CHATML)
    unfinished = [*HELLO, {"role": "assistant", "content": "The answer"}]
    continued = tokenizer.render_chat(unfinished, continue_final_message=True)
    assert continued == "<s>user\nhello</s><s>assistant\nThe answer"
    assert tokenizer.render_chat(HELLO, add_generation_prompt=False) == "<s>user\nhello</s>"
    named = "{% for t in tools %}{{ t.function.name }}{% endfor %}{{ mood }}"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    assert tokenizer.render_chat(HELLO, chat_template=named, tools=tools, mood="!") == "look!"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "not str"),
        (None, "not NoneType"),
        ([], "empty"),
        (["hello"], r"messages\[0\] must be a dict"),
        ([*HELLO, {"content": "x"}], r"messages\[1\] needs 'role'"),
        ([{"role": "user"}], r"messages\[0\] needs 'content'"),
        ([{"role": "user", "content": 3}], "not int"),
        ([HELLO], r"messages\[0\] must be a dict"),
        ([{"role": "user", "content": [3]}], r"messages\[0\]\['content'\]\[0\] must be a string or a dict.*not int"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"\['content'\]\[0\] needs 'text', a string; it has \['type'",
        ),
        (
            [{"role": "user", "content": ["a", {"type": "image_url"}]}],
            r"\[1\] is of type 'image_url': only parts of type",
        ),
    ],
)
def test_malformed_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        wrap(byte_level(), chat_template=CHATML).apply_chat_template(messages)
    assert caught.value.code == "invalid_prompt"


PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, "two"]}]
QWEN_LIKE = "<user>{{ messages[0].content if messages[0].content is string }}</user>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<s>user\none\ntwo</s><s>assistant\n"),  # it would print the list as Python does
        ("{{ messages[0].content + '!' }}", "one\ntwo!"),  # it would raise
        (QWEN_LIKE, "<user>one\ntwo</user>"),  # it would leave it out
        ("{% for p in messages[0].content %}({{ p.text | upper }}){% endfor %}", "(ONE)(TWO)"),  # it takes parts
        ("{% for p in messages[0].content %}({{ p.text }}){% endfor %}", "(one)(two)"),  # it takes parts
    ],
)
def test_content_in_parts_is_for_every_template(template: str, text: str) -> None:
    assert wrap(byte_level()).render_chat(PARTS, chat_template=template) == text


def test_parts_that_the_template_would_leave_out_though_their_text_stands_elsewhere() -> None:
    parts = [{"role": "user", "content": ["user"]}]
    assert wrap(byte_level()).render_chat(parts, chat_template=QWEN_LIKE) == "<user>user</user>"


def test_a_role_is_the_template_s_matter_but_no_message_goes_silently() -> None:
    tokenizer = wrap(byte_level(), chat_template=CHATML)
    assert tokenizer.render_chat([{"role": "wizard", "content": "hm"}]) == "<s>wizard\nhm</s><s>assistant\n"
    picky = "{% for m in messages if m.role in ('user', 'ipython') %}{{ m.content | tojson }}{% endfor %}"
    called = [*HELLO, {"role": "ipython", "content": 'a "b"'}]
    assert tokenizer.render_chat(called, chat_template=picky) == '"hello""a \\"b\\""'  # it is there, though escaped
    with pytest.raises(
        RequestError, match=r"messages\[1\] is not in the prompt: .* role 'asistant'; did you mean 'assi"
    ):
        tokenizer.render_chat([*HELLO, {"role": "asistant", "content": "hello"}], chat_template=picky)
    with pytest.raises(RequestError, match=r"messages\[0\] is not in the prompt: .* role 'developer'"):
        tokenizer.render_chat([{"role": "developer", "content": ["be brief"]}, *HELLO], chat_template=picky)


@pytest.mark.parametrize("role", ["usr", "User", "SYSTEM", "assistent", "tools"])
def test_a_mistyped_role_is_refused_unless_the_template_names_it(role: str) -> None:
    tokenizer = wrap(byte_level(), chat_template=CHATML)
    conversation = [{"role": role, "content": "hm"}, *HELLO]
    with pytest.raises(RequestError, match=rf"messages\[0\]: .* does not name role '{role}'; did you mean '"):
        tokenizer.render_chat(conversation)
    named = f"{{% if messages[0].role == '{role}' %}}{{{{ messages[0].content }}}}{{% endif %}}"
    assert tokenizer.render_chat(conversation, chat_template=named) == "hm"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "rejected the messages"),
        ("{% if %}", "rejected the messages"),
    ],
)
def test_an_error_in_the_template_is_reported_with_its_cause(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        wrap(byte_level()).apply_chat_template(HELLO, chat_template=template)
    assert caught.value.code == "invalid_prompt"
    assert caught.value.__cause__ is not None


def test_no_template_and_fixed_arguments_are_reported() -> None:
    assert not TOKENIZERS["byte_level"].has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        TOKENIZERS["byte_level"].apply_chat_template(HELLO)
    with pytest.raises(RequestError, match=r"'tokenize'.*cannot be set"):
        wrap(byte_level(), chat_template=CHATML).apply_chat_template(HELLO, tokenize=False)
    with pytest.raises(RequestError, match="continue_final_message"):
        wrap(byte_level(), chat_template=CHATML).render_chat(
            HELLO, continue_final_message=True, add_generation_prompt=True
        )
