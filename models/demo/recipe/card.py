"""Renders the model card: its text is here, its figures are what `evaluate.py` measured. Pure but for the one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.demo.recipe.architecture import CONFIG

HEAD = """# Rorqual demo

A small model of the DeepSeek-V4 architecture, trained from nothing on the CPU, so that a cluster answers in readable
English out of the box and its sparse attention, compressed rows, FP4 experts and drafts can be measured on learned
weights. It writes in the manner of Jane Austen, recalls what it was told a few thousand tokens before, and does small
exercises. It knows nothing of the world.

```
make serve                            serve it
python models/demo/train.py           make it anew: the whole recipe, 75 minutes on two cores; resumes when interrupted
python models/demo/evaluate.py        measure it and write the tables below
```

## What it is

The real architecture at toy widths: {parameters} million parameters. Four layers (window only; compressed sparse
attention over rows of 4 tokens, twice; compressed attention over rows of 128), four residual streams with
hyper-connections, hash and learned routing (8 experts, 2 chosen, one shared), attention sinks, one MTP block. The
sliding window is 32 tokens, four of them stacked reach 124 tokens back: whatever is further away comes through
compressed rows, of which the indexer picks {topk}. Weights are stored as a released model's are (FP8 blocks, FP4
experts); tokenizer: byte-level BPE of 2,048 tokens with DeepSeek-V4's control tokens, so that the real prompt encoder
is used as it is.

## How it was trained

`train.py` runs the engine's own modules with differentiable kernels. First short drills until the model looks back
(recall accuracy 0.9), then sequences of 256 to 2,048 tokens: prose, recall with prose between fact and question, and
skills; recall makes room for prose in the second half. Muon for attention matrices, AdamW for the rest; router biases
are moved to balance the experts; the MTP block learns the next-but-one token and the model's own distribution over
it; the indexer learns, by KL divergence, where dense attention looks; in the last part weights and activations are
rounded as they will be served (straight-through gradients). {run}

![loss](loss.png)

## Data

Prose: six novels by Jane Austen (public domain), from the Debian package `r-cran-janeaustenr` (its packaging is under
the MIT license); every 12th chapter is held out. Everything else is generated: facts and questions, copying,
counting, spelling, sums, JSON, short reasoning, and a few dialogues. Nothing was taken from another model.
"""


def write(file: Path, results: Mapping[str, Any]) -> None:
    """Write the card with every table whose figures are there."""
    about = results.get("about", {})
    text = HEAD.replace("{parameters}", f"{about['parameters'] / 1e6:.1f}" if about else "5")
    text = text.replace("{topk}", str(CONFIG["index_topk"])).replace("{run}", _run(about))
    sections = [text.rstrip()]
    for name, render in _SECTIONS.items():
        if name in results:
            sections.append(render(results[name]).rstrip())
    sections.append(_LIMITS.rstrip())
    file.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


_LIMITS = """## Limits

It was made to exercise a serving system. It makes things up, its stories lose their thread within a few sentences,
and outside the wordings it was trained on its skills fail. Facts are recalled when a name stands right before what it
is asked for; facts in other wordings mostly are not."""


def _run(about: Mapping[str, Any]) -> str:
    if "tokens" not in about:
        return ""
    return (
        f"These weights have seen\n{about['tokens'] / 1e6:.1f} million tokens in {about['steps']:,} steps and "
        f"{about['minutes']:.0f} minutes of two cores, part of which other work shared:\n"
        f"`train.py --tokens {about['tokens'] // 100_000 * 100_000}` makes them, however long it takes."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _prose(found: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str, str]] = [("this model, as served", f"{found['served']:.3f}", "")]
    rows.append(("this model, float32", f"{found['float32']:.3f}", ""))
    for key, label in (
        ("equal tokens", "this architecture, a run of as many tokens as the baseline's"),
        ("baseline", "dense-attention baseline"),
    ):
        if key in found:
            note = f"{found[f'{key}: tokens'] / 1e6:.1f} M tokens, {found[f'{key}: parameters'] / 1e6:.2f} M parameters"
            rows.append((label, f"{found[key]:.3f}", note))
    rows.append(("five-gram (interpolated Kneser-Ney, same tokens)", f"{found['five-gram']:.3f}", ""))
    return (
        f"## Held-out prose, bits per byte\n\n{_table(('model', 'bits per byte', ''), rows)}\n\n"
        f"{found['windows']} windows of 1,024 tokens, {found['bytes']:,} bytes of held-out chapters.{_equal(found)}"
    )


def _equal(found: Mapping[str, Any]) -> str:
    """How the two runs of equal tokens were made."""
    if "baseline" not in found or "equal tokens" not in found:
        return ""
    tokens = found["baseline: tokens"] // 100_000 * 100_000
    minutes = [found[f"{name}: minutes"] for name in ("equal tokens", "baseline")]
    runs = "\n".join(
        f"python models/demo/train.py --tokens {tokens} --workers 1 {options}--out {folder} --work {folder}"
        for folder, options in (
            ("models/demo/.train-equal", ""),
            ("models/demo/.train-baseline", "--baseline "),
        )
    )
    return (
        "\n\nThe two runs of equal tokens are alike in recipe, data, seed and schedule, and measured in float32; they\n"
        f"took {minutes[0]:.0f} and {minutes[1]:.0f} minutes of one core each, side by side:\n\n```\n{runs}\n```"
    )


def _recall(found: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{row['distance']:,}",
            row["questions"],
            f"{row['picked']:.3f}",
            f"{row['dense']:.3f}",
            f"{row['float32']:.3f}",
            f"{row['agreement']:.3f}",
        )
        for row in found["rows"]
    ]
    head = (
        "distance, tokens",
        "questions",
        f"served, top {found['topk']} rows",
        "served, dense",
        "float32, top rows",
        "served = float32",
    )
    return (
        "## Recall by distance\n\nEight facts, prose, then a question for each; the greedy answer's word. "
        f"Chance is {found['chance']:.3f}.\n\n{_table(head, rows)}"
    )


def _numerics(found: Mapping[str, Any]) -> str:
    difference = abs(found["served"] - found["training"])
    return (
        "## Served as trained\n\n"
        f"Bits per byte of {found['windows']} windows: training code with served rounding {found['training']:.5f}, "
        f"through `rorqual up` {found['served']:.5f}, difference {difference:.5f}."
    )


def _drafts(found: Mapping[str, Any]) -> str:
    rows = [
        (
            row["drafts"],
            row["temperature"],
            row["kind"],
            f"{row['accepted']:.2f}",
            f"{row['tokens']:.2f}",
        )
        for row in found["rows"]
    ]
    head = ("drafts a step", "temperature", "text", "accepted a step", "tokens a step")
    return f"## Drafts of the MTP block, through `rorqual up`\n\n{_table(head, rows)}"


def _skills(found: Mapping[str, Any]) -> str:
    rows = [(row["skill"], row["asked"], f"{row['right']:.2f}") for row in found["rows"]]
    return f"## Skills, exactly right greedy answers\n\n{_table(('skill', 'asked', 'right'), rows)}"


def _samples(found: Mapping[str, Any]) -> str:
    parts = [
        f"**{question}**\n\n> {answer.strip().replace(chr(10), chr(10) + '> ')}"
        for question, answer in found["chats"]
    ]
    return "## Ten chats at temperature 0.7, seed 1, none chosen\n\n" + "\n\n".join(parts)


_SECTIONS = {
    "prose": _prose,
    "recall": _recall,
    "numerics": _numerics,
    "drafts": _drafts,
    "skills": _skills,
    "samples": _samples,
}
