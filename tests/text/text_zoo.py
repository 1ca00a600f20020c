"""Small tokenizers of every kind of decoder, built in memory, with tokens chosen to be awkward."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanoengine.text import Tokenizer

REPLACEMENT = "\ufffd"


def byte_alphabet() -> list[str]:
    """The character that stands for each byte, found by asking the library about every byte of valid UTF-8."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    chars = [""] * 256
    for code in [*range(0x80), *range(0x80, 0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000)]:
        for byte, char in zip(chr(code).encode(), pre.pre_tokenize_str(chr(code))[0][0], strict=True):
            chars[byte] = char
    never = [byte for byte in range(256) if not chars[byte]]  # C0, C1, F5 to FF
    for byte, char in zip(never, sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(chars)), strict=True):
        chars[byte] = char
    return chars


WORDS = ["hello", " the", " end", "\n\n", "stop", " st", "op", "é", "e\u0301", "日本", "\U0001f600"]
WORDS += ["\U0001f468\u200d\U0001f469"]
PIECES = [b"\xf0\x9f", b"\x98\x80a", b"\xe6\x97", b"\xa5 x", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3"]


def byte_level(decoder: Any = None) -> Backend:
    alphabet = byte_alphabet()
    vocab = {char: i for i, char in enumerate(alphabet)}
    for raw in [*(word.encode() for word in WORDS), *PIECES]:
        vocab.setdefault("".join(alphabet[b] for b in raw), len(vocab))
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoder or decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([" added tok", "ü", REPLACEMENT])
    return backend


def with_decoder(decoder: Any) -> Backend:
    """A sentencepiece-like vocabulary with byte tokens and bits for the other decoders."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁▁▁▁", "▁the", "a", "b", "日", "é",
             "e\u0301", "▁stop", "st", "op", "##x", "a</w>", "b</w>", "</w>", ",", ".", " ", REPLACEMENT]  # fmt: skip
    vocab = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([" added tok", "▁x"])
    return backend


_REPLACE, _BYTES, _FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
_UPPER_H = decoders.Replace("h", "H")

# name -> (backend, the stream it must be decoded by)
ZOO: dict[str, tuple[Backend, str]] = {
    "byte_level": (byte_level(), "ByteLevelStream"),
    "llama2": (with_decoder(decoders.Sequence([_REPLACE, _BYTES, _FUSE, decoders.Strip(" ", 1, 0)])), "WindowStream"),
    "gemma": (with_decoder(decoders.Sequence([_REPLACE, _BYTES, _FUSE])), "WindowStream"),
    "metaspace": (with_decoder(decoders.Metaspace()), "WindowStream"),
    "metaspace_never": (with_decoder(decoders.Metaspace(prepend_scheme="never")), "WindowStream"),
    "wordpiece": (with_decoder(decoders.WordPiece()), "WindowStream"),
    "bpe_suffix": (with_decoder(decoders.BPEDecoder()), "WindowStream"),
    "none": (with_decoder(None), "WindowStream"),
    "replace_bytes": (byte_level(decoders.Sequence([_UPPER_H, decoders.ByteLevel()])), "WindowStream"),
    "across": (with_decoder(decoders.Sequence([_REPLACE, _BYTES, _FUSE, decoders.Replace("aa", "Q")])), "WholeStream"),
}  # fmt: skip


def wrap(backend: Backend, **options: Any) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", **options))


TOKENIZERS = {name: wrap(backend) for name, (backend, _) in ZOO.items()}
