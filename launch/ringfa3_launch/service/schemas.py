"""The JSON of completions: what a request may say, and what an answer looks like. The OpenAPI document comes from here.

A field that would change the answer and that is not served is declared here with the one value that changes nothing;
another value, or a field that is not declared, is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

Zero = Annotated[float, Field(ge=0, le=0, allow_inf_nan=False)]
NAMES = 64  # of a JSON object: more than any has fields
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")]


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say half of a surrogate pair; no tokenizer can read it
        raise ValueError("wanted Unicode text, got half of a surrogate pair") from None
    return text


def _below(ids: list[int]) -> list[int]:
    """All at once: a prompt of 128K ids that are bounded one by one takes 8 ms more."""
    if min(ids) < 0 or max(ids) >= 1 << 31:
        raise ValueError("wanted token ids from 0 to 2147483647, got one outside")
    return ids


Text = Annotated[str, AfterValidator(_whole)]
Ids = Annotated[
    list[int],
    Field(min_length=1, fail_fast=True),
    AfterValidator(_below),
    WithJsonSchema(
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 1 << 31}}
    ),
]
Stop = Annotated[Text, Field(min_length=1)]


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > NAMES:
        raise ValueError(f"wanted an object of at most {NAMES} names, got {len(given)}")
    return given


Few = BeforeValidator(_few)


class Strict(BaseModel):
    """No field beyond those declared, no value of another type.

    Pydantic lists every fault that it finds, a kilobyte each: so objects are bounded, and lists end at their first.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    _bounded = model_validator(mode="before")(_few)


class StreamOptions(Strict):
    """What a stream has beside text."""

    include_usage: bool | None = Field(None, description="a last chunk without choices, with usage")
    include_obfuscation: Literal[False] | None = Field(None, description="padding of chunks is not served")


class Asked(Strict):
    """What both kinds of completion may say."""

    model: str = Field(max_length=256, description="as /v1/models names it")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="default 1; 0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="default 1")
    top_k: int | None = Field(None, ge=0, lt=1 << 31, description="0 or null: all tokens; ours")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, description="the same seed gives the same answer")
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True)] | None = Field(
        None, description="the answer ends before the first of these"
    )
    stop_token_ids: Annotated[list[Token], Field(max_length=64, fail_fast=True)] | None = Field(
        None, description="ours"
    )
    ignore_eos: bool | None = Field(None, description="go on after the model's end token; ours")
    return_token_ids: bool | None = Field(
        None, description="choices have token_ids, of this part's tokens in a stream; as vLLM's, but not of the prompt"
    )
    stream: bool | None = Field(None, description="server-sent events, the last is [DONE]")
    stream_options: StreamOptions | None = Field(None, description="with stream only")
    session: Name | None = Field(
        None,
        description="keeps the cache under this name, for a prompt that goes on where this one ended; ours",
    )
    user: str | None = Field(None, max_length=512, description="has no effect")
    n: Literal[1] | None = Field(None, description="only 1 is served")
    logit_bias: Annotated[dict[str, float], Few, Field(max_length=0)] | None = Field(
        None, description="only empty is served"
    )
    frequency_penalty: Zero | None = Field(None, description="only 0 is served")
    presence_penalty: Zero | None = Field(None, description="only 0 is served")


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: Annotated[Text, Field(min_length=1)] | Ids = Field(description="text, or token ids")
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="default 16")
    echo: Literal[False] | None = Field(None, description="only false is served")
    best_of: Literal[1] | None = Field(None, description="only 1 is served")
    logprobs: None = Field(None, description="not served")
    suffix: None = Field(None, description="not served")


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: None = Field(None, description="not served")
    refusal: None = Field(None, description="only null: an answer of this server given back")
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="not served")
    function_call: None = Field(None, description="not served")
    audio: None = Field(None, description="not served")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="only empty")


class TextFormat(Strict):
    """The one format of answers."""

    type: Literal["text"]


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="default: what the context leaves")
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="the older name of max_completion_tokens")
    logprobs: Literal[False] | None = Field(None, description="not served")
    top_logprobs: None = Field(None, description="not served")
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="not served")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="tools are not served")
    response_format: TextFormat | None = Field(None, description="only text is served")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(
        None, description="only text is served"
    )
    store: Literal[False] | None = Field(None, description="nothing is stored")
    metadata: Annotated[dict[str, str], Few] | None = Field(None, description="has no effect")


class Details(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Details


class CompletionChoice(BaseModel):
    """The text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None
    token_ids: list[int] | None = Field(None, description="where return_token_ids asked for them")


class Completion(BaseModel):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Answer(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """The answer."""

    index: int
    message: Answer
    finish_reason: Literal["stop", "length"]
    logprobs: None
    token_ids: list[int] | None = Field(None, description="where return_token_ids asked for them")


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_tokens: int | None


class Models(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]
