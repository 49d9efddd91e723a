"""Small tasks with exact answers, as chats: what the demo model can be asked so that anyone sees whether it is right.

`models.demo.recipe.chats` turns items into tokens, and `models.demo.train` asks a trained model and compares. An item
is a pure function of the generator passed. Nothing here knows tokens or the prompt format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.random import Generator

from models.demo.recipe.words import ANIMALS, CALENDARS, NAMES, OPPOSITES, PLAIN_WORDS

Message = Mapping[str, Any]
Choice = TypeVar("Choice")

NUMBER_MAX = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillItem:
    """A client's `messages` and the one right `answer` to them; in thinking mode `reasoning` comes before it."""

    messages: tuple[Message, ...]
    answer: str
    reasoning: str
    skill: str
    thinking_only: bool = False  # the answer is out of reach without the reasoning
    is_prose: bool = (
        False  # the answer is a passage of the novels: to be learned as prose, not to be compared
    )


def generate(rng: Generator, skill: str | None = None) -> SkillItem:
    """An item of the named skill, or of any. Raises KeyError for a name not in SKILLS."""
    return SKILLS[pick(rng, SKILL_NAMES) if skill is None else skill](rng)


def pick(rng: Generator, choices: Sequence[Choice]) -> Choice:
    return choices[int(rng.integers(len(choices)))]


def one_turn(
    skill: str, question: str, answer: str, reasoning: str, *, thinking_only: bool = False
) -> SkillItem:
    return SkillItem(
        messages=({"role": "user", "content": question},),
        answer=answer,
        reasoning=reasoning,
        skill=skill,
        thinking_only=thinking_only,
    )


def _copy(rng: Generator) -> SkillItem:
    phrase = _phrase(rng, 2, 8)
    question = pick(rng, ('Repeat "{}".', 'Say "{}".', 'Repeat this: "{}".', 'Please repeat "{}".'))
    return one_turn("copy", question.format(phrase), phrase, "I repeat the words.")


def _count(rng: Generator) -> SkillItem:
    first, steps = _number(rng, 0, 20), _number(rng, 2, 8)
    numbers = list(range(first, first + steps + 1))
    down = rng.random() < 0.5
    if down:
        numbers.reverse()
    question = pick(rng, ("Count{} from {} to {}.", "Please count{} from {} to {}."))
    return one_turn(
        "count",
        question.format(" down" if down else "", numbers[0], numbers[-1]),
        ", ".join(str(number) for number in numbers),
        f"I start with {numbers[0]} and stop at {numbers[-1]}.",
    )


def _count_words(rng: Generator) -> SkillItem:
    phrase = _phrase(rng, 1, 7)
    words = phrase.split()
    question = pick(rng, ('How many words are in "{}"?', 'Count the words in "{}".'))
    reasoning = ", ".join(f"{word} {number}" for number, word in enumerate(words, start=1)) + "."
    return one_turn("count_words", question.format(phrase), str(len(words)), reasoning)


def _count_animals(rng: Generator) -> SkillItem:
    animals = _several(rng, ANIMALS, _number(rng, 1, 6))
    reasoning = ", ".join(f"{animal} {number}" for number, animal in enumerate(animals, start=1)) + "."
    return one_turn(
        "count_animals", f"How many animals are these: {', '.join(animals)}?", str(len(animals)), reasoning
    )


def _letters(rng: Generator) -> SkillItem:
    word = pick(rng, NAMES + ANIMALS)
    question = pick(rng, ("How many letters are in {}?", "Count the letters in {}."))
    reasoning = f"{'-'.join(word)} has {len(word)} letters."
    return one_turn("letters", question.format(word), str(len(word)), reasoning)


def _spell(rng: Generator) -> SkillItem:
    word = pick(rng, NAMES + ANIMALS)
    question = pick(rng, ("Spell {}.", "How do you spell {}?"))
    return one_turn("spell", question.format(word), "-".join(word), f"I write the letters of {word}.")


def _sum(rng: Generator) -> SkillItem:
    left, right = _number(rng, 0, 12), _number(rng, 0, 12)
    if rng.random() < 0.5:
        left, right = max(left, right), min(left, right)
        task, result = f"{left}-{right}", left - right
    else:
        task, result = f"{left}+{right}", left + right
    question = pick(rng, ("What is {}?", "How much is {}?", "{}=?"))
    return one_turn("sum", question.format(task), str(result), f"{task}={result}.")


def _two_sums(rng: Generator) -> SkillItem:
    one, two, three = (_number(rng, 1, 9) for _ in range(3))
    reasoning = f"{one}+{two}={one + two}. {one + two}+{three}={one + two + three}."
    question = f"What is {one}+{two}+{three}?"
    return one_turn("two_sums", question, str(one + two + three), reasoning, thinking_only=True)


