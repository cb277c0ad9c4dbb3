"""Where text ends, and the pieces that it is streamed in."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import PARROT_TEXT

from llmfast import LLM
from llmfast.inference.decoders import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


def greedy(llm: LLM, prompt, **settings):
    return llm.generate(prompt, temperature=0, **settings)


# --- where text ends --------------------------------------------------------------------------------------------------


def test_text_ends_at_end_of_text_which_is_left_out(parrot):
    assert greedy(parrot, "The ", max_new_tokens=64 - 4) == PARROT_TEXT
    stream = parrot.stream("The ", temperature=0, max_new_tokens=60)
    assert "".join(stream) == PARROT_TEXT[4:]
    assert stream.tokens == len(PARROT_TEXT.encode()) - 4 + 1  # with end-of-text itself


def test_text_ends_after_max_new_tokens(parrot):
    assert greedy(parrot, "The ", max_new_tokens=8) == "The ☃ said"  # three of the tokens are ☃


@pytest.mark.parametrize(
    "stop, end",
    [
        ("said", "The ☃ "),  # four tokens
        (["xyz", "naïve", "ok"], "The ☃ said: "),  # the first that comes
        ("ï", "The ☃ said: na"),  # one character of two tokens
        ("日本", "The ☃ said: naïve "),  # two characters of three tokens each
        ("本語, ", "The ☃ said: naïve 日"),
        (["e!", "Bye!"], PARROT_TEXT[:-4]),  # both complete with the same token: the earlier one counts
        ("saint", PARROT_TEXT),  # begins, but does not come
        ("Bye!?", PARROT_TEXT),  # held back until the very end
        (["T"], PARROT_TEXT),  # only in the prompt
        ([], PARROT_TEXT),
    ],
)
def test_text_ends_before_a_stop_string(parrot, stop, end):
    assert greedy(parrot, "The ", stop=stop) == end
    assert greedy(parrot, ["The ", "The ☃ s"], stop=stop)[0] == end
    pieces = list(parrot.stream("The ", temperature=0, stop=stop))
    assert "".join(pieces) == end[4:]


def test_the_stream_ends_with_the_stop_string_and_makes_no_more_tokens(parrot):
    stream = parrot.stream("The ", temperature=0, stop="said")
    assert "".join(stream) == "☃ "
    assert stream.tokens == len("☃ said".encode())
    with pytest.raises(StopIteration):
        next(stream)


def test_what_may_become_a_stop_string_is_held_back(parrot):
    pieces = list(parrot.stream("The ☃ ", temperature=0, stop="sailor"))
    assert pieces[0] == "said"  # not s, a, i
    assert "".join(pieces) == PARROT_TEXT[6:]


@pytest.mark.parametrize("stop", ["", ["ok", ""], [5], [None]])
def test_an_empty_stop_string_is_an_error(parrot, stop):
    with pytest.raises(ValueError, match="stop must be non-empty strings"):
        parrot.generate("x", stop=stop)
    with pytest.raises(ValueError, match="stop must be non-empty strings"):
        parrot.stream("x", stop=stop)


def test_stop_strings_with_ids_are_an_error(parrot):
    with pytest.raises(ValueError, match="stop strings need a text prompt"):
        parrot.generate(torch.tensor([1]), stop="x")


def test_a_character_cut_off_by_the_length_is_left_out(parrot):
    whole = parrot.generate(PARROT_TEXT[:4], len(PARROT_TEXT.encode()), temperature=0)
    for length in range(1, len(PARROT_TEXT.encode())):
        assert "\ufffd" not in parrot.generate(PARROT_TEXT[:4], length, temperature=0)
    assert "\ufffd" not in whole


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "T", "The ", "The ☃ said: na", "The ☃ said: naïve 日本語, ok "])
def test_pieces_are_whole_characters_and_together_what_generate_adds(parrot, prompt):
    pieces = list(parrot.stream(prompt, temperature=0))
    assert prompt + "".join(pieces) == greedy(parrot, prompt) == PARROT_TEXT
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(PARROT_TEXT) - len(prompt)  # a piece a character, as soon as it is whole


@pytest.mark.parametrize("seed", range(4))
def test_sampled_pieces_together_are_what_generate_adds(storyteller, seed):
    settings = {"temperature": 1.5, "seed": seed, "max_new_tokens": 40, "stop": ["e s", "."]}
    text = storyteller.generate("The", **settings)
    assert "The" + "".join(storyteller.stream("The", **settings)) == text


def test_a_character_cut_off_by_max_new_tokens_is_the_same_streamed_and_not(parrot):
    for n in range(1, 12):
        pieces = parrot.stream("The ", temperature=0, max_new_tokens=n)
        assert "The " + "".join(pieces) == greedy(parrot, "The ", max_new_tokens=n)


def test_arguments_are_checked_at_once_not_at_the_first_piece(parrot):
    for wrong in ({"temperature": -1}, {"max_new_tokens": -1}, {"seed": -1}, {"top_k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            parrot.stream("The ", **wrong)
    with pytest.raises(ValueError, match="context"):
        parrot.stream("x" * 99)


def test_pieces_come_while_the_text_is_made(parrot):
    stream = parrot.stream("The ", temperature=0)
    assert stream.tokens == 0
    assert next(stream) == "☃" and stream.tokens == 3
    assert next(stream) == " " and stream.tokens == 4


def test_a_stream_that_is_closed_ends_and_gives_its_decoder_back(storyteller, monkeypatch):
    closed = []
    gc.collect()  # streams that earlier tests left would close now
    monkeypatch.setattr(Decoder, "close", lambda self: closed.append(self))
    for begun in (0, 2):
        stream = storyteller.stream("Once upon a time", temperature=0, stop="zzz")
        pieces = [next(stream) for _ in range(begun)]
        stream.close()
        assert len(pieces) == begun and list(stream) == [] and stream.tokens <= 4
        stream.close()  # again, to no effect
    assert len(closed) == 1  # the other had not begun
    with storyteller.stream("Once upon a time", temperature=0) as stream:
        next(stream)
    assert list(stream) == [] and len(closed) == 2
    assert len(list(storyteller.stream("Once upon a time", temperature=0, max_new_tokens=3))) <= 3
    assert len(closed) == 3  # a text that ends does so too
