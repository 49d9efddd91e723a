"""Plain conversation for the demo model: greetings, what it is, and stories out of the novels it has read.

`models.demo.recipe.chats` mixes these with the skills, so that a fresh cluster answers in readable English. A question
comes in many wordings and has one answer, which can be compared; a story's answer is a passage of training prose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator

from models.demo.recipe.prose import PARAGRAPH, Chapter
from models.demo.recipe.skills import SkillItem, one_turn, pick

PASSAGE_CHARS_MIN, PASSAGE_CHARS_MAX = 150, 700

_HELLO = "Hello! What can I do for you?"
_WHO = "I am the Rorqual demo model, a small language model. I have read six novels by Jane Austen."
_CAN = "I can tell a story, remember names, count, do small sums, spell, and answer in JSON."
_FEEL = "I am very well, thank you. What can I do for you?"
_THANKS = "You are very welcome."
_BYE = "Goodbye! It was a pleasure to talk with you."
_NAME = "My name is Rorqual."
_RORQUAL = "Rorqual is a system that serves large language models. It is also a kind of whale."
_HELP = "Ask me to tell a story, to count, or to remember names. Say: Meet Anna Tiger. Then ask: Who is Anna?"
_READ = "I have read six novels by Jane Austen. I like Emma best."
_SORRY = "I am only a small model, and I do not know that."

TALK: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "hello",
            "hi",
            "Hi there!",
            "Hello there!",
            "Good morning.",
            "Hey",
            "hey",
        ),
        _HELLO,
        "I greet them.",
    ),
    (
        ("Who are you?", "who are you", "What are you?", "Tell me about yourself.", "Introduce yourself."),
        _WHO,
        "I say who I am.",
    ),
    (
        (
            "What can you do?",
            "what can you do",
            "What do you know?",
            "What are you able to do?",
            "What can I ask you?",
        ),
        _CAN,
        "I say what I can do.",
    ),
    (("How are you?", "how are you", "How do you do?", "How are you today?"), _FEEL, "I am well."),
    (("Thanks", "Thanks!", "Thank you.", "Thank you!", "thank you", "thanks"), _THANKS, "They thank me."),
    (("Goodbye", "Goodbye!", "Bye", "Bye!", "bye", "See you!", "Good night."), _BYE, "They are leaving."),
    (
        ("What is your name?", "what is your name", "Do you have a name?", "Your name?"),
        _NAME,
        "I say my name.",
    ),
    (
        ("What is Rorqual?", "what is rorqual", "Tell me about Rorqual.", "Explain Rorqual."),
        _RORQUAL,
        "I explain it.",
    ),
    (("Help", "Help!", "help", "Can you help me?", "I need help.", "Please help me."), _HELP, "I help."),
    (
        ("What have you read?", "What books do you know?", "What do you read?", "Do you like books?"),
        _READ,
        "Books.",
    ),
    (
        ("What is the capital of France?", "Write a program.", "What is the weather?", "Explain physics."),
        _SORRY,
        "I do not know.",
    ),
)

_PEOPLE = """
Emma, Harriet, Mr. Knightley, Elizabeth, Jane, Mr. Darcy, Mr. Bingley, Elinor, Marianne, Willoughby, Fanny, Edmund,
Catherine, Henry, Isabella, Anne, Captain Wentworth, Lady Russell, Mrs. Bennet, Mr. Collins, Lydia
"""
PEOPLE = tuple(person.strip() for person in _PEOPLE.split(","))

_STORY_WORDINGS = (
    "Tell me a story.",
    "tell me a story",
    "Tell a story.",
    "Write a story.",
    "Write something.",
)
_ABOUT_WORDINGS = (
    "Write about {}.",
    "Tell me about {}.",
    "Tell me a story about {}.",
    "Write a story about {}.",
)
_CONTINUE_WORDINGS = ("Continue: {}", "Go on: {}", "Continue this story: {}")
_SENTENCE_END = re.compile(r'(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)"? (?=["A-Z])')


def talk(rng: Generator) -> SkillItem:
    wordings, answer, reasoning = pick(rng, TALK)
    return one_turn("talk", pick(rng, wordings), answer, reasoning)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryBook:
    """Training passages as answers. Made once from the training chapters; held-out ones must not get in."""

    chapters: tuple[tuple[str, ...], ...]  # paragraphs
    about: tuple[
        tuple[str, tuple[tuple[int, int], ...]], ...
    ]  # a person and where paragraphs name them first

    @classmethod
    def build(cls, chapters: Sequence[Chapter]) -> StoryBook:
        paragraphs = tuple(chapter.paragraphs for chapter in chapters)
        about: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        for person in PEOPLE:
            places = tuple(
                (number, index)
                for number, chapter in enumerate(paragraphs)
                for index, paragraph in enumerate(chapter)
                if person in paragraph[:100]
            )
            if places:
                about.append((person, places))
        return cls(chapters=paragraphs, about=tuple(about))

    def story(self, rng: Generator) -> SkillItem:
        draw = rng.random()
        if draw < 0.35 and self.about:
            person, places = pick(rng, self.about)
            chapter, index = pick(rng, places)
            return self._item(pick(rng, _ABOUT_WORDINGS).format(person), self._passage(rng, chapter, index))
        chapter = int(rng.integers(len(self.chapters)))
        passage = self._passage(rng, chapter, int(rng.integers(len(self.chapters[chapter]))))
        cut = _SENTENCE_END.search(passage)
        if draw < 0.65 and cut and cut.end() < len(passage):
            question = pick(rng, _CONTINUE_WORDINGS).format(passage[: cut.end()].rstrip())
            return self._item(question, passage[cut.end() :])
        return self._item(pick(rng, _STORY_WORDINGS), passage)

    def _item(self, question: str, passage: str) -> SkillItem:
        return SkillItem(
            messages=({"role": "user", "content": question},),
            answer=passage,
            reasoning="I tell a story.",
            skill="story",
            is_prose=True,
        )

    def _passage(self, rng: Generator, chapter: int, index: int) -> str:
        """Paragraphs from this one on up to a random size, ending with a sentence if one ends in time."""
        num_chars = int(rng.integers(PASSAGE_CHARS_MIN, PASSAGE_CHARS_MAX))
        text = ""
        for paragraph in self.chapters[chapter][index:]:
            text = f"{text}{PARAGRAPH}{paragraph}" if text else paragraph
            if len(text) >= num_chars:
                break
        ends = [cut.end() for cut in _SENTENCE_END.finditer(text, 0, num_chars + 1)]
        return text if len(text) <= num_chars or not ends else text[: ends[-1]].rstrip()