def _compare(rng: Generator) -> SkillItem:
    left, right = (int(number) for number in rng.permutation(NUMBER_MAX)[:2])
    word = pick(rng, ("larger", "smaller"))
    right_one = max(left, right) if word == "larger" else min(left, right)
    relation = f"{left} is {'larger' if left > right else 'smaller'} than {right}."
    if rng.random() < 0.5:
        return one_turn("compare", f"Which is {word}, {left} or {right}?", str(right_one), relation)
    answer = "Yes." if right_one == left else "No."
    return one_turn("compare", f"Is {left} {word} than {right}?", answer, relation)


def _json(rng: Generator) -> SkillItem:
    name, animal = pick(rng, NAMES), pick(rng, ANIMALS)
    owned = f"{'an' if animal[0] in 'AEIOU' else 'a'} {animal}"
    if rng.random() < 0.5:
        said, value = f"{name} has {owned}.", {"name": name, "animal": animal}
    else:
        age = _number(rng, 1, 99)
        said = f"{name} is {age} and has {owned}."
        value = {"name": name, "animal": animal, "age": age}
    question = pick(rng, ("Answer in JSON: {}", "{} Write this as JSON.", "Write this as JSON: {}"))
    return one_turn("json", question.format(said), json.dumps(value), f"The name is {name}.")


def _recall(rng: Generator) -> SkillItem:
    """Recall without filler, so that thinking mode and JSON know such facts too."""
    names, animals = _several(rng, NAMES, 3), _several(rng, ANIMALS, 3)
    number = _number(rng, 0, 2)
    name, animal = names[number], animals[number]
    said = " ".join(f"Meet {each} {other}." for each, other in zip(names, animals, strict=True))
    reasoning = f"I look for {name}. It says {name} {animal}."
    if rng.random() < 0.3:
        answer = json.dumps({"name": name, "animal": animal})
        return one_turn("recall", f"{said} Who is {name}? Answer in JSON.", answer, reasoning)
    return one_turn("recall", f"{said} Who is {name}?", f"That is {name} {animal}.", reasoning)


def _position(rng: Generator) -> SkillItem:
    things = _several(rng, pick(rng, (NAMES, ANIMALS)), _number(rng, 2, 5))
    word, thing = pick(rng, (("first", things[0]), ("last", things[-1])))
    question = f"Which comes {word}: {', '.join(things)}?"
    return one_turn("position", question, thing, f"The {word} is {thing}.")


def _reverse(rng: Generator) -> SkillItem:
    things = _several(rng, pick(rng, (NAMES, ANIMALS)), _number(rng, 2, 4))
    answer = ", ".join(reversed(things))
    return one_turn("reverse", f"Reverse: {', '.join(things)}.", answer, f"I start with {things[-1]}.")


def _next(rng: Generator) -> SkillItem:
    if rng.random() < 0.4:
        number = _number(rng, 1, NUMBER_MAX)
        before, here, after = str(number - 1), str(number), str(number + 1)
    else:
        calendar = pick(rng, CALENDARS)
        index = _number(rng, 0, len(calendar) - 1)
        before, here, after = calendar[index - 1], calendar[index], calendar[(index + 1) % len(calendar)]
    word, answer = pick(rng, (("before", before), ("after", after)))
    reasoning = f"The order is {before}, {here}, {after}."
    return one_turn("next", f"What comes {word} {here}?", answer, reasoning)


def _opposite(rng: Generator) -> SkillItem:
    one, other = pick(rng, OPPOSITES)
    if rng.random() < 0.5:
        one, other = other, one
    question = f"What is the opposite of {one}?"
    return one_turn("opposite", question, other, f"{one.capitalize()} and {other}.")


def _kind(rng: Generator) -> SkillItem:
    name, animal = pick(rng, NAMES), pick(rng, ANIMALS)
    word, answer = pick(rng, ((name, "A name."), (animal, "An animal.")))
    return one_turn("kind", f"Is {word} a name or an animal?", answer, f"I know {word}.")


SKILLS: Mapping[str, Callable[[Generator], SkillItem]] = {
    "copy": _copy,
    "count": _count,
    "count_words": _count_words,
    "count_animals": _count_animals,
    "letters": _letters,
    "spell": _spell,
    "sum": _sum,
    "two_sums": _two_sums,
    "compare": _compare,
    "json": _json,
    "recall": _recall,
    "position": _position,
    "reverse": _reverse,
    "next": _next,
    "opposite": _opposite,
    "kind": _kind,
}
SKILL_NAMES = tuple(SKILLS)


def _number(rng: Generator, least: int, most: int) -> int:
    return int(rng.integers(least, most + 1))


def _several(rng: Generator, choices: Sequence[str], count: int) -> list[str]:
    """Different ones."""
    return [choices[int(index)] for index in rng.choice(len(choices), count, replace=False)]


def _phrase(rng: Generator, least: int, most: int) -> str:
    return " ".join(pick(rng, PLAIN_WORDS) for _ in range(_number(rng, least, most)))
