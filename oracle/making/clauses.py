"""Which mistakes break which clause of oracle/README.md, and the table of it, oracle/CLAUSES.md.

    python oracle/making/clauses.py      # writes CLAUSES.md from the vectors

A clause that no mistake breaks is one that nobody would notice: the tests refuse it.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent  # oracle/
sys.path[:0] = [str(HERE.parent), str(HERE)]
from compare import CLAUSES, LEVEL_OF  # noqa: E402

# clause: the keys of the mistakes that break it; a * stands for the rest of a key
BROKEN_BY = {
    "D1": "bfloat16-weights bfloat16-residual bfloat16-cache",
    "D2": "embedding-scaled eps norm-plus-one layer-norm post-norm-missing",
    "D3": "qkv-bias o-bias",
    "D4": "qk-norm qk-norm-late",
    "D5": "rope-missing rope-pairs rope-sign theta bfloat16-positions",
    "D6": "yarn yarn-length yarn-truncate yarn-scale yarn-scale-once yarn-linear",
    "D7": "kv-tiled scale-missing scale-hidden not-causal",
    "D8": "window-missing window-wide window-narrow window-everywhere window-swapped window-inert",
    "D9": "sinks sinks-scaled",
    "D10": "gelu gate-up-swapped",
    "D11": "router-* expert-bias experts-fewer experts-more clamp gate-clamped-below swish-alpha "
           "up-plus-one gate-up-halves gate-up-swapped gelu",
    "D12": "final-norm",
    "D13": "mxfp4-nibbles mxfp4-scale",
    "D14": "positions-capped ring-64",
    "C1": "prefix-short prefix-doubled prefix-first",
    "C2": "lora-everywhere lora-last-prefix",
    "C3": "position-* tokens-reversed tokens-first tokens-one-fewer tokens-one-more",
    "C4": "tokens-blind tokens-see-all check-window position-high-window position-low-window",
    "C5": "lora-not-first lora-only-last lora-off lora-unscaled lora-r-over-alpha lora-alpha "
          "lora-sqrt lora-attention-only lora-qv-only lora-no-o",
    "C6": "states-shifted states-normed",
    "C7": "read-first read-mean read-before-norm read-norm-twice head-no-bias head-bfloat16",
    "C8": "score-*",
    "C9": "lora-everywhere tokens-see-all tokens-blind",
    "T1": "loss-sum loss-hard loss-inverted loss-squares loss-positive-only",
    "T2": "loss-clipped loss-clipped-7 loss-clipped-100",
    "T3": "grad-sum grad-tokens-* grad-lora-* grad-head-zero grad-no-bias grad-bfloat16 grad-cut "
          "grad-clipped grad-negative",
    "T4": "grad-through-prefix",
    "S1": "temperature-last temperature-multiplied temperature-ignored temperature-reciprocal "
          "temperature-float64 logits-float64 top-k-by-logit top-p-all",
    "S2": "temperature-floor-* temperature-small-is-greedy temperature-zero-is-one greedy-last",
    "S3": "top-k-ignored top-k-fewer top-k-more top-k-zero top-k-ties-cut ties-cut top-k-by-logit",
    "S4": "top-p-*",
    "S5": "top-p-float32 draw-float32 draw-float32-sums draw-float32-parts not-renormalised",
    "S6": "draw-*",
    "S7": "mix-*",
    "S8": "seed-* prompt-* index-* fold-by-addition key-*",
    "S9": "position-* number-*",
    "R1": "end-dropped end-ignored limit-more limit-fewer counter-from-one counter-prompt "
          "index-rows",
    "R2": "end-at-limit",
    "R3": "check-* ended-never-kept ended-always-kept ended-without-end ended-not-checked",
    "R4": "rank-* run-*",
    "R5": "cache-left cache-seen positions-advanced positions-back counter-advanced "
          "counter-restarted counter-skipped counter-back lora-left-on last-token-twice "
          "next-from-stop rows-renumbered",
    "R6": "pruned-whole ended-not-pruned paths-without-scores",
    "R7": "cascade-*",
    "R8": "vote-*",
    "R9": "branch-*"}
# position-* is both a [STOP] position and a position of the noise
CHAIN_OF_LEVEL = {"D": "model", "C": "model", "T": "model", "S": "sampler"}
TABLE = """# Clauses, and what would break them

Made by `python oracle/making/clauses.py` from the vectors: for each clause of
[README.md](README.md) the rows and inputs that test it, and the mistakes that break it, each of
which certify catches and has in `vectors/mistakes/KEY.json`.

| clause | rows | inputs | mistakes |
|---|---|---|---|
"""


def fits(key, pattern):
    """Whether a mistake's key is meant by a pattern."""
    return key == pattern or pattern.endswith("*") and key.startswith(pattern[:-1])


def clauses_of_mistake(key, chain=None):
    """The clauses that a mistake breaks. chain: where it is known, position-* is told apart."""
    found = []
    for clause, patterns in BROKEN_BY.items():
        expected = CHAIN_OF_LEVEL.get(clause[0])
        if chain is not None and expected is not None and chain != expected:
            continue
        if any(fits(key, pattern) for pattern in patterns.split()):
            found.append(clause)
    return found


def mistakes_of(folder):
    """The published mistakes of a folder of vectors."""
    files = sorted((folder / "mistakes").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


def inputs_of(folder):
    """{clause: ids of the inputs that name it}."""
    found = {}
    for file in sorted(folder.glob("*/case.json")):
        for items in json.loads(file.read_text()).values():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, dict):
                    for clause in item["clauses"]:
                        found.setdefault(clause, []).append(item["id"])
    return found


def table(folder):
    """CLAUSES.md as text."""
    mistakes = mistakes_of(folder)
    inputs = inputs_of(folder)
    lines = []
    for clause in BROKEN_BY:
        rows = [f"`{row}`" for row in CLAUSES if clause in CLAUSES[row]]
        ids = inputs.get(clause, [])
        shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        keys = [mistake["key"] for mistake in mistakes if clause in mistake["clauses"]]
        if not shown:
            shown = "all of its rows"
        lines.append(f"| {clause} | {', '.join(rows)} | {shown} | {', '.join(keys)} |\n")
    return TABLE + "".join(lines)


def levels_of(mistake):
    """The levels in which a mistake shows."""
    found = set()
    for rows in mistake["cases"].values():
        found |= {LEVEL_OF[row] for row, about in rows.items() if about["entries"]}
    return found


def main():
    """Write CLAUSES.md."""
    (HERE / "CLAUSES.md").write_text(table(HERE / "vectors"))


if __name__ == "__main__":
    main()
