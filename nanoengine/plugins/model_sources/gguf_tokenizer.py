"""GGUF vocabulary -> tokenizer.json, with the pre-tokenizer that the file names.

Some loaders use GPT-2's splitting if they do not know the name. This is not noticed, because decoding still returns the
text, but white space and digits become tokens that the model has never seen. So an unknown name is rejected here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoengine.api import ModelSourceError
from nanoengine.plugins.model_sources.gguf_metadata import Metadata, token_ids, write_json
from nanoengine.plugins.model_sources.gguf_sentencepiece import sentencepiece_tokenizer
from nanoengine.plugins.model_sources.gguf_vocabulary import TokenType, read_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The published splitting expressions of Llama 3 and Qwen 2 differ only in the number of digits that stay together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a family splits text before BPE.

    Attributes:
        pattern: splitting expression; None: each digit separately, then GPT-2's expression.
        nfc: text is converted to Unicode's normal form C first.
        ignore_merges: a piece that is a token is not split.
        add_bos: whether BOS is added at the beginning, if the file does not say it.
    """

    pattern: str | None
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "smollm": PreTokenizer(None),
    "llama-bpe": PreTokenizer(_SPLIT.format(digits="{1,3}"), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer(_SPLIT.format(digits=""), nfc=True),
}


_LEGAL = (TokenType.NORMAL, TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)


def write_tokenizer(meta: Metadata, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, if the file has a chat template, chat_template.jinja.

    Raises `ModelSourceError` that names a tokenizer which is not supported, or if the vocabulary is inconsistent.
    """
    tokenizer = build_tokenizer(meta)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = meta.strings("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        # This class does not change tokenizer.json; classes named after a model replace its pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.positive_int(f"{meta.require('general.architecture')}.context_length"),
    }
    config |= {key.removesuffix("_id"): tokens[value] for key, value in token_ids(meta).items()}
    write_json(folder / "tokenizer_config.json", config)
    template = meta.text("tokenizer.chat_template", "")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def build_tokenizer(meta: Metadata) -> Tokenizer:
    """The `tokenizers.Tokenizer` of the file's vocabulary. Raises `ModelSourceError` as `write_tokenizer` does."""
    model = meta.require("tokenizer.ggml.model")
    try:
        return _built(meta, model)
    except (KeyboardInterrupt, GeneratorExit, ModelSourceError):
        raise
    except BaseException as error:  # the library's panics are not an `Exception`
        raise meta.error(f"its tokenizer cannot be built: {type(error).__name__}: {error}") from error


def _built(meta: Metadata, model: Any) -> Tokenizer:
    if model == "gpt2":
        pre = _pre_tokenizer(meta)
        tokenizer, add_bos = _byte_level(meta, pre), pre.add_bos
    elif model == "llama":
        tokenizer, add_bos = sentencepiece_tokenizer(meta), True
    else:
        raise meta.error(
            f"tokenizer model {model!r} is not supported; valid: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
        )
    _add_template(meta, tokenizer, add_bos)
    return tokenizer


def _byte_level(meta: Metadata, pre: PreTokenizer) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab, types = read_vocabulary(meta, "byte-level BPE", _LEGAL)
    merges = _merges(meta, vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = _splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    # All of them are in the vocabulary already, which fixes their ids.
    special = {TokenType.UNKNOWN: True, TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=special[types[token]], normalized=False)
            for token in vocab
            if types[token] in special
        ]
    )
    return tokenizer


def _pre_tokenizer(meta: Metadata) -> PreTokenizer:
    pre = meta.text("tokenizer.ggml.pre", "")
    if pre not in PRE_TOKENIZERS:
        what = f"pre-tokenizer {pre!r} is not supported" if pre else "it names no pre-tokenizer"
        raise meta.error(f"{what}; valid: {', '.join(sorted(PRE_TOKENIZERS))}")
    return PRE_TOKENIZERS[pre]


def _merges(meta: Metadata, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in meta.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        for token in (left, right, left + right):
            if token not in vocab:
                raise meta.error(f"merge {merge!r} needs the token {token!r}, which is not in the vocabulary")
        merges.append((left, right))
    return merges


def _splitter(pre: PreTokenizer) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pre.pattern is None:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None)
    return pre_tokenizers.Sequence([first, bytes_])


def _add_template(meta: Metadata, tokenizer: Tokenizer, add_bos: bool) -> None:
    """Adds BOS at the beginning and EOS at the end of texts, if the file (or the family, for BOS) requires them."""
    from tokenizers.processors import TemplateProcessing

    ids, tokens = token_ids(meta), meta.strings("tokenizer.ggml.tokens")
    around: dict[str, list[str]] = {"bos": [], "eos": []}
    special: list[dict[str, Any]] = []
    for kind, default in (("bos", add_bos), ("eos", False)):
        if not meta.flag(f"tokenizer.ggml.add_{kind}_token", default):
            continue
        key = f"{kind}_token_id"
        if key not in ids:
            raise meta.error(
                f"it requires {kind} in every text, but tokenizer.ggml.{key} is missing, or outside the vocabulary"
            )
        token = tokens[ids[key]]
        if tokenizer.token_to_id(token) != ids[key]:
            raise meta.error(f"it requires {kind} in every text, but {token!r} is a token of type unused")
        around[kind] = [
            kind
        ]  # our own name, because the text of a token, such as "$A", could be read as a part of the template
        special.append({"id": kind, "ids": [ids[key]], "tokens": [token]})
    if special:
        single, pair = ([*around["bos"], f"${part}", *around["eos"]] for part in "AB")
        tokenizer.post_processor = TemplateProcessing(single=single, pair=single + pair, special_tokens=special)
