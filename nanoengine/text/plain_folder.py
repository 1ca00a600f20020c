"""Reads a tokenizer folder without transformers, whose import takes a second, where it would add nothing.

A folder whose other files only say what tokenizer.json has too is read by `tokenizers` alone. What is not known to be
without an effect is left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from nanoengine.api.errors import is_failure

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the second where the first says nothing
_CHECKED = {*_NAMED, *_EXTRA, "added_tokens_decoder", "chat_template"}
_ONE_OF: Mapping[str, tuple[Any, ...]] = {
    "split_special_tokens": (False,), "padding_side": ("left", "right"), "truncation_side": ("left", "right"),
    "backend": ("tokenizers",), "chat_control_tokens": (None,),
}  # fmt: skip
_NO_EFFECT = {
    "add_bos_token", "add_eos_token",  # not beside a tokenizer.json, whose post-processor adds them
    "add_prefix_space", "clean_up_tokenization_spaces", "errors", "is_local", "legacy", "local_files_only",
    "model_max_length", "name_or_path", "processor_class", "sp_model_kwargs", "spaces_between_special_tokens",
    "special_tokens_map_file", "tokenizer_class", "use_default_system_prompt",
}  # fmt: skip
_LEGACY = ("special_tokens_map.json", "added_tokens.json")  # read where tokenizer_config.json lists no added tokens


@dataclass(frozen=True, slots=True)
class PlainTokenizer:
    """What the engine asks a transformers tokenizer, under the same names.

    Attributes:
        special_tokens_map: name, as "eos_token", -> text of the token. all_special_tokens: these, and others that the
            folder names.
    """

    backend_tokenizer: Any
    special_tokens_map: Mapping[str, str]
    all_special_tokens: list[str]
    chat_template: str | None
    chat_control_tokens: None = None
    class_name: str = "TokenizersBackend"  # of transformers, which reads it there

    @property
    def eos_token_id(self) -> int | None:
        eos = self.special_tokens_map.get("eos_token")
        return None if eos is None else self.backend_tokenizer.token_to_id(eos)

    def get_chat_template(self, given: str | None, tools: Any) -> str | None:
        return self.chat_template if given is None else given


def plain_tokenizer(path: Path) -> PlainTokenizer | None:
    """The tokenizer in a folder with a tokenizer.json; None where transformers must read it, and say what is wrong."""
    try:
        config = _config(path)
        if config is None or not _is_plain(config) or (path / "additional_chat_templates").exists():
            return None
        if "added_tokens_decoder" not in config and any((path / name).exists() for name in _LEGACY):
            return None
        backend = Backend.from_file(str(path / "tokenizer.json"))
        return _made(path, config, backend)
    except BaseException as error:  # `tokenizers` may also panic; transformers tries it again
        if not is_failure(error):
            raise
        return None


def _config(path: Path) -> dict[str, Any] | None:
    file = path / "tokenizer_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found if isinstance(found, dict) else None


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether each key is one that is checked, or changes nothing that the engine uses."""
    if any(config[name] not in allowed for name, allowed in _ONE_OF.items() if name in config):
        return False
    return config.keys() <= _CHECKED | _ONE_OF.keys() | _NO_EFFECT


def _made(path: Path, config: Mapping[str, Any], backend: Any) -> PlainTokenizer | None:
    """None if transformers would add tokens, or make other ones special."""
    template = _template(path, config)
    named = {name: _text(config[name]) for name in _NAMED if config.get(name) is not None}
    extra = [_text(token) for token in config.get(_EXTRA[0]) or config.get(_EXTRA[1]) or ()]
    added = backend.get_added_tokens_decoder().values()
    listed = [AddedToken(**token) for token in config.get("added_tokens_decoder", {}).values()]
    special = [*dict.fromkeys([*named.values(), *extra])]
    if backend.padding is not None or not {*map(repr, listed)} <= {*map(repr, added)}:
        return None
    if not isinstance(template, str | None) or not {*special} <= {token.content for token in added if token.special}:
        return None
    if backend.post_processor is None:  # as transformers leaves it
        backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    backend.encode_special_tokens = False
    return PlainTokenizer(backend, named, special, template)


def _template(path: Path, config: Mapping[str, Any]) -> Any:
    file = path / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")


def _text(token: Any) -> str:
    """The text of a token in tokenizer_config.json: itself, or a field of what transformers wrote."""
    if isinstance(token, dict) and token["__type"] == "AddedToken":
        token = token["content"]
    if not isinstance(token, str):
        raise TypeError(f"a token is text, not {token!r}")
    return token
