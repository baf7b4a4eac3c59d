"""A request's text as token ids that the model takes, and its wishes as a Sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringfa3_launch.service.errors import Refusal
from ringfa3_launch.service.schemas import Asked, ChatRequest, CompletionRequest, Message
from ringfa3_launch.service.state import Service


@dataclass(frozen=True)
class Prompt:
    """Token ids, and how many may follow them."""

    ids: Sequence[int]
    max_tokens: int


async def text_prompt(service: Service, asked: CompletionRequest) -> Prompt:
    """The prompt of /v1/completions.

    Raises:
        Refusal: it is empty or too long, or has ids that the model has not.
    """
    text = asked.prompt
    if isinstance(text, str):
        tokenizer = service.cluster.tokenizer
        if tokenizer is None:
            raise Refusal.wrong("prompt", "token ids: this model has no tokenizer", "text")
        ids = await service.tokenize(lambda: list(tokenizer(text)["input_ids"]))
    else:
        ids = text
        vocab = (await service.facts()).vocab
        if vocab is not None and max(ids) >= vocab:
            raise Refusal.wrong("prompt", f"token ids below {vocab}", max(ids))
    return await _fitted(service, ids, "prompt", asked.max_tokens, "max_tokens", usual=16)


async def chat_prompt(service: Service, asked: ChatRequest) -> Prompt:
    """The conversation as the model's template writes it, up to where the assistant begins.

    Raises:
        Refusal: the model has no template, or the template refuses the conversation; it is too long.
    """
    if asked.max_tokens is not None and asked.max_completion_tokens not in (None, asked.max_tokens):
        raise Refusal.wrong("max_tokens", "null beside max_completion_tokens", asked.max_tokens)
    tokenizer = service.cluster.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise Refusal(400, "messages: this model has no chat template; use /v1/completions", param="messages")
    turns = [{"role": _role(message), "content": _text(message)} for message in asked.messages]

    def render() -> list[int]:
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))

    try:
        ids = await service.tokenize(render)
    except Exception as error:  # a template is a program of the model's: whatever it raises is about the conversation
        wanted = "a conversation that the model's template takes"
        raise Refusal.wrong("messages", wanted, f"one that it refuses ({type(error).__name__})") from error
    return await _fitted(service, ids, "messages", asked.max_completion_tokens or asked.max_tokens, "max_tokens")


def sampling_of(service: Service, asked: Asked, prompt: Prompt) -> Any:
    """The engine's Sampling.

    Raises:
        Refusal: stop strings that are too many or too long.
    """
    from ringfa3.inference.sampling import Sampling

    stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    most, longest = service.limits.stops
    if len(stops) > most or any(len(stop) > longest for stop in stops):
        raise Refusal.wrong("stop", f"at most {most} strings of at most {longest} characters", "more")
    return Sampling(
        temperature=1.0 if asked.temperature is None else float(asked.temperature),
        top_k=asked.top_k or 0,
        top_p=1.0 if asked.top_p is None else float(asked.top_p),
        seed=asked.seed,
        max_tokens=prompt.max_tokens,
        stop=stops,
        stop_ids=tuple(asked.stop_token_ids or ()),
        ignore_eos=bool(asked.ignore_eos),
    )


async def _fitted(
    service: Service, ids: list[int], param: str, wanted: int | None, limit: str, *, usual: int = 1 << 20
) -> Prompt:
    """ids and the answer's length, both within the limits; wanted None: as usual, or as long as there is room."""
    limits = service.limits
    context = (await service.facts()).context
    if not ids:
        raise Refusal.wrong(param, "one token or more", "none")
    most = min(each for each in (limits.prompt_tokens, context and context - 1, 1 << 31) if each is not None)
    if len(ids) > most:
        raise Refusal.wrong(param, f"at most {most} tokens", len(ids), code="context_length_exceeded")
    room = min(each for each in (context and context - len(ids), limits.completion_tokens, 1 << 20) if each is not None)
    if wanted is not None and wanted > room:
        got = f"{wanted} after a prompt of {len(ids)}"
        raise Refusal.wrong(limit, f"at most {room} tokens", got, code="context_length_exceeded")
    return Prompt(ids, min(room, usual) if wanted is None else wanted)


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role  # OpenAI's newer name of the same


def _text(message: Message) -> str:
    parts = message.content
    return parts if isinstance(parts, str) else "".join(part.text for part in parts)
