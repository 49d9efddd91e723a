"""What a real system answers, token by token, against a model that computes one token at a time in another way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.reader import open_checkpoint
from tests.harness.system import IDS_CONFIG, System, scrape
from tests.reference.deepseek_v4 import ReferenceModel

pytestmark = pytest.mark.minutes

LOGPROB_TOLERANCE = 1e-3
LENGTHS = (1, 3, 4, 60, 130, 262)
NUM_TOKENS = 12
NUM_OTHERS = 30


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A greedy run of the reference: its tokens, and log-probabilities [N + count, V] after every token."""

    tokens: list[int]
    logprobs: torch.Tensor


Reference = Callable[[int], Run]


@pytest.fixture(scope="module")
def reference(ids_model: Path) -> Reference:
    """The reference's answer to `a_prompt(length)`, computed once."""
    checkpoint = open_checkpoint(ids_model)
    tensors = dict(checkpoint.tensors())
    runs: dict[int, Run] = {}

    def run(length: int) -> Run:
        if length not in runs:
            model = ReferenceModel(checkpoint.config, tensors, "float32")
            rows = [model.step(token) for token in a_prompt(length)]
            tokens: list[int] = []
            while len(tokens) < NUM_TOKENS:
                tokens.append(int(rows[-1].argmax()))
                rows.append(model.step(tokens[-1]))
            runs[length] = Run(tokens=tokens, logprobs=torch.stack(rows).log_softmax(-1))
        return runs[length]

    return run


@pytest.fixture(scope="module")
def plain(ids_model: Path, start_system: Any) -> System:
    """As a person starts it, with a prefill and a decode worker, but with the smallest prefill steps."""
    return start_system(ids_model, "--prefill-tokens", "256")


@pytest.fixture(scope="module")
def pressed(ids_model: Path, start_system: Any) -> System:
    """Exact, and with pages for no more than two of the longer sequences at once."""
    options = ("--both", "1", "--pages", "4", "--slots", "4", "--prefill-tokens", "256")
    return start_system(ids_model, "--exact", *options)


@pytest.fixture(scope="module")
def exact_pair(ids_model: Path, start_system: Any) -> System:
    return start_system(ids_model, "--exact", "--both", "2")


def a_prompt(length: int, *, seed: int = 0) -> list[int]:
    draw = random.Random(1000 * seed + length)
    return [draw.randrange(2, IDS_CONFIG["vocab_size"]) for _ in range(length)]


def assert_equals(answer: dict[str, Any], run: Run, prompt: list[int]) -> None:
    """Tokens, and the log-probability of every token after the first, the prompt's too."""
    (choice,) = answer["choices"]
    assert choice["token_ids"] == run.tokens
    known = torch.tensor(prompt + run.tokens)
    wanted = run.logprobs[:-1].gather(1, known[1:, None]).flatten()
    first, *rest = choice["logprobs"]["token_logprobs"]
    assert first is None
    torch.testing.assert_close(torch.tensor(rest), wanted, atol=LOGPROB_TOLERANCE, rtol=0)
    for row, named in zip(run.logprobs[:-1], choice["logprobs"]["top_logprobs"][1:], strict=True):
        for name, logprob in named.items():
            assert abs(float(row[int(name.removeprefix("token_id:"))]) - logprob) < LOGPROB_TOLERANCE
        assert max(named.values()) == pytest.approx(float(row.max()), abs=LOGPROB_TOLERANCE)


def ask_all(system: System, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: system.complete(**body), bodies))


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_and_logprobs_equal_the_reference(
    plain: System, reference: Reference, length: int
) -> None:
    prompt = a_prompt(length)
    answer = plain.complete(prompt, max_tokens=NUM_TOKENS, logprobs=3, echo=True)
    assert_equals(answer, reference(length), prompt)


def test_requests_that_run_together_equal_the_reference(plain: System, reference: Reference) -> None:
    bodies = [
        {"prompt": a_prompt(length), "max_tokens": NUM_TOKENS, "logprobs": 2, "echo": True}
        for length in LENGTHS * 2
    ]
    for body, answer in zip(bodies, ask_all(plain, bodies), strict=True):
        assert_equals(answer, reference(len(body["prompt"])), body["prompt"])


