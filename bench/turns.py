"""Conversations through prefill and decode workers: what each turn computes and moves, beside the least it could.

`python -m bench turns` (about 2 minutes): one `rorqual up` with two workers of each role; sessions take turns in an
order drawn anew for every round, one request at a time, so that what a worker has counted since is that request's. The
least is computed here, from token ids alone: a prefill worker computes what follows the tokens that somebody was sent
or has generated in this session before, and up to a page in front of them, which was not full; a decode worker reads
the full pages of the prompt that it has not had yet, and the record.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.handover import record_bytes
from kvstore.keys import PageKey, page_keys, root_key
from kvstore.layout import Numerics, StateLayout, build_layout
from rorqual.demo import TRAINED
from rorqual.local_cluster import LocalCluster
from rorqual.model_config import PAGE_TOKENS, load_model_config
from rorqual.session import TokenArray
from router.prompt import PromptEncoder

SUBJECTS = ("Emma", "Mr. Knightley", "the whole party", "Captain Wentworth", "Elizabeth", "her mother")
VERBS = ("walked to", "spoke of", "remembered", "could not think of", "wrote about", "laughed at")
OBJECTS = (
    "the garden",
    "a letter from Bath",
    "the ball at Netherfield",
    "her sister",
    "the weather",
    "Highbury",
)
RULES = "Answer in the manner of a letter, politely and at some length. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request."""

    session: int
    turn: int
    num_prompt: int
    num_new: int  # behind the tokens that were sent or generated in this session before
    num_new_prefill: int  # behind those that were sent: what prefill workers have computed themselves
    num_computed: int  # by prefill workers
    num_cached: int  # as the answer's usage says
    bytes_moved: int  # read by decode workers
    bytes_least: int
    bytes_fetched: int  # read by prefill workers from others

    @property
    def is_least_computed(self) -> bool:
        return self.num_computed <= self.num_new + PAGE_TOKENS

    @property
    def is_least_moved(self) -> bool:
        return self.bytes_moved == self.bytes_least


@dataclass(slots=True, kw_only=True)
class Session:
    messages: list[dict[str, str]]
    prompt: list[int] = field(default_factory=list[int])  # of the last turn
    ids: list[int] = field(default_factory=list[int])  # the same with its answer


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    options = ["--prefill", str(args.prefill), "--decode", str(args.decode), "--threads", "1"]
    options += ["--pages", str(args.pages), "--placement", args.placement, *args.up]
    with LocalCluster(args.model, *options) as cluster:
        turns = Conversations(cluster, args).run()
    print(_table(turns, args))
    wrong = [turn for turn in turns if not turn.is_least_moved]
    more = [turn for turn in turns if not turn.is_least_computed]
    print(
        f"{len(turns)} turns: {len(wrong)} moved more than the least, {len(more)} computed more than new + a page"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(turn) for turn in turns], indent=1) + "\n", encoding="utf-8")
    return 1 if wrong and args.strict else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench turns", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=TRAINED, metavar="DIR", help="default: the demo model")
    add("--sessions", type=int, default=20, metavar="N", help="(default 20)")
    add("--turns", type=int, default=6, metavar="N", help="of each session (default 6)")
    add("--tokens", type=int, default=120, metavar="N", help="of each answer (default 120)")
    add(
        "--sentences",
        type=int,
        default=24,
        metavar="N",
        help="of each question, about 12 tokens each (default 24)",
    )
    add("--prefill", type=int, default=2, metavar="N", help="prefill workers (default 2)")
    add("--decode", type=int, default=2, metavar="N", help="decode workers (default 2)")
    add("--pages", type=int, default=400, metavar="N", help="of each worker (default 400)")
    add("--placement", default="rorqual", metavar="NAME", help="the router's rule (default rorqual)")
    add("--seed", type=int, default=1, metavar="N", help="of texts and orders (default 1)")
    add("--strict", action="store_true", help="fail when a turn moved more than the least")
    add("--json", type=Path, metavar="FILE", help="write every turn")
    add("--up", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help="more options of `rorqual up`")
    return parser


