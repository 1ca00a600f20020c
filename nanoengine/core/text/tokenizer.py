"""The model's tokenizer: loaded from its folder, and the few things the engine asks of it."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from nanoengine.core.errors import ModelError, RequestError
from nanoengine.core.setup.git_lfs import refuse_lfs_pointer
from nanoengine.core.text import chat
from nanoengine.core.text.decoding import TokenStream, TokenTable

_OLD_FORMATS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_READ_ALWAYS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_UNREADABLE = ("tekken.json", "tiktoken.model", "tokenizer_config.json")


def load_tokenizer(path: Path) -> Tokenizer | None:
    """Loads a model folder's tokenizer, from its files alone. None if the folder has none.

    `tokenizer.json` is the source of truth: whatever class `tokenizer_config.json` names, the pre-tokenizer of the
    file stays (transformers' AutoTokenizer replaces it for some classes, which splits numbers and blanks wrongly).
    Special tokens and chat templates come from the other files as transformers reads them. A folder with only an
    older format is converted by transformers.

    Raises `ModelError` when there are tokenizer files that cannot be read.
    """
    for name in _READ_ALWAYS:
        refuse_lfs_pointer(path / name)
    if (path / "tokenizer.json").is_file():
        return Tokenizer(_load(path, automatic=False))
    old = next((name for name in _OLD_FORMATS if (path / name).is_file()), None)
    if old is not None:
        refuse_lfs_pointer(path / old)
        return Tokenizer(_load(path, automatic=True))
    unreadable = next((name for name in _UNREADABLE if (path / name).is_file()), None)
    if unreadable is not None:
        raise ModelError(
            f"{path} has {unreadable} but no tokenizer.json. Copy the tokenizer.json of the same model there, or set "
            "skip_tokenizer_init to work with token ids only"
        )
    return None


def _load(path: Path, automatic: bool) -> Any:
    # Importing transformers takes most of a second, its AutoTokenizer two more: only here, and only what is needed.
    if automatic:
        from transformers import AutoTokenizer as Loader
    else:
        from transformers import PreTrainedTokenizerFast as Loader
    try:
        # Cleaning up blanks before punctuation loses text and cannot be streamed; it is no part of tokenizer.json.
        hf = Loader.from_pretrained(str(path), local_files_only=True, clean_up_tokenization_spaces=False)
    except Exception as error:  # Rust and conversion errors are plain Exceptions
        how = (
            "; it has no tokenizer.json: convert it where sentencepiece and protobuf are installed with "
            f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
            if automatic
            else "; is tokenizer.json complete?"
        )
        raise ModelError(f"the tokenizer in {path} cannot be read: {type(error).__name__}: {error}{how}") from error
    if not hf.is_fast:
        raise ModelError(
            f"the tokenizer in {path} ({type(hf).__name__}) has no tokenizer.json form, which the engine needs"
        )
    return hf


class Tokenizer:
    """Text to ids and back, chat templates, and streams for incremental decoding.

    Args:
        hf: a transformers tokenizer that stands on the `tokenizers` library; nobody else may hold it.
    """

    def __init__(self, hf: Any) -> None:
        self._hf, self._backend = hf, hf.backend_tokenizer
        # Some files carry the truncation of a training run; a prompt is never cut silently.
        self._truncation, self._padding = self._backend.truncation, self._backend.padding
        self._backend.no_truncation()
        self._backend.no_padding()
        self._table = TokenTable(self._backend)
        self._texts: dict[int, str] = {}

    @cached_property
    def hf(self) -> Any:
        """The transformers tokenizer as it was loaded; what users get from `LLM.get_tokenizer()`.

        A copy, made when it is asked for, as that takes a while: what a user does with it (calling it with
        truncation=True sets that for good) must not cut prompts.
        """
        copied = copy.deepcopy(self._hf)
        if self._truncation is not None:
            copied.backend_tokenizer.enable_truncation(**self._truncation)
        if self._padding is not None:
            copied.backend_tokenizer.enable_padding(**self._padding)
        return copied

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self._hf.eos_token_id
        return eos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised. Raises `RequestError`."""
        if not isinstance(text, str):
            raise RequestError("invalid_prompt", f"a text prompt must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise RequestError("invalid_prompt", f"the prompt is not valid Unicode: {error}") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; ids outside the vocabulary have none."""
        text: str = self._backend.decode([i for i in token_ids if i >= 0], skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        """Decodes one new sequence token by token to exactly what `decode` gives."""
        return self._table.stream(skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """A token's own text, its leading space included and specials shown; U+FFFD for parts of a character."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._table.text(token_id)
        return text

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    def render_chat(self, messages: Any, **options: Any) -> str:
        """The prompt text of a conversation.

        Args:
            messages: a list of `{"role": ..., "content": ...}`.
            options: `add_generation_prompt` (default True, or False with `continue_final_message`),
                `continue_final_message`, `tools`, `documents`, `chat_template` (text, or name of one of several), and
                whatever variables the template knows.

        Raises `RequestError("invalid_prompt")` on malformed messages, without a template, and when it refuses.
        """
        return chat.render(self._hf, messages, options)

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        """Token ids of a conversation; arguments and errors as in `render_chat`.

        The template writes the special tokens itself, so none are added.
        """
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    @cached_property
    def vocab_size(self) -> int:
        """Known tokens, added ones included. The model's vocabulary is often padded to more."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def all_special_ids(self) -> frozenset[int]:
        """What `skip_special_tokens` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(int(i) for i, token in added.items() if token.special)
