"""Incremental detokenising: the pieces join to what decoding everything at once gives, and each is final."""

from __future__ import annotations

import functools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from utils.text_tokenizers import SAMPLES, byte_level_metadata, sentencepiece_metadata

from pellucid.errors import InvalidRequestError
from pellucid.text.backend import SpecialTokens
from pellucid.text.detokenizer import IncrementalDetokenizer
from pellucid.text.tokenizer import Decoding, Tokenizer

TEXTS = st.one_of(st.sampled_from(SAMPLES), st.text(max_size=20), st.text("😀👩‍👧🇫🇷你é a\n", max_size=20))


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "byte_level":
        return Tokenizer.from_gguf(byte_level_metadata())
    if kind == "gemma":
        return Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))
    if kind == "metaspace":
        backend = Backend.from_str(str(Tokenizer.from_gguf(sentencepiece_metadata()).to_bundle()["tokenizer_json"]))
        backend.decoder = decoders.Metaspace()
        return Tokenizer(backend, SpecialTokens())
    return Tokenizer.from_gguf(sentencepiece_metadata())


KINDS = ("byte_level", "gemma", "llama")


@st.composite
def split_ids(draw: st.DrawFn, kind: str) -> list[list[int]]:
    """Token ids, random or of a text, cut anywhere into calls."""
    tokenizer = tokenizer_of(kind)
    ids = draw(
        st.one_of(
            st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30),
            st.lists(st.integers(0, 260), max_size=12),  # specials and bytes
            TEXTS.map(lambda text: tokenizer.encode(text)),
        )
    )
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_given_any_ids_when_split_anyhow_then_the_deltas_join_to_the_decoded_text(kind: str, skip: bool) -> None:
    tokenizer = tokenizer_of(kind)

    @settings(max_examples=300, deadline=None)
    @given(split_ids(kind))
    def check(calls: list[list[int]]) -> None:
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
        deltas = [detokenizer.add(ids) for ids in calls]
        assert detokenizer.text == "".join(deltas)
        whole = "".join(deltas) + detokenizer.flush()
        assert whole == tokenizer.decode([token_id for ids in calls for token_id in ids], skip)
        assert detokenizer.text == whole

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_given_real_text_when_streamed_by_token_then_no_replacement_character_appears(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for text in SAMPLES:
        if "\ufffd" in text or tokenizer.decode(tokenizer.encode(text)) != text:
            continue  # holds a special token, or a leading space that this vocabulary drops
        detokenizer = IncrementalDetokenizer(tokenizer)
        for token_id in tokenizer.encode(text):
            assert "\ufffd" not in detokenizer.add([token_id])
            assert text.startswith(detokenizer.text)
        detokenizer.flush()
        assert detokenizer.text == text


@pytest.mark.parametrize("kind", KINDS)
def test_given_a_prompt_when_a_text_is_continued_then_the_deltas_are_the_rest_of_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS, st.integers(0, 40))
    def check(text: str, cut: int) -> None:
        ids = tokenizer.encode(text)
        prompt, rest = ids[:cut], ids[cut:]
        detokenizer = IncrementalDetokenizer(tokenizer, prompt)
        continued = detokenizer.add(rest) + detokenizer.flush()
        whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
        if not before.endswith("\ufffd"):
            assert continued == whole[len(before) :]
        elif "\ufffd" not in whole:  # the prompt ended inside a character: the rest begins with all of it
            assert whole.endswith(continued)
            assert kind != "byte_level" or len(continued) == len(whole) - len(before.rstrip("\ufffd"))

    check()


def test_given_a_character_of_four_tokens_when_streamed_then_it_appears_with_the_last() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = [tokenizer.token_to_id(character) for character in "ðŁ§¿"]  # 🧿, byte by byte
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.add([token_id]) for token_id in ids] == ["", "", "", "\U0001f9ff"]


def test_given_an_incomplete_character_when_the_stream_ends_then_flush_gives_a_replacement() -> None:
    for kind, tokens in (("byte_level", "ðŁ"), ("llama", ("<0xF0>", "<0x9F>"))):
        tokenizer = tokenizer_of(kind)
        ids = [tokenizer.token_to_id(token) for token in tokens]
        detokenizer = IncrementalDetokenizer(tokenizer)
        assert detokenizer.add(ids) == ""
        assert detokenizer.flush() == tokenizer.decode(ids)
        assert set(detokenizer.text) == {"\ufffd"}


def test_given_sentencepiece_when_the_text_starts_then_one_space_is_cut_and_later_ones_stay() -> None:
    tokenizer = tokenizer_of("llama")
    the = tokenizer.encode("the", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.add(the) + detokenizer.add(the) == "the the"
    assert IncrementalDetokenizer(tokenizer, prompt_token_ids=the).add(the) == " the"
    assert IncrementalDetokenizer(tokenizer, prompt_token_ids=[1]).add(the) == "the"


def test_given_special_tokens_when_skipped_or_not_then_the_text_follows() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("a<|im_end|>b<think>")
    assert IncrementalDetokenizer(tokenizer).add(ids) == "ab<think>"
    assert IncrementalDetokenizer(tokenizer, skip_special_tokens=False).add(ids) == "a<|im_end|>b<think>"


@pytest.mark.parametrize("kind", [*KINDS, "metaspace"])
def test_given_ids_beyond_the_vocabulary_when_added_then_they_have_no_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("the fox", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.add([ids[0], 100_000, *ids[1:]]) + detokenizer.flush() == "the fox"
    with pytest.raises(InvalidRequestError, match=r"-1.*0\.\."):
        detokenizer.add([-1])


def test_given_another_decoder_when_streamed_then_the_window_gives_the_same_text() -> None:
    tokenizer = tokenizer_of("metaspace")
    assert tokenizer.decoding is Decoding.OTHER
    for text in ("The brown fox jumps over the dog", "we'll see"):
        ids = tokenizer.encode(text)
        detokenizer = IncrementalDetokenizer(tokenizer)
        deltas = [detokenizer.add([token_id]) for token_id in ids]
        assert "".join(deltas) + detokenizer.flush() == tokenizer.decode(ids) == text
        assert sum(map(bool, deltas)) > 1


def test_given_a_decoder_that_joins_with_spaces_when_streamed_then_the_text_is_whole() -> None:
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, "[UNK]")), SpecialTokens())
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(detokenizer.add([token_id]) for token_id in (0, 1, 1)) + detokenizer.flush() == "a b b"


@pytest.mark.parametrize("kind", KINDS)
def test_given_a_long_stream_when_timed_then_a_token_costs_microseconds(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(" ".join(SAMPLES)) * 40
    detokenizer = IncrementalDetokenizer(tokenizer)
    start = time.perf_counter()
    for token_id in ids:
        detokenizer.add([token_id])
    assert (time.perf_counter() - start) / len(ids) < 100e-6  # about 0.5 on an idle core
