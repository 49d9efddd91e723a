"""The training stream as a whole, prose windows, and what held-out text is measured on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.demo.recipe.corpus import build_corpus, heldout_windows
from models.demo.recipe.prose import Chapter, Prose
from models.demo.recipe.sequences import Mixture, SequenceMaker, StreamOptions
from models.demo.recipe.tape import Tape, TrainSequence
from models.demo.recipe.vocabulary import BOS_ID, EOS_ID, PAD_ID, Vocabulary, build_vocabulary

PROSE_ONLY = Mixture(recall=0, prose=1, skills=0)


def first(maker: SequenceMaker, count: int, *, seed: int, options: StreamOptions) -> list[TrainSequence]:
    return [maker.sequence(seed=seed, index=index, options=options) for index in range(count)]


@given(seed=st.integers(0, 2**31), index=st.integers(0, 2**31), length=st.sampled_from([64, 257]))
def test_an_element_depends_on_seed_and_index_alone(
    maker: SequenceMaker, vocabulary: Vocabulary, prose: Prose, seed: int, index: int, length: int
) -> None:
    options = StreamOptions(length=length)
    one = maker.sequence(seed=seed, index=index, options=options)
    maker.sequence(seed=seed, index=index + 1, options=options)
    again = maker.sequence(seed=seed, index=index, options=options)
    assert one.kind == again.kind
    for name in ("tokens", "weights", "distances"):
        assert np.array_equal(getattr(one, name), getattr(again, name)), name


def test_another_process_would_make_the_same_stream(
    maker: SequenceMaker, vocabulary: Vocabulary, prose: Prose
) -> None:
    other = SequenceMaker.from_prose(Vocabulary(vocabulary.library), prose)
    options = StreamOptions(length=128)
    one = first(maker, 20, seed=4, options=options)
    two = first(other, 20, seed=4, options=options)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))


def test_seeds_give_different_streams(maker: SequenceMaker) -> None:
    options = StreamOptions(length=96)
    one, two = (maker.sequence(seed=seed, index=0, options=options).tokens for seed in (1, 2))
    assert not np.array_equal(one, two)


def test_every_element_is_full_begins_with_bos_and_never_trains_its_first_token(maker: SequenceMaker) -> None:
    for item in first(maker, 100, seed=2, options=StreamOptions(length=200)):
        assert item.tokens.dtype == np.int64
        assert item.weights.dtype == np.float32
        assert len(item.tokens) == len(item.weights) == 200
        assert item.tokens[0] == BOS_ID
        assert item.weights[0] == 0
        assert (item.weights[item.tokens == BOS_ID] == 0).all()
        assert PAD_ID not in item.tokens
        assert item.tokens.max() < maker.vocabulary.size


def test_the_mixture_is_kept(maker: SequenceMaker) -> None:
    options = StreamOptions(length=64, mixture=Mixture(recall=2, prose=1, skills=1))
    kinds = [item.kind for item in first(maker, 400, seed=3, options=options)]
    shares = {kind: kinds.count(kind) / 400 for kind in ("recall", "prose", "skills")}
    assert shares == pytest.approx({"recall": 0.5, "prose": 0.25, "skills": 0.25}, abs=0.08)
    assert all(kind == "prose" for kind in _kinds(maker, PROSE_ONLY))


def _kinds(maker: SequenceMaker, mixture: Mixture) -> list[str]:
    options = StreamOptions(length=64, mixture=mixture)
    return [item.kind for item in first(maker, 50, seed=3, options=options)]


def test_prose_begins_with_a_paragraph_and_chapters_are_separate_documents(
    maker: SequenceMaker, prose: Prose
) -> None:
    paragraphs = {text[:12] for chapter in prose.train for text in chapter.paragraphs}
    for index in range(30):
        item = maker.sequence(seed=5, index=index, options=StreamOptions(length=3000, mixture=PROSE_ONLY))
        assert maker.vocabulary.decode(item.tokens[1:40])[:12] in paragraphs
        ends = np.flatnonzero(item.tokens[:-1] == EOS_ID)
        assert len(ends), "three thousand tokens are more than a made chapter"
        assert (item.tokens[ends + 1] == BOS_ID).all()
        assert (item.weights[ends] == 1).all()


def test_nothing_held_out_gets_into_the_stream(maker: SequenceMaker, prose: Prose) -> None:
    held = {text for chapter in prose.heldout for text in chapter.paragraphs}
    heldout_sentences = {
        f" {sentence}." for text in held for sentence in text.split(". ") if len(sentence) > 40
    }
    seen = maker.vocabulary.decode(maker.corpus.flow)
    assert heldout_sentences
    assert not any(sentence in seen for sentence in heldout_sentences)


def test_filler_is_whole_sentences(maker: SequenceMaker) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = maker.vocabulary.decode(maker.corpus.sentences(rng, 120))
        assert text.startswith(" ")
        assert text[1].isupper()
        assert text.endswith(".")


def test_filler_of_an_exact_size_is_whole_sentences_too(maker: SequenceMaker) -> None:
    for num_tokens in (40, 333):
        ids = maker.corpus.sentences_exactly(np.random.default_rng(num_tokens), num_tokens)
        assert len(ids) == num_tokens
        assert maker.vocabulary.decode(ids).endswith(".")


def test_heldout_windows_count_the_bytes_of_their_own_text(vocabulary: Vocabulary, prose: Prose) -> None:
    windows = heldout_windows(vocabulary, prose.heldout, 100)
    assert len(windows) > 10
    for window in windows:
        assert len(window.tokens) == 100
        assert window.tokens[0] == BOS_ID
        assert len(vocabulary.decode(window.tokens[1:]).encode()) == window.num_bytes
    # The windows of a chapter join without a gap; only a rest shorter than one is left out.
    chapter = vocabulary.encode(prose.heldout[0].text)
    count = len(chapter) // 99
    joined = np.concatenate([window.tokens[1:] for window in windows[:count]])
    assert np.array_equal(joined, chapter[: count * 99])


def test_fewer_windows_are_taken_from_all_chapters(vocabulary: Vocabulary, prose: Prose) -> None:
    every = heldout_windows(vocabulary, prose.heldout, 100)
    few = heldout_windows(vocabulary, prose.heldout, 100, num_windows_max=5)
    places = [
        next(i for i, other in enumerate(every) if np.array_equal(other.tokens, item.tokens)) for item in few
    ]
    assert len(places) == 5
    assert places == sorted(set(places))
    assert places[-1] >= len(every) * 0.7


def test_a_title_ends_no_sentence() -> None:
    text = "It was Mr. Darcy. She saw Mrs. Bennet! He left."
    vocabulary = build_vocabulary([text] * 500, size=400, words=())
    corpus = build_corpus(vocabulary, [Chapter(novel="x", number=1, paragraphs=(text,))])
    begins = [vocabulary.decode(corpus.flow[start:])[:5] for start in corpus.sentence_starts]
    assert begins == [" She ", " He l"]


def test_a_tape_cuts_off_what_does_not_fit() -> None:
    tape = Tape(4)
    tape.put(np.array([7, 8, 9]), 1.0)
    tape.put(np.array([5, 6]), np.array([0.5, 0.25], dtype=np.float32))
    tape.put_one(3, 1.0)
    sequence = tape.finish("prose")
    assert sequence.tokens.tolist() == [7, 8, 9, 5]
    assert sequence.weights.tolist() == [0.0, 1.0, 1.0, 0.5]
