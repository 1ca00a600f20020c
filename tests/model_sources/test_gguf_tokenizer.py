"""The tokenizer out of a GGUF file splits as the family does, and transformers keeps it so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regex
from gguf_zoo import TinyGGUF
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from nanoengine.plugins.model_sources import gguf_tokenizer
from nanoengine.plugins.model_sources.gguf_convert import convert
from nanoengine.plugins.model_sources.gguf_metadata import Metadata
from nanoengine.plugins.model_sources.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer

TEXTS = [
    "x =  3", "\n\n1.", "abc 123456 7,890.12", "don't I'LL they'Re", "  leading\tand trailing  \n", "a\r\n\r\n b\n\n c",
    "price: $5!!!\n(ok)", "naïve café Ⅻ ½ ٣٤ 1²", "世界 hello 안녕 🙂🙂", "def f(x):\n    return x  # 2", "", " ", "\n",
]  # fmt: skip

# As the families publish them: each pattern splits what the one before it left.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUBLISHED = {
    "smollm": [r"\p{N}|\P{N}+", GPT2],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
}


def tokenizer(tiny: TinyGGUF) -> Tokenizer:
    return build_tokenizer(Metadata("tiny.gguf", tiny.keys))


def pieces(pre: str, text: str) -> list[str]:
    """What the built tokenizer splits `text` into before BPE."""
    return [text[start:end] for _, (start, end) in tokenizer(TinyGGUF(pre=pre)).pre_tokenizer.pre_tokenize_str(text)]


def published(pre: str, text: str) -> list[str]:
    parts = [text]
    for pattern in PUBLISHED[pre]:
        parts = [piece for part in parts for piece in regex.findall(pattern, part)]
    return parts


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_text_splits_as_published(pre: str) -> None:
    assert {text: pieces(pre, text) for text in TEXTS} == {text: published(pre, text) for text in TEXTS}


def test_the_three_really_differ() -> None:
    assert pieces("llama-bpe", "12345") == ["123", "45"]
    assert pieces("qwen2", " 12345") == [" ", "1", "2", "3", "4", "5"]
    assert pieces("smollm", "x =  3") == ["x", " =", "  ", "3"]


def test_white_space_before_digits_as_smollm_has_it() -> None:
    built = tokenizer(TinyGGUF(pre="smollm"))
    assert built.encode("x =  3").tokens == ["x", "Ġ=", "ĠĠ", "3"]
    assert built.encode("\n\n1.").tokens == ["ĊĊ", "1", "."]
    assert built.encode("123").tokens == ["1", "2", "3"]  # though the vocabulary has 123


def test_mutant_gpt2_splitting_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback of other loaders: it round-trips, and yet splits wrongly."""
    monkeypatch.setattr(gguf_tokenizer, "_splitter", lambda pre: pre_tokenizers.ByteLevel(add_prefix_space=False))
    built = tokenizer(TinyGGUF(pre="smollm"))
    assert built.decode(built.encode("x =  3").ids) == "x =  3"
    assert built.encode("x =  3").tokens != ["x", "Ġ=", "ĠĠ", "3"]
    assert built.encode("\n\n1.").tokens != ["ĊĊ", "1", "."]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_round_trip(pre: str) -> None:
    built = tokenizer(TinyGGUF(pre=pre))
    for text in TEXTS:
        assert built.decode(built.encode(text, add_special_tokens=False).ids) == text


def test_llama_bpe_takes_whole_tokens_without_merges() -> None:
    tiny = TinyGGUF(pre="llama-bpe")
    tiny.keys["tokenizer.ggml.merges"] = ["h e"]  # "hell" stands in the vocabulary, but no merge makes it
    assert tokenizer(tiny).encode("hell", add_special_tokens=False).tokens == ["hell"]
    tiny.keys["tokenizer.ggml.pre"] = "qwen2"
    assert tokenizer(tiny).encode("hell").tokens == ["he", "l", "l"]


def test_qwen2_composes_unicode() -> None:
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    built = tokenizer(TinyGGUF(pre="qwen2"))
    assert built.encode(decomposed).ids == built.encode(composed).ids
    built = tokenizer(TinyGGUF(pre="smollm"))
    assert built.encode(decomposed).ids != built.encode(composed).ids


def test_special_and_user_defined_tokens() -> None:
    built = tokenizer(TinyGGUF())
    encoded = built.encode("hell<|end|> <think>1<|start|>")
    assert encoded.tokens == ["hell", "<|end|>", "Ġ", "<think>", "1", "<|start|>"]
    assert encoded.ids[1] == 0  # ids are those of the file
    assert built.decode(encoded.ids) == "hell <think>1"  # CONTROL is skipped, USER_DEFINED is text
    assert built.decode(encoded.ids, skip_special_tokens=False) == "hell<|end|> <think>1<|start|>"
    assert built.token_to_id("[PAD268]") is None


@pytest.mark.parametrize(
    ("pre", "key", "expected"),
    [
        ("smollm", None, []), ("llama-bpe", None, ["<|start|>"]), ("qwen2", None, []),
        ("smollm", True, ["<|start|>"]), ("llama-bpe", False, []), ("qwen2", True, ["<|start|>"]),
    ],
)  # fmt: skip
def test_bos_as_the_file_or_the_family_says_in_transformers_too(
    pre: str, key: bool | None, expected: list[str], tmp_path: Path
) -> None:
    tiny = TinyGGUF(pre=pre)
    if key is not None:
        tiny.keys["tokenizer.ggml.add_bos_token"] = key
    convert(tiny.write(tmp_path / "tiny.gguf"), tmp_path, lambda text: None)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.tokenize("hell", add_special_tokens=True) == [*expected, "hell"]
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode("hell").tokens == [*expected, "hell"]


def test_eos_behind_where_the_file_says() -> None:
    tiny = TinyGGUF()
    tiny.keys |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert tokenizer(tiny).encode("1").tokens == ["<|start|>", "1", "<|end|>"]
    assert tokenizer(tiny).encode("1", "2").tokens == ["<|start|>", "1", "<|end|>", "<|start|>", "2", "<|end|>"]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_transformers_keeps_tokenizer_json_as_it_is(pre: str, tmp_path: Path) -> None:
    convert(TinyGGUF(pre=pre).write(tmp_path / "tiny.gguf"), tmp_path, lambda text: None)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    kept = json.loads(loaded.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder", "model", "added_tokens"):
        assert kept[part] == written[part], part
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|start|>", "<|end|>", "<|end|>")
    assert (
        loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|end|>"
    )  # jinja drops the last newline


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tokenizer.ggml.token_type": [1]}, "269 tokens but 1 token types"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "'a' is twice in"),
        ({"tokenizer.ggml.tokens": ["a", "<0x0A>"], "tokenizer.ggml.token_type": [1, 6]}, "'<0x0A>' is of type 6"),
    ],
)
def test_vocabularies_that_contradict_themselves(keys: dict[str, object], words: str) -> None:
    from nanoengine.api import ModelSourceError

    tiny = TinyGGUF()
    tiny.keys |= keys
    with pytest.raises(ModelSourceError, match=words):
        tokenizer(tiny)
