"""An answer as it grows: tokens in, events out, until it ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Set
from dataclasses import dataclass

from ringfa3.inference.events import Event, Finish
from ringfa3.inference.sampling import Sampling
from ringfa3.inference.schedule import Request
from ringfa3.inference.text import Transcript


@dataclass(eq=False)
class Answer:
    """What the leader keeps of a request, beside what the scheduler does.

    Args:
        request: the scheduler's; its tokens grow here.
        on_event: the caller's.
        since: when it was submitted, or got its last token; seconds.
    """

    request: Request
    sampling: Sampling
    generator: random.Random
    transcript: Transcript
    on_event: Callable[[Event], None]
    since: float

    @property
    def begun(self) -> bool:
        """Whether there is a token."""
        return len(self.request.tokens) > self.request.prompt

    def take(self, token: int, eos: Set[int]) -> Event:
        """Enter the next token, which may be the last.

        Args:
            eos: tokens that end it, unless the request ignores them.
        """
        request, sampling = self.request, self.sampling
        request.tokens.append(token)
        finish: Finish | None = None
        try:
            if token in sampling.stop_ids or (token in eos and not sampling.ignore_eos):
                finish, text = "stop", self.transcript.end()
            else:
                text = self.transcript.push(token)
                if self.transcript.stopped:
                    finish = "stop"
                elif len(request.tokens) - request.prompt == request.most:
                    finish, text = "length", text + self.transcript.end()
        except Exception as error:  # of somebody's tokenizer: the others' answers go on
            return self.event("error", token, error=f"its tokens cannot be decoded: {type(error).__name__}: {error}")
        return self.event(finish, token, text)

    def event(self, finish: Finish | None, token: int | None = None, text: str = "", error: str | None = None) -> Event:
        """An event of this moment."""
        request = self.request
        return Event(
            request=request.number,
            token=token,
            text=text,
            finish=finish,
            error=error,
            prompt_tokens=request.prompt,
            completion_tokens=len(request.tokens) - request.prompt,
            cached_tokens=request.cached or 0,
        )
