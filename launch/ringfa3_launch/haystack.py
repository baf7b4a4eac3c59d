"""A real long text with a question hidden in it: prose about Python, and one sentence that is not from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACT = "The password of the lighthouse keeper is BLUE HERON 4172."
QUESTION = "What is the password of the lighthouse keeper?"
ANSWER = "4172"
DEPTH = 0.35  # where in the text the fact stands
FIRST = ("objects", "execmodel", "types", "naming", "import", "numeric-types")  # the reference's chapters of most prose


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Args:
        ids: token ids of the whole prompt.
        place: index of the fact's first token.
        question: what it ends with.
        answer: what a right answer contains.
    """

    ids: list[int]
    place: int
    question: str = QUESTION
    answer: str = ANSWER

    def answered_by(self, text: str) -> bool:
        return self.answer in text


def document(file: str | None = None) -> list[str]:
    """Paragraphs of a UTF-8 text file; None: the prose of Python's language reference, which CPython carries along.

    The reference differs a little from one Python version to the next.

    Raises:
        ValueError: the file cannot be read, or this Python came without its reference.
    """
    if file is not None:
        try:
            text = Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text: wanted a text file in UTF-8, got {file!r} ({error})") from error
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
        if not paragraphs:
            raise ValueError(f"--text: wanted a text, got the empty file {file!r}")
        return paragraphs
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("--text: wanted a FILE, as this Python comes without pydoc_data to read, got none") from error
    names = [*FIRST, *sorted(topics)]
    return list(dict.fromkeys(p for name in names for p in _prose(topics.get(name, ""))))  # topics overlap


def prompt(tokenizer: Any, tokens: int, paragraphs: list[str]) -> Prompt:
    """As many paragraphs as fit into `tokens` tokens with the fact among them and the question after them.

    Raises:
        ValueError: not one paragraph fits with the question, or there are too few, or the answer is in them already.
    """
    bare, _ = _encode(tokenizer, [FACT])
    lengths = [len(ids) for ids in tokenizer([p + "\n\n" for p in paragraphs], add_special_tokens=False)["input_ids"]]
    if sum(lengths) + len(bare) < tokens:
        most = sum(lengths) + len(bare)
        raise ValueError(f"--tokens: wanted at most {most}, the whole text (--text FILE reads another), got {tokens}")
    least = len(bare) + lengths[0]
    if least > tokens:
        raise ValueError(f"--tokens: wanted at least {least}, for the first paragraph and the question, got {tokens}")
    kept = 0
    room = tokens - len(bare)
    while kept < len(lengths) and room >= lengths[kept]:
        room -= lengths[kept]
        kept += 1
    if any(ANSWER in p for p in paragraphs[:kept]):
        raise ValueError(f"--text: wanted a text without {ANSWER!r}, which is to be found in it, got one with it")
    while True:  # paragraphs may cost a token more together than alone
        before = int(kept * DEPTH)
        ids, place = _encode(tokenizer, [*paragraphs[:before], FACT, *paragraphs[before:kept]])
        if len(ids) <= tokens:
            return Prompt(ids, place)
        kept -= 1


def _prose(text: str) -> Iterator[str]:
    """A topic's full sentences, a paragraph each: no headings, lists, grammar or code."""
    for block in text.split("\n\n"):
        lines = block.strip("\n").splitlines()
        paragraph = " ".join(lines)
        sentences = paragraph[:1].isupper() and paragraph.endswith(".")
        if (
            sentences and len(paragraph) > 100 and not any(line.startswith(" ") for line in lines)
        ):  # short: leads to code
            yield paragraph


def _encode(tokenizer: Any, paragraphs: list[str]) -> tuple[list[int], int]:
    """Token ids of the prompt with these paragraphs, and where the fact begins in them."""
    content = "\n\n".join(paragraphs) + f"\n\nQuestion: {QUESTION}"
    text = f"{content}\nAnswer:"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, len(tokenizer(text[: text.index(FACT)], add_special_tokens=False)["input_ids"])
