"""Skills, talk and stories: right answers, and their way into tokens."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.demo.recipe.chats import WEIGHT_REASONING, WEIGHT_SKILL_ANSWER, ChatOptions, ChatWriter
from models.demo.recipe.dialogues import TALK, StoryBook, talk
from models.demo.recipe.prose import Chapter, Prose
from models.demo.recipe.sequences import SequenceMaker
from models.demo.recipe.skills import SKILL_NAMES, SkillItem, generate
from models.demo.recipe.vocabulary import BOS_ID, EOS_ID, Vocabulary
from router.prompt import PromptEncoder
from router.prompt.encoder import THINK_END

seeds = st.integers(0, 2**32)


def made(skill: str, seed: int) -> SkillItem:
    return generate(np.random.default_rng(seed), skill)


def question(item: SkillItem) -> str:
    return item.messages[-1]["content"]


@pytest.mark.parametrize("skill", SKILL_NAMES)
def test_a_skill_is_a_function_of_its_seed_and_says_its_name(skill: str) -> None:
    items = [made(skill, seed) for seed in range(20)]
    assert items == [made(skill, seed) for seed in range(20)]
    assert {item.skill for item in items} == {skill}
    assert len({question(item) for item in items}) > 5
    assert all(item.answer and item.reasoning for item in items)


@given(seed=seeds)
def test_sums_are_right(seed: int) -> None:
    for skill in ("sum", "two_sums"):
        item = made(skill, seed)
        numbers = [int(number) for number in re.findall(r"[+-]?\d+", question(item))]
        assert int(item.answer) == sum(numbers)
        assert item.reasoning.endswith(f"={item.answer}.")


@given(seed=seeds)
def test_comparisons_are_right(seed: int) -> None:
    item = made("compare", seed)
    left, right = (int(number) for number in re.findall(r"\d+", question(item)))
    larger = "larger" in question(item)
    if question(item).startswith("Is"):
        assert item.answer == ("Yes." if (left > right) == larger else "No.")
    else:
        assert int(item.answer) == (max(left, right) if larger else min(left, right))


@given(seed=seeds)
def test_counting_goes_from_the_first_to_the_last_number_by_one(seed: int) -> None:
    item = made("count", seed)
    first, last = (int(number) for number in re.findall(r"\d+", question(item)))
    step = 1 if last > first else -1
    assert ("down" in question(item)) == (step < 0)
    assert [int(number) for number in item.answer.split(", ")] == list(range(first, last + step, step))


@given(seed=seeds)
def test_words_letters_and_animals_are_counted_rightly(seed: int) -> None:
    words = made("count_words", seed)
    assert int(words.answer) == len(question(words).split('"')[1].split())
    letters = made("letters", seed)
    assert int(letters.answer) == len(re.findall(r"in (\w+)", question(letters))[0])
    animals = made("count_animals", seed)
    assert int(animals.answer) == question(animals).count(",") + 1


@given(seed=seeds)
def test_phrases_and_lists_come_back_as_they_were(seed: int) -> None:
    copy = made("copy", seed)
    assert copy.answer == question(copy).split('"')[1]
    spelled = made("spell", seed)
    assert spelled.answer.replace("-", "") in question(spelled)
    listed = made("reverse", seed)
    assert listed.answer.split(", ")[::-1] == question(listed).removeprefix("Reverse: ").rstrip(".").split(
        ", "
    )
    position = made("position", seed)
    things = question(position).rstrip("?").split(": ")[1].split(", ")
    assert position.answer == things[0 if "first" in question(position) else -1]


@given(seed=seeds)
def test_json_answers_hold_what_was_said(seed: int) -> None:
    item = made("json", seed)
    value = json.loads(item.answer)
    assert set(value) <= {"name", "animal", "age"}
    assert all(str(part) in question(item) for part in value.values())
    recall = made("recall", seed)
    asked = re.findall(r"Who is (\w+)\?", question(recall))[0]
    animal = re.findall(rf"Meet {asked} (\w+)\.", question(recall))[0]
    expected = {"name": asked, "animal": animal}
    if recall.answer.startswith("{"):
        assert json.loads(recall.answer) == expected
    else:
        assert recall.answer == f"That is {asked} {animal}."


def test_the_calendar_goes_round() -> None:
    known = {question(item): item.answer for item in (made("next", seed) for seed in range(600))}
    assert known["What comes after Sunday?"] == "Monday"
    assert known["What comes before January?"] == "December"
    assert known["What comes after 9?"] == "10"


def test_opposites_and_kinds_are_known_both_ways() -> None:
    opposites = {question(item): item.answer for item in (made("opposite", seed) for seed in range(300))}
    assert opposites["What is the opposite of hot?"] == "cold"
    assert opposites["What is the opposite of cold?"] == "hot"
    kinds = {question(item): item.answer for item in (made("kind", seed) for seed in range(600))}
    assert kinds["Is Anna a name or an animal?"] == "A name."
    assert kinds["Is Tiger a name or an animal?"] == "An animal."


def test_no_wording_of_talk_has_two_answers() -> None:
    wordings = [wording for wordings, _, _ in TALK for wording in wordings]
    assert len(set(wordings)) == len(wordings)
    item = talk(np.random.default_rng(0))
    assert any(question(item) in wordings and item.answer == answer for wordings, answer, _ in TALK)


def test_a_story_is_a_training_passage_and_a_continuation_goes_on_where_the_question_stopped() -> None:
    sentences = [f"Emma said word{number}." for number in range(60)]
    paragraphs = tuple(" ".join(sentences[start : start + 5]) for start in range(0, 60, 5))
    stories = StoryBook.build([Chapter(novel="x", number=1, paragraphs=paragraphs)])
    whole = "\n\n".join(paragraphs)
    seen: set[str] = set()
    for seed in range(60):
        item = stories.story(np.random.default_rng(seed))
        assert item.is_prose
        assert item.answer in whole
        assert item.answer.endswith(".")
        start, _, said = question(item).partition(": ")
        if said:
            assert f"{said} {item.answer}" in whole or f"{said}\n\n{item.answer}" in whole
        seen.add(start)
    assert {"Continue", "Tell me a story."} <= seen
    assert any("Emma" in wording for wording in seen)


def test_a_chat_is_what_the_router_sends_followed_by_the_answer(
    maker: SequenceMaker, vocabulary: Vocabulary
) -> None:
    encoder = PromptEncoder(tokenizer=vocabulary.tokenizer)
    first, second = made("copy", 1), made("sum", 2)
    system = ({"role": "system", "content": "Be brief."},)
    history = [*system, *first.messages, {"role": "assistant", "content": first.answer}, *second.messages]
    for thinking in (False, True):
        ids, weights = maker.chats.encode([first, second], thinking=thinking, system=system)
        prompt = encoder.encode_chat(history, thinking=thinking)
        reply = second.reasoning + THINK_END + second.answer if thinking else second.answer
        expected = np.concatenate([prompt.ids, vocabulary.encode(reply), [EOS_ID]])
        assert np.array_equal(ids, expected)
        assert len(weights) == len(ids)


def test_answers_and_their_ends_are_learned_and_the_mode_token_is_not(
    maker: SequenceMaker, vocabulary: Vocabulary
) -> None:
    item = made("copy", 3)
    ids, weights = maker.chats.encode([item, item], thinking=False)
    answered = vocabulary.decode(ids[weights == np.float32(WEIGHT_SKILL_ANSWER)])
    assert answered == f"{item.answer}<｜end▁of▁sentence｜>" * 2
    assert (weights[ids == vocabulary.think_end] == 0).all()
    ids, weights = maker.chats.encode([item, item], thinking=True)
    reasoned = vocabulary.decode(ids[weights == np.float32(WEIGHT_REASONING)])
    assert reasoned == item.reasoning + THINK_END


def test_what_needs_reasoning_is_always_last_and_reasoned(
    maker: SequenceMaker, vocabulary: Vocabulary
) -> None:
    options = ChatOptions(talk_share=0.0, story_share=0.0, thinking_share=0.0, num_turns_max=3)
    sums = re.compile(r"What is \d\+\d\+\d\?")
    found = 0
    for seed in range(150):
        ids, _ = maker.chats.chat(np.random.default_rng(seed), options)
        text = vocabulary.decode(ids)
        if sums.search(text):
            found += 1
            assert len(sums.findall(text)) == 1
            assert sums.search(text.rpartition("<｜User｜>")[2])
            assert "<think>" in text
    assert found


def test_a_sequence_of_chats_packs_whole_documents(maker: SequenceMaker, vocabulary: Vocabulary) -> None:
    sequence = maker.chats.sequence(np.random.default_rng(0), 900, ChatOptions())
    begins = np.flatnonzero(sequence.tokens == BOS_ID)
    assert begins[0] == 0
    assert len(begins) > 3
    assert (sequence.tokens[begins[1:] - 1] == EOS_ID).all()
    assert not sequence.answers.any()


def test_stories_come_from_training_chapters_only(vocabulary: Vocabulary, prose: Prose) -> None:
    writer = ChatWriter(vocabulary, StoryBook.build(prose.train))
    options = ChatOptions(talk_share=0.0, story_share=1.0)
    held = "\n\n".join(chapter.text for chapter in prose.heldout)
    for seed in range(50):
        item = writer.item(np.random.default_rng(seed), options)
        assert item.answer[:60] not in held