class Conversations:
    def __init__(self, cluster: LocalCluster, args: argparse.Namespace) -> None:
        self._cluster = cluster
        self._args = args
        self._random = random.Random(args.seed)
        self._encoder = PromptEncoder.from_model_dir(args.model)
        config = load_model_config(args.model)
        self._layout: StateLayout = build_layout(
            config, Numerics.SERVED if config.quantised else Numerics.FLOAT32
        )
        self._root = root_key(fingerprint="", numerics="", wire_id="", salt="")  # any: keys stay here
        self._held: list[set[PageKey]] = [set() for _ in cluster.metrics_urls]  # by each worker that decodes

    def run(self) -> list[Turn]:
        system = {"role": "system", "content": RULES * 12}
        sessions = [Session(messages=[system]) for _ in range(self._args.sessions)]
        turns: list[Turn] = []
        for number in range(self._args.turns):
            order = list(range(len(sessions)))
            self._random.shuffle(order)
            turns += [self._take_turn(sessions[index], index, number) for index in order]
            print(f"bench.turns: turn {number + 1} of {self._args.turns}", file=sys.stderr, flush=True)
        return turns

    def _take_turn(self, session: Session, index: int, number: int) -> Turn:
        session.messages.append({"role": "user", "content": self._question()})
        prompt = self._encoder.encode_chat(session.messages).ids
        before = self._metrics()
        body: dict[str, Any] = {
            "messages": session.messages,
            "max_tokens": self._args.tokens,
            "seed": 1000 * index + number,
            "return_token_ids": True,
        }
        answer = self._cluster.ask("/v1/chat/completions", body)
        (choice,) = answer["choices"]
        after = self._metrics()
        assert answer["usage"]["prompt_tokens"] == len(prompt), "the router encodes otherwise"
        turn = self._measure(session, index, number, prompt, answer["usage"], before, after)
        session.messages.append({"role": "assistant", "content": choice["message"]["content"]})
        session.prompt, session.ids = prompt.tolist(), [*prompt.tolist(), *choice["token_ids"]]
        self._hold(session.ids, before, after)
        return turn

    def _measure(
        self,
        session: Session,
        index: int,
        number: int,
        prompt: TokenArray,
        usage: dict[str, Any],
        before: Sequence[dict[str, float]],
        after: Sequence[dict[str, float]],
    ) -> Turn:
        ids = prompt.tolist()
        decoders = _who_read(before, after)
        has_read = [
            a["state_bytes_read_total"] - b["state_bytes_read_total"] for b, a in _pairs(before, after)
        ]
        assert len(decoders) == 1, f"{len(decoders)} decode workers read"
        (decoder,) = decoders
        held = self._held[decoder]
        keys = page_keys(self._root, prompt)
        num_held = next((depth for depth, key in enumerate(keys) if key not in held), len(keys))
        least = (len(keys) - num_held) * self._layout.page_bytes
        least += record_bytes(self._layout, len(prompt), drafts=False)
        computed = sum(
            a.get("tokens_computed_total", 0) - b.get("tokens_computed_total", 0)
            for b, a in zip(before, after, strict=True)
            if not _decodes(a)
        )
        fetched = sum(
            a.get("peer_bytes_read_total", 0) - b.get("peer_bytes_read_total", 0)
            for b, a in zip(before, after, strict=True)
        )
        return Turn(
            session=index,
            turn=number,
            num_prompt=len(ids),
            num_new=len(ids) - _num_common(ids, session.ids),
            num_new_prefill=len(ids) - _num_common(ids, session.prompt),
            num_computed=int(computed),
            num_cached=usage["prompt_tokens_details"]["cached_tokens"],
            bytes_moved=int(sum(has_read)),
            bytes_least=least,
            bytes_fetched=int(fetched),
        )

    def _hold(
        self, ids: Sequence[int], before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]
    ) -> None:
        """The decode worker keeps all full pages; the last token was never computed."""
        (decoder,) = _who_read(before, after)
        self._held[decoder].update(page_keys(self._root, np.array(ids[:-1], dtype=np.int32)))

    def _question(self) -> str:
        sentences = [
            f"{self._random.choice(SUBJECTS)} {self._random.choice(VERBS)} {self._random.choice(OBJECTS)}."
            for _ in range(self._args.sentences)
        ]
        return " ".join(sentences)

    def _metrics(self) -> list[dict[str, float]]:
        """Of each worker, summed over labels, by name without its prefix."""
        found: list[dict[str, float]] = []
        for url in self._cluster.metrics_urls:
            totals: dict[str, float] = {}
            with urllib.request.urlopen(url, timeout=30) as answer:
                for line in answer.read().decode().splitlines():
                    match = re.fullmatch(r"rorqual_worker_(\w+)(?:\{.*\})? (\S+)", line)
                    if match:
                        totals[match[1]] = totals.get(match[1], 0.0) + float(match[2])
            found.append(totals)
        return found


def _decodes(metrics: dict[str, float]) -> bool:
    return "hand_overs_total" in metrics or "state_bytes_read_total" in metrics


def _pairs(
    before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Of decode workers."""
    return [(b, a) for b, a in zip(before, after, strict=True) if _decodes(a)]


def _who_read(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> list[int]:
    return [
        number
        for number, (b, a) in enumerate(zip(before, after, strict=True))
        if _decodes(a) and a["state_bytes_read_total"] > b["state_bytes_read_total"]
    ]


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _table(turns: Sequence[Turn], args: argparse.Namespace) -> str:
    lines = [
        f"{args.sessions} sessions, {args.prefill} + {args.decode} workers, placement {args.placement};"
        " means of each turn; bytes in KiB",
        f"{'turn':>4}{'prompt':>9}{'new':>8}{'sent new':>10}{'computed':>10}{'cached':>8}{'fetched':>9}{'moved':>9}"
        f"{'least':>9}  {'over compute':>13}{'over moved':>12}",
    ]
    for number in range(args.turns):
        own = [turn for turn in turns if turn.turn == number]

        def mean(name: str, own: Sequence[Turn] = own) -> float:
            return statistics.mean(getattr(turn, name) for turn in own)

        over_compute = sum(not turn.is_least_computed for turn in own)
        over_moved = sum(not turn.is_least_moved for turn in own)
        lines.append(
            f"{number + 1:>4}{mean('num_prompt'):>9.0f}{mean('num_new'):>8.0f}{mean('num_new_prefill'):>10.0f}"
            f"{mean('num_computed'):>10.0f}{mean('num_cached'):>8.0f}{mean('bytes_fetched') / 1024:>9.0f}"
            f"{mean('bytes_moved') / 1024:>9.0f}{mean('bytes_least') / 1024:>9.0f}  {over_compute:>13}{over_moved:>12}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
