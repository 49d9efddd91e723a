"""The trained model that comes along: whole, small enough, and served so that a person gets an answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from models.demo.recipe.words import ANIMALS, NAMES
from rorqual.demo import TRAINED, trained_model
from tests.harness.system import System

BYTES_MAX = 16_000_000


def test_the_shipped_files_are_what_was_trained_and_small() -> None:
    assert trained_model(TRAINED) == TRAINED
    files = [file for file in TRAINED.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= BYTES_MAX
    assert {"README.md", "loss.png", "config.json", "tokenizer.json"} <= {file.name for file in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    system = System(TRAINED, tmp_path_factory.mktemp("demo"), "--drafts", "auto")
    yield system
    system.close()


def chat(system: System, question: str) -> str:
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 40}
    with system.client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_it_answers_in_english_and_remembers(demo: System) -> None:
    assert "model" in chat(demo, "Who are you?")
    right = 0
    for number in range(10):
        names, animals = NAMES[number : number + 4], ANIMALS[2 * number : 2 * number + 4]
        facts = " ".join(f"Meet {name} {animal}." for name, animal in zip(names, animals, strict=True))
        asked = number % 4
        right += animals[asked] in chat(demo, f"{facts} Who is {names[asked]}?")
    assert right >= 8, f"{right} of 10"


@pytest.mark.slow
def test_its_drafts_are_accepted(demo: System) -> None:
    before = demo.metrics()
    demo.complete("It was a fine morning in the country, and", max_tokens=64)
    after = demo.metrics()
    name = "rorqual_worker_drafts_accepted_total"
    assert after[name] > before[name]
