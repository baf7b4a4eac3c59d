"""Text as it comes: whatever the tokens, it adds up to their text, never changes, and stop strings are never seen."""

from __future__ import annotations

from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ringfa3.inference.text import BROKEN, PATIENCE, StopStrings, Transcript

TEXT = "the quick brown fox, über die Brücke — 日本語のテキスト 🙂🙃 the the fox fox 日本 ni\u0308chts don't . , x"


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen and SmolLM have it: tokens are pieces of UTF-8, which may end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: words with a space before them, and bytes for what is no word."""
    words = ["▁", *dict.fromkeys(TEXT[:40].replace(" ", "")), "▁the", "▁fox", "qu", "▁qu", "ick"]
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "qu")]
    tokenizer = Tokenizer(models.BPE({**vocab}, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@cache
def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT has it: what a token's text is depends on whether one precedes it."""
    pieces = ["[UNK]", "[SEP]", "the", "fox", "##es", "##s", "quick", ",", ".", "##'", "don"]
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens([AddedToken("[SEP]", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


MAKERS = (byte_level, byte_fallback, word_pieces)
TOKENIZERS = pytest.mark.parametrize("maker", MAKERS)


def read(tokenizer, tokens) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def emitted(tokenizer, tokens, prompt=(), stop=()) -> list[str]:
    transcript = Transcript(tokenizer, prompt=prompt, stop=stop)
    return [*(transcript.push(token) for token in tokens), transcript.end()]


def test_the_tokenizers_are_what_they_are_meant_to_be():
    pieces = byte_level()("日本語 🙂")["input_ids"]
    assert read(byte_level(), pieces) == "日本語 🙂"
    assert any(read(byte_level(), [token]) == BROKEN for token in pieces)
    assert read(byte_fallback(), [2 + byte for byte in "é€".encode()]) == "é€"
    assert read(byte_fallback(), [2 + 0xC3, 2 + 0xA9, 2 + 0xE2]) == BROKEN * 3  # one bad byte spoils the others
    the, fox = (byte_fallback().convert_tokens_to_ids(piece) for piece in ("▁the", "▁fox"))
    assert read(byte_fallback(), [the, fox]) == "the fox"
    assert read(word_pieces(), [3, 4, 2]) == "foxes the"


@TOKENIZERS
@given(data=st.data())
@settings(max_examples=150)
def test_the_pieces_add_up_to_the_text(maker, data):
    tokenizer = maker()
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    parts = emitted(tokenizer, tokens)
    whole = read(tokenizer, tokens)
    if maker is not byte_fallback or BROKEN not in whole:
        assert "".join(parts) == whole
    else:  # broken bytes break whole ones before them, which may have been emitted
        letters = iter("".join(parts))
        assert all(letter in letters for letter in whole.replace(BROKEN, ""))
    assert not any(part.endswith(BROKEN) for part in parts[:-1]) or len(tokens) > PATIENCE


@TOKENIZERS
@given(data=st.data())
@settings(max_examples=60)
def test_what_answers_share_changes_none_of_them(maker, data):
    tokenizer, known = maker(), {}
    for _ in range(3):
        tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
        transcript = Transcript(tokenizer, prompt=tokens[:2], known=known)
        parts = [*(transcript.push(token) for token in tokens), transcript.end()]
        assert parts == emitted(tokenizer, tokens, tokens[:2])
    assert all(read(tokenizer, [token]) == text for token, text in known.items())


@given(text=st.text(max_size=60), before=st.text(max_size=20))
@settings(max_examples=200)
@example(text="🙂🙂🙂🙂🙂🙂", before="日")
def test_any_text_comes_through_whole_characters_only(text, before):
    tokenizer = byte_level()
    tokens, prompt = tokenizer(text)["input_ids"], tokenizer(before)["input_ids"]
    parts = emitted(tokenizer, tokens, prompt)
    assert "".join(parts) == text
    if BROKEN not in text:
        assert not any(BROKEN in part for part in parts)


def test_spaces_at_the_beginning():
    tokenizer = byte_fallback()
    space, ick = tokenizer.convert_tokens_to_ids(["▁", "ick"])
    for tokens in ([space, ick], [2 + 0x20, space, ick], [space, tokenizer.eos_token_id, space, ick]):
        assert "".join(emitted(tokenizer, tokens)) == read(tokenizer, tokens)


def test_a_character_is_withheld_until_its_last_byte():
    tokenizer = byte_fallback()
    tokens = [2 + byte for byte in "a€".encode()]
    assert emitted(tokenizer, tokens) == ["a", "", "", "€", ""]
    assert emitted(tokenizer, tokens[:-1]) == ["a", "", "", BROKEN * 2]
    bytes_ = byte_level().convert_tokens_to_ids(list("aðŁĻĤ"))  # as its alphabet writes a and the 4 bytes of 🙂
    assert emitted(byte_level(), bytes_) == ["a", "", "", "", "🙂", ""]
    assert emitted(byte_level(), bytes_[2:], prompt=bytes_[:2]) == ["", "", "🙂", ""]  # begun by the prompt


def test_the_answer_goes_on_from_the_prompt():
    the, fox, s = (byte_fallback().convert_tokens_to_ids(piece) for piece in ("▁the", "▁fox", "s"))
    assert emitted(byte_fallback(), [fox, s] if s else [fox], prompt=[the])[0] == " fox"
    assert emitted(byte_fallback(), [fox])[0] == "fox"
    assert "".join(emitted(word_pieces(), [4, 2], prompt=[2, 3])) == "es the"


def test_special_tokens_have_no_text_and_cost_nothing():
    tokenizer = byte_fallback()
    the, fox = (tokenizer.convert_tokens_to_ids(piece) for piece in ("▁the", "▁fox"))
    transcript = Transcript(tokenizer)
    assert transcript.push(the) == "the"
    for _ in range(1000):
        assert transcript.push(tokenizer.eos_token_id) == ""
    assert len(transcript._tokens) < 2 * PATIENCE
    assert transcript.push(fox) == " fox"


def test_who_never_completes_a_character_is_not_waited_for():
    """2,000 broken bytes: the text comes in time, and nothing grows; then all is well again."""
    tokenizer = byte_level()
    broken, a = tokenizer.convert_tokens_to_ids(["Ģ", "a"])  # 0x80, which begins nothing
    transcript = Transcript(tokenizer)
    parts = []
    for _ in range(2000):
        parts.append(transcript.push(broken))
        assert len(transcript._tokens) <= 2 * PATIENCE
    assert len("".join(parts)) > 1900
    smile = tokenizer.convert_tokens_to_ids(list("ðŁĻĤ"))
    parts += [transcript.push(token) for token in [*smile, a]]
    assert "".join(parts) == BROKEN * 2000 + "🙂a"


def brute(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the text before the stop string that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


FEW = st.text(alphabet="ab", min_size=1, max_size=5)


@given(pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=12), stops=st.lists(FEW, max_size=3))
@settings(max_examples=500)
@example(pieces=["a", "b", "a", "b", "b"], stops=["abb"])
@example(pieces=["abc"], stops=["abcd", "b"])
def test_stop_strings_are_cut_however_the_text_comes(pieces, stops):
    wanted, hit = brute("".join(pieces), stops)
    stream = StopStrings(stops)
    shown, so_far = "", ""
    for piece in pieces:
        so_far += piece
        shown += stream.push(piece)
        assert wanted.startswith(shown)
        if stream.hit is None:  # no more is withheld than what a stop string may begin with
            held = so_far[len(shown) :]
            assert so_far.startswith(shown)
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    if stream.hit is None:
        shown += stream.end()
    assert (shown, stream.hit) == (wanted, hit)
    assert stream.push("more") == "" if hit else True


def test_stop_strings_over_tokens_and_characters():
    tokenizer = byte_level()
    tokens = tokenizer("the fox 🙂 and the end")["input_ids"]
    for stop, wanted in (("🙂 a", "the fox "), ("x 🙂", "the fo"), ("the e", "the fox 🙂 and "), ("nowhere", None)):
        transcript = Transcript(tokenizer, stop=(stop,))
        shown = ""
        for token in tokens:
            shown += transcript.push(token)
            assert stop not in shown
            if transcript.stopped:
                break
        assert transcript.stopped == (wanted is not None)
        assert transcript.push(tokens[0]) == "" or wanted is None
        assert shown == wanted or wanted is None


def test_wrong_arguments():
    for stop in ("text", ("a", ""), (1,)):
        with pytest.raises(ValueError, match="stop: wanted strings that are not empty, got"):
            StopStrings(stop)
    with pytest.raises(ValueError, match="stop: wanted no strings where there is no tokenizer"):
        Transcript(None, stop=("a",))
    silent = Transcript(None, prompt=[1])
    assert (silent.push(3), silent.end(), silent.stopped) == ("", "", False)
