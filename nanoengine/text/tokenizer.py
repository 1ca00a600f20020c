"""The model's tokenizer: loading it from the model's folder, and the methods that the engine uses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nanoengine.api.errors import ModelError, NanoEngineError, RequestError, described, is_failure
from nanoengine.params.arguments import GivenPrompt
from nanoengine.text.chat import prepare
from nanoengine.text.control_tokens import ControlTokens, control_tokens
from nanoengine.text.decoding import TokenStream, TokenTable
from nanoengine.text.encoding import encoded
from nanoengine.text.git_lfs import refuse_lfs_pointer
from nanoengine.text.plain_folder import plain_tokenizer
from nanoengine.text.templates import TemplateProcesses

_OLD_FORMATS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_READ_ALWAYS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_CLASS = re.compile(r"(?!Auto)\w*(Tokenizer|TokenizerFast|Backend)")
_UNREADABLE = ("tekken.json", "tiktoken.model", "tokenizer_config.json")


def load_tokenizer(path: Path, **options: Any) -> Tokenizer | None:
    """Loads the tokenizer of a model folder, only from its files. None if the folder has none.

    `tokenizer.json` decides: its pre-tokenizer is used for every class that `tokenizer_config.json` may name
    (transformers' AutoTokenizer replaces it for some classes, and then splits numbers and spaces wrongly). Special
    tokens and chat templates are read from the other files as transformers does. If a folder has only an older format,
    transformers converts it. Code in the folder is never run. `options`: those of `Tokenizer`.

    Raises `ModelError` if there are tokenizer files that cannot be read.
    """
    for name in _READ_ALWAYS:
        refuse_lfs_pointer(path / name)
    if (path / "tokenizer.json").is_file():
        load = partial(_load, path, automatic=False)
        plain = plain_tokenizer(path)
        return Tokenizer(load(), **options) if plain is None else Tokenizer(plain, load=load, **options)
    old = next((name for name in _OLD_FORMATS if (path / name).is_file()), None)
    if old is not None:
        refuse_lfs_pointer(path / old)
        return Tokenizer(_load(path, automatic=True), **options)
    unreadable = next((name for name in _UNREADABLE if (path / name).is_file()), None)
    if unreadable is not None:
        raise ModelError(
            f"{path} has {unreadable} but no tokenizer.json. Copy the tokenizer.json of the same model there, or set "
            "skip_tokenizer_init to work with token ids only"
        )
    return None


def _load(path: Path, automatic: bool) -> Any:
    # Importing transformers takes a second, AutoTokenizer two more, so they are imported only when needed.
    if automatic:
        _check_class(path)
        from transformers import AutoTokenizer as Loader
    else:
        from transformers import PreTrainedTokenizerFast as Loader
    try:
        # Without trust_remote_code, AutoTokenizer asks on standard input whether the folder's own code may run.
        # Removing spaces before punctuation loses text and cannot be streamed; tokenizer.json does not have it.
        hf = Loader.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, clean_up_tokenization_spaces=False
        )
    except BaseException as error:
        if not is_failure(error):
            raise
        how = _what_to_do(path) if automatic else "is tokenizer.json complete?"
        raise ModelError(f"the tokenizer in {path} cannot be read: {described(error)}; {how}") from error
    if not hf.is_fast:
        raise ModelError(
            f"the tokenizer in {path} ({type(hf).__name__}) has no tokenizer.json form, which the engine needs"
        )
    return hf


def _what_to_do(path: Path) -> str:
    if _json(path / "tokenizer_config.json").get("auto_map"):
        return (
            "its tokenizer_config.json requires code of its own (auto_map), which is never run: copy a tokenizer.json "
            "of the same model there, or set skip_tokenizer_init to work with token ids only"
        )
    return (
        "it has no tokenizer.json: install sentencepiece and protobuf, and convert it with "
        f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
    )


def _check_class(path: Path) -> None:
    """Raises `ModelError` if `tokenizer_class` is not a tokenizer.

    AutoTokenizer would use any class of transformers, and other Auto classes ask whether the folder's code may run.
    """
    for name in ("tokenizer_config.json", "config.json"):
        found = _json(path / name).get("tokenizer_class")
        if found is not None and (not isinstance(found, str) or not _CLASS.fullmatch(found)):
            raise ModelError(f"{path / name}: tokenizer_class {found!r} is not a tokenizer of transformers")


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none. transformers reports what is missing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class Tokenizer:
    """Text to ids and back, chat templates, and streams for incremental decoding.

    Args:
        hf: a transformers tokenizer that is based on the `tokenizers` library, or a `PlainTokenizer`; no other object
            may use it.
        load: makes the transformers tokenizer where `hf` is none.
        max_tokens: most tokens of a prompt. A text longer than so many of the longest token is rejected untokenized.
        processes: run chat templates; no other object may use them.
    """

    def __init__(
        self,
        hf: Any,
        *,
        load: Callable[[], Any] | None = None,
        max_tokens: int | None = None,
        processes: TemplateProcesses | None = None,
    ) -> None:
        self._hf, self._load, self._backend = hf, load, hf.backend_tokenizer
        # Some files have the truncation of a training run, but a prompt must never be cut silently.
        self._truncation, self._padding = self._backend.truncation, self._backend.padding
        self._backend.no_truncation()
        self._backend.no_padding()
        self._table = TokenTable(self._backend)
        self._texts: dict[int, str] = {}
        self._max_tokens = max_tokens
        self._processes = processes or TemplateProcesses()
        self._control: tuple[str, ControlTokens | None] = "", None

    @cached_property
    def hf(self) -> Any:
        """The transformers tokenizer as it was loaded, which `LLM.get_tokenizer()` returns.

        It is a copy, because a user may change it (a call with truncation=True sets truncation permanently), which must
        not cut prompts. The copy takes time, so it is made when it is first used; from the folder's files where the
        engine itself needs none.
        """
        if self._load is not None:
            return self._load()
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

    def description(self) -> dict[str, Any]:
        """Its class, chat templates and special tokens (bos_token, eos_token, pad_token ...), as transformers names
        them. Plain data."""
        hf = self._hf
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        texts = {name: hf.special_tokens_map.get(name) for name in names}
        return {
            "tokenizer_class": getattr(hf, "class_name", type(hf).__name__),
            "chat_template": hf.chat_template,
            **texts,
            "additional_special_tokens": sorted(self._table.special - {*texts.values()}),
            "vocab_size": self.vocab_size,
        }

    def to_json(self) -> str:
        """The content of a tokenizer.json, with all added tokens."""
        return str(self._backend.to_str())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens in the text become tokens. Raises `RequestError`."""
        self._check_text(text)
        with _failures():
            return encoded(self._backend, text, add_special_tokens)

    def _check_text(self, text: str) -> None:
        if not isinstance(text, str):
            raise RequestError("invalid_prompt", f"a text prompt must be a str, not {type(text).__name__}")
        try:
            str.encode(text)
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise RequestError("invalid_prompt", f"the prompt is not valid Unicode: {error}") from error
        # Tokenizing a text that is far too long takes minutes and gigabytes.
        if self._max_tokens is not None and len(text) > 8 * self._max_tokens:
            self._check_size(text, self._max_tokens)

    def _check_size(self, text: str, max_tokens: int) -> None:
        most = max_tokens * self._longest_token
        if len(text) > most:
            raise RequestError(
                "too_long",
                f"the text has {len(text)} characters, but at most {most} fit in {max_tokens} tokens "
                f"(max_model_len): the longest token has {self._longest_token}",
            )
        if len(text) <= 16 * max_tokens:
            return
        # Its beginning may have too many already. Where it is cut, other tokens come than in the whole text.
        with _failures():
            begins = len(encoded(self._backend, text[: 8 * max_tokens]))
        if begins > max_tokens + max_tokens // 4 + 64:
            raise RequestError(
                "too_long",
                f"the first {8 * max_tokens} of the text's {len(text)} characters have {begins} tokens, and "
                f"max_model_len is {max_tokens}: shorten the text or raise max_model_len, if the model was made for "
                "more",
            )

    @cached_property
    def _longest_token(self) -> int:
        """Number of characters of the longest token; at least 8."""
        return max(8, max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=0))

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids outside the vocabulary are skipped."""
        text: str = self._backend.decode([i for i in token_ids if i >= 0], skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        """A stream that decodes one sequence token by token, to exactly the text that `decode` returns."""
        return self._table.stream(skip_special_tokens)

    @property
    def special_texts(self) -> frozenset[str]:
        """Texts of all special tokens."""
        return frozenset(self._table.special)

    @property
    def named_special_texts(self) -> list[str]:
        """Texts of the special tokens that the model's folder names, as "eos_token"."""
        return list(self._hf.all_special_tokens)

    @property
    def template_text(self) -> str:
        """The source of the chat template; of several, all of them. "": there is none."""
        found = self._hf.chat_template
        return "\n".join(found.values()) if isinstance(found, dict) else found or ""

    def has_special(self, text: str) -> bool:
        """Whether the text contains a special token."""
        return any(special and special in text for special in self._table.special)

    def special_text(self, token_id: int) -> str | None:
        """The text of a special token; None for any other id."""
        return self._table.special_text(token_id)

    def token_text(self, token_id: int) -> str:
        """The text of one token, also a special one, with its leading space; U+FFFD for a part of a character."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._table.text(token_id)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, also of a part of a character, with its leading space."""
        return self._table.token_bytes(token_id)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    def render_chat(self, messages: Any, /, **options: Any) -> str:
        """The prompt text of a conversation. The template runs in a separate process.

        Args:
            messages: a list of `{"role": ..., "content": ...}`.
            options: `add_generation_prompt` (default True, or False with `continue_final_message`),
                `continue_final_message` (True, or the key to continue), `tools`, `documents`, `chat_template` (text, or
                the name of one of the model's), and other variables of the template.

        Raises `RequestError("invalid_prompt")` if messages are malformed, if there is no template, or if it raises an
        error, takes too long or too much memory.
        """
        return prepare(self._hf, self._processes, messages, options)[1]

    def chat(self, messages: Any, /, *, sanitize_control_tokens: bool = False, **options: Any) -> tuple[list[int], str]:
        """Token ids and prompt text of a conversation. Other arguments and errors are those of `render_chat`.

        The template writes the special tokens, so none are added.

        Args:
            sanitize_control_tokens: control tokens in messages, tools and the template's other arguments are encoded as
                text. By default they become tokens, as in transformers.
        """
        if not isinstance(sanitize_control_tokens, bool):
            raise RequestError("invalid_prompt", f"sanitize_control_tokens is {sanitize_control_tokens!r}, not a bool")
        chat, text = prepare(self._hf, self._processes, messages, options)
        if not sanitize_control_tokens:
            return self.encode(text, add_special_tokens=False), text
        self._check_text(text)
        template, control = self._control  # the last one is kept, because it copies the tokenizer
        if control is None or template != chat.template:
            control = ControlTokens(self._backend, control_tokens(self._hf, chat.template))
            self._control = chat.template, control
        with _failures():
            return control.encode(chat, text), text

    def rendered(self, messages: Any, options: Mapping[str, Any]) -> GivenPrompt:
        """What `chat` returns, as a prompt; in place of the ids the error where the messages cannot be rendered."""
        try:
            return GivenPrompt(*self.chat(messages, **options))
        except RequestError as error:
            return GivenPrompt(error)
        except BaseException as error:  # a message may be of a class that raises anything
            if isinstance(error, NanoEngineError) or not is_failure(error):
                raise
            return GivenPrompt(RequestError("invalid_prompt", f"reading the messages raised {described(error)}"))

    def apply_chat_template(self, messages: Any, /, **options: Any) -> list[int]:
        """Token ids of a conversation. Arguments and errors are those of `chat`."""
        return self.chat(messages, **options)[0]

    def close(self) -> None:
        """Ends the processes that run templates; `chat` cannot be used afterwards. Idempotent."""
        self._processes.close()

    @cached_property
    def vocab_size(self) -> int:
        """Number of known tokens, including added ones. The model's vocabulary is often padded to more."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest id of a token."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def all_special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(int(i) for i, token in added.items() if token.special)


@contextmanager
def _failures() -> Iterator[None]:
    """A context: what the tokenizer raises, also a Rust panic, becomes a `RequestError` of one prompt."""
    try:
        yield
    except NanoEngineError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise RequestError("invalid_prompt", f"the tokenizer failed on the text: {described(error)}") from error
