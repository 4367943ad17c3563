"""How far bfloat16 is from float32 on a real model, on a CPU: mean KL divergence of the next token.

    STOP_REAL_MODEL=DIR python tests/bench_bfloat16.py test.jsonl [--texts 12] [--transformers]

The texts are questions in the model's chat prompt, each followed by its published solution, whose
tokens count; a line of the file is a JSON object with `question` and `answer`. With --transformers
its SDPA and eager attention are measured beside ours. The last line is one JSON object.
"""
import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from model import load  # noqa: E402
from plumbing.tokenizer import Tokenizer  # noqa: E402

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def read_texts(file, tokenizer, count):
    """[(ids of the prompt, ids of the solution)] of the first records of a file."""
    texts = []
    for line in Path(file).read_text(encoding="utf-8").splitlines()[:count]:
        record = json.loads(line)
        prompt = tokenizer.prompt(f"{record['question']}\n\n{INSTRUCTION}")
        texts.append((prompt, tokenizer.encode(record["answer"])))
    return texts


@torch.inference_mode()
def log_probabilities(texts, hidden_of, head):
    """(N, V) float32 of the solutions' tokens, by a model in two parts."""
    found = []
    for prompt, solution in texts:
        hidden = hidden_of(torch.tensor([prompt + solution]))[0, len(prompt) - 1:-1]
        found.append(head(hidden).float().log_softmax(-1))
    return torch.cat(found)


def divergence(exact, found):
    """Mean KL(exact || found) in nats, a piece at a time: a vocabulary is large."""
    pieces = zip(exact.split(64), found.split(64))
    total = sum((one.exp() * (one - other)).sum().item() for one, other in pieces)
    return total / len(exact)


def perplexity(logs, texts):
    """Of the solutions."""
    ids = torch.tensor(sum((solution for _, solution in texts), []))
    return (-logs.gather(-1, ids[:, None]).mean()).exp().item()


def main():
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--transformers", action="store_true")
    options = parser.parse_args()
    folder = os.environ.get("STOP_REAL_MODEL")
    if not folder:
        parser.exit(2, "error: STOP_REAL_MODEL names no checkpoint directory\n")
    texts = read_texts(options.data, Tokenizer(folder), options.texts)

    model = load(folder)
    exact = log_probabilities(texts, model, model.logits)
    report = {"tokens": len(exact), "float32": {"perplexity": perplexity(exact, texts)}}

    def measure(name, hidden_of, head):
        found = log_probabilities(texts, hidden_of, head)
        report[name] = {"perplexity": perplexity(found, texts), "kl": divergence(exact, found)}
        print(name, json.dumps(report[name]), flush=True)

    model = load(folder, dtype=torch.bfloat16)
    measure("bfloat16", model, model.logits)
    if options.transformers:
        import transformers
        for kind in ("sdpa", "eager"):
            other = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, attn_implementation=kind).eval()
            measure(f"transformers {kind}", lambda ids: other.model(ids)[0], other.lm_head)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
