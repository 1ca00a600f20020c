"""Fields that every request for text may have: sampling, structured outputs, and how it is run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, create_model

from nanoengine.api.errors import ParamsError
from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.params.sampling_fields import NOT_SUPPORTED
from nanoengine.server.protocol.base import FIRST_ERROR, Name, OnlyFalse, RequestModel

Ints = Annotated[list[int], FIRST_ERROR]
Strings = Annotated[list[str], FIRST_ERROR]
# Each is looked for at every character, on the event loop.
Stops = Annotated[list[Annotated[str, Field(max_length=4096)]], FIRST_ERROR, Field(max_length=64)]
GUIDED = ("json", "regex", "choice", "grammar")
"""Old names, as `guided_json`."""


class StreamOptions(RequestModel):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: OnlyFalse | None = None


class JsonSchema(RequestModel):
    """A named JSON schema. The output matches it, whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """What the output must be: text, any JSON object, JSON of a schema, or text with structural tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: Strings | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(RequestModel):
    """vLLM's `structured_outputs`: exactly one of the first six."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    reasoning: str | int | None = None


class GenerateRequest(RequestModel):
    """Fields that completions and chat have in common. What the engine's plugins own is added by `with_sampling`."""

    not_supported: ClassVar = {
        **{name: text for name, text in NOT_SUPPORTED.items() if name != "best_of" and not name.startswith("guided_")},
        "stream_interval": "a chunk comes as soon as there is a token",
        "chat_template": "a template comes with the model; give its variables as chat_template_kwargs",
        "mm_processor_kwargs": "prompts are text",
        "logits_processors": "a function cannot be sent; write a plugin",
        "batch_logits_processor": "a function cannot be sent; write a plugin",
        "kv_transfer_params": "the cache is not handed over",
        "vllm_xargs": "give the parameters of a logits processor as fields",
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: Annotated[str, Field(max_length=4096)] | Stops | None = None
    stop_token_ids: Annotated[Ints, Field(max_length=4096)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=16_384)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    user: Name | None = None
    request_id: str | None = None
    timeout: float | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_progress: bool | None = None

    @property
    def constraint_field(self) -> str | None:
        """The field that says what the output must match, if one does."""
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_schema":
            return "response_format.json_schema.schema"
        if wanted is not None and wanted.type != "text":
            return "response_format"
        names = ("structured_outputs", *(f"guided_{kind}" for kind in GUIDED))
        return next((name for name in names if self.given(name)), None)


Request = TypeVar("Request", bound=GenerateRequest)


def with_sampling(model: type[Request], names: Iterable[str]) -> type[Request]:
    """The model with a field for each sampling parameter of the engine; the engine checks their values."""
    hidden = {"logits_processors", "batch_logits_processor"}
    more: dict[str, Any] = {
        name: (Any, None) for name in sorted(names) if name not in model.model_fields and name not in hidden
    }
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **more)


def constraint_of(request: GenerateRequest) -> StructuredOutputsParams | None:
    """What the output must match. Raises `ParamsError`, also where several of the fields say it."""
    wanted = request.response_format
    given = ["response_format"] if wanted is not None and wanted.type != "text" else []
    given += [n for n in ("structured_outputs", *(f"guided_{kind}" for kind in GUIDED)) if request.given(n)]
    if len(given) > 1:
        raise ParamsError(f"{' and '.join(given)} say what the output must match: give one of them")
    if not given:
        return None
    if given[0] == "response_format":
        assert wanted is not None
        return _of_format(wanted)
    if given[0] == "structured_outputs":
        assert request.structured_outputs is not None
        values = request.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        return StructuredOutputsParams(**values)
    return StructuredOutputsParams(**{given[0].removeprefix("guided_"): getattr(request, given[0])})


def _of_format(wanted: ResponseFormat) -> StructuredOutputsParams:
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if wanted.type == "structural_tag":
        return StructuredOutputsParams(structural_tag=wanted.model_dump(exclude_none=True))
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ParamsError("response_format.json_schema.schema is missing: give a JSON schema")
    return StructuredOutputsParams(json=wanted.json_schema.schema_)  # type: ignore[arg-type]
