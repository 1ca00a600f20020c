"""A small byte-level tokenizer: an id for each byte, some longer tokens, and special tokens behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LONGER = ('{"', '":', '",', ' "', "true", "false", "null", "ing", "yes", "no", "  ", "12")
END, START_REASONING, END_REASONING = "<end>", "<think>", "</think>"


def byte_tokenizer(longer: Sequence[str] = LONGER) -> Tokenizer:
    """Ids 0 to 255 are the bytes; then come the prefixes of `longer` that are needed to merge them; then END,
    START_REASONING and END_REASONING, of which the first is special."""
    letters = _letters()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    merges = []
    for text in longer:
        parts = [letters[byte] for byte in text.encode()]
        for count in range(1, len(parts)):
            merge = "".join(parts[:count]), parts[count]
            if "".join(merge) not in vocab:
                vocab["".join(merge)] = len(vocab)
                merges.append(merge)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens([START_REASONING, END_REASONING])
    return tokenizer


def write_byte_tokenizer(folder: Path, longer: Sequence[str] = LONGER) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json into the folder of a model."""
    tokenizer = byte_tokenizer(longer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return tokenizer


def _letters() -> list[str]:
    """The character by which a byte-level tokenizer writes each byte: itself if it is visible in Latin-1."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + others.index(byte)) for byte in range(256)]
