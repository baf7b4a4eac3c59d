"""What an Engine is asked with a real model, on CPUs and on GPUs: prompts together, then a conversation in turns."""

from __future__ import annotations

from collections.abc import Sequence

from ringfa3.inference import Engine, Event, Sampling

Said = list[tuple[list[int], list[int]]]  # prompts and what was answered


def talk(engine: Engine, batch: Sequence[list[int]], turns: Sequence[list[int]], sampling: Sampling) -> Said:
    """Prompts and answers, on rank 0. The engine is closed, its cache empty."""
    said = [(asked, list(each.tokens)) for asked, each in zip(batch, engine.generate(batch, sampling), strict=True)]
    held: list[int] = []
    for turn, more in enumerate(turns):
        events: list[Event] = []
        held = held + more
        engine.submit(held, sampling, session="talk", on_event=events.append)
        while engine.advance():
            pass
        assert (events[-1].cached_tokens > 0) == (turn > 0)
        said.append((held, [event.token for event in events if event.token is not None]))
        held = held + said[-1][1]
    engine.close_session("talk")
    engine.close()
    assert not any(engine.stats()["pages_used"])
    return said
