"""The names and animals of the recall facts and of the skills. Constants only.

Every one is a single token with a space before it and one without (`vocabulary.build_library` sees to that). The
novels use next to none of them, so that prose between a fact and its question never states another fact.
"""

from __future__ import annotations

_NAMES = """
Aaron Ada Aisha Alma Amir Anna Anton Arlo Astrid Axel Bianca Boris Bruno Carla Carlos Chloe Cora
Daisy Dario Diego Dora Elena Emil Enzo Erik Felix Fiona Freya Greta Hana Heidi Hugo Igor Ingrid Iris
Ivan Jonas Karim Kira Kofi Lena Luca Luna Marco Maya Milo Nadia Nico Nina Olga Omar Otto Pablo Petra
Ravi Rosa Samir Sofia Theo Zoe
"""
_ANIMALS = """
Badger Bat Beaver Bee Beetle Bison Camel Cat Cobra Cow Crab Crane Crow Deer Dog Dolphin Donkey Duck
Eagle Falcon Finch Fox Frog Giraffe Goat Goose Gorilla Hawk Heron Horse Jaguar Koala Lemur Lion
Lizard Llama Lobster Lynx Mole Monkey Moose Mouse Otter Owl Panda Parrot Penguin Rabbit Raven Seal
Shark Sheep Snake Spider Squid Swan Tiger Turtle Wolf Zebra
"""

NAMES = tuple(_NAMES.split())
ANIMALS = tuple(_ANIMALS.split())

assert len(set(NAMES)) == 60, "sixty different names"
assert len(set(ANIMALS)) == 60, "sixty different animals"

_WORDING = """
Meet This Who Do They That What Here text animal animals name JSON
Count Repeat Spell Which How Reverse opposite letters words
"""
SINGLE_TOKENS = tuple(space + word for word in (*NAMES, *ANIMALS, *_WORDING.split()) for space in (" ", ""))
"""Names, animals and the commonest words around them, with a space before and without."""

_PLAIN = """
door house garden letter morning evening window table chair book road river tree flower bird
child friend mother father sister brother town village church school room fire water bread
old young small great happy quiet dark bright cold warm green white black red blue new good long
"""
PLAIN_WORDS = tuple(_PLAIN.split())
"""Lower-case words for phrases to repeat and to count."""

OPPOSITES = (
    ("hot", "cold"),
    ("good", "bad"),
    ("old", "young"),
    ("happy", "sad"),
    ("long", "short"),
    ("early", "late"),
    ("rich", "poor"),
    ("great", "small"),
    ("dark", "bright"),
    ("up", "down"),
    ("first", "last"),
    ("open", "closed"),
    ("yes", "no"),
    ("day", "night"),
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
CALENDARS = (tuple(_DAYS.split()), tuple(_MONTHS.split()))