def test_several_prompts_in_one_request_equal_the_reference(plain: System, reference: Reference) -> None:
    prompts = [a_prompt(length) for length in (60, 3, 130)]
    answer = plain.complete(prompts, max_tokens=NUM_TOKENS)
    assert [choice["token_ids"] for choice in answer["choices"]] == [
        reference(len(prompt)).tokens for prompt in prompts
    ]
    assert answer["usage"]["prompt_tokens"] == 193


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(
    pressed: System, reference: Reference
) -> None:
    # Four start at once, a page each, too far from its end to keep another one free for it; then all want one.
    bodies = [
        {
            "prompt": a_prompt(length),
            "max_tokens": 80,
            "logprobs": 2,
            "temperature": 0.8 * (number % 2),
            "seed": number,
        }
        for number, length in enumerate(range(182, 190))
    ]
    alone = [pressed.complete(**body)["choices"] for body in bodies]
    before = pressed.metrics()["rorqual_worker_preemptions"]
    together = [answer["choices"] for answer in ask_all(pressed, bodies)]
    assert pressed.metrics()["rorqual_worker_preemptions"] > before
    assert together == alone
    pressed.wait_until_idle()
    for length in LENGTHS:
        answer = pressed.complete(a_prompt(length), max_tokens=NUM_TOKENS, logprobs=2, echo=True)
        assert_equals(answer, reference(length), a_prompt(length))


def test_exact_answers_are_the_same_bits_alone_among_others_and_however_chunked(
    exact_pair: System, pressed: System
) -> None:
    watched = [
        {"prompt": a_prompt(length), "max_tokens": NUM_TOKENS, "logprobs": 5, "echo": True, **sampling}
        for length, sampling in (
            (40, {}),
            (300, {"temperature": 1.0, "seed": 5, "top_p": 0.9}),
            (700, {"temperature": 0.7, "seed": 6, "n": 2, "presence_penalty": 0.5}),
        )
    ]
    others = [
        {"prompt": a_prompt(10 + 9 * number, seed=1), "max_tokens": 5 + number % 9, "logprobs": number % 3}
        for number in range(NUM_OTHERS)
    ]
    alone = [exact_pair.complete(**body)["choices"] for body in watched]
    together = ask_all(exact_pair, watched + others)[: len(watched)]
    assert [answer["choices"] for answer in together] == alone
    assert [pressed.complete(**body)["choices"] for body in watched] == alone
    exact_pair.wait_until_idle()


def test_two_workers_share_the_work(exact_pair: System) -> None:
    assert len(exact_pair.worker_metrics) == 2
    ask_all(exact_pair, [{"prompt": a_prompt(20, seed=seed), "max_tokens": 30} for seed in range(16)])
    opened = [scrape(url)["rorqual_worker_sequences_opened_total"] for url in exact_pair.worker_metrics]
    assert min(opened) > 1


def test_served_numerics_follow_their_reference_and_are_exact_too(ids_model: Path, start_system: Any) -> None:
    """A rounded value one step away flips later picks, and CPUs round unlike: most tokens of several prompts agree."""
    system = start_system(ids_model, "--exact", "--numerics", "served", "--prefill-tokens", "256")
    prompts = [a_prompt(50, seed=seed) for seed in range(4)]
    bodies = [{"prompt": prompt, "max_tokens": 4, "logprobs": 1, "echo": True} for prompt in prompts]
    answers = [system.complete(**body) for body in bodies]
    others = [{"prompt": a_prompt(20 + 30 * number, seed=5)} for number in range(6)]
    assert ask_all(system, [bodies[0], *others])[0]["choices"] == answers[0]["choices"]
    checkpoint = open_checkpoint(ids_model)
    tensors = dict(checkpoint.tensors())
    agreeing: list[bool] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        model = ReferenceModel(checkpoint.config, tensors, "served")
        rows = answer["choices"][0]["logprobs"]["top_logprobs"][1 : 1 + len(prompt)]
        for token, row in zip(prompt, rows, strict=True):
            likeliest = int(max(row, key=row.__getitem__).removeprefix("token_id:"))
            agreeing.append(likeliest == int(model.step(token).argmax()))
    assert sum(agreeing) >= 0.9 * len(agreeing), (
        f"{sum(agreeing)} of {len(agreeing)} most likely tokens agree"
    )
