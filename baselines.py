"""What STOP is measured against (paper, section 2): the pruning signals of types I, II and III.

Type I looks at the text from outside, type II has a second model judge it, type III reads the
model's own confidence. There is one function for each type, and two for type I. All take the
records of `sample.sample_paths`, read the first `prefix` tokens of every path, and return one
score a path, problem by problem: a higher score means keep (`confidence`, several kinds of it, by
name). `eval.py` compares them with STOP (type IV).
"""
import dataclasses
import operator

import numpy as np
import torch

from plumbing.problems import instruction
from plumbing.progress import progress


class Signal(str):
    """The name of what scores paths, as reports have it: "judge (II)"; its two parts are fields."""

    def __new__(cls, scorer, type=""):
        """type: the paper's, I to IV; "" of what is none of them."""
        signal = super().__new__(cls, f"{scorer} ({type})" if type else scorer)
        signal.scorer = scorer
        signal.type = type
        return signal

    @classmethod
    def of(cls, name):
        """A name as a Signal; one that is only a text has no type."""
        return name if isinstance(name, cls) else cls(name)


JACCARD = Signal("Jaccard", "I")
COVER = Signal("token set cover", "I")
JUDGE = Signal("judge", "II")
CONFIDENCES = (
    Signal("mean log-probability", "III"),
    Signal("minus entropy", "III"),
    Signal("DeepConf mean", "III"),
    Signal("DeepConf lowest group", "III"),
    Signal("DeepConf bottom 10%", "III"),
    Signal("DeepConf tail", "III"),
    Signal("Think Just Enough", "III"),
)
TOP = 20  # the k of DeepConf and of Think Just Enough

MARK = "<extra_0>"  # Qwen's reward models read it after each step, and give the step's reward there
CHAT = (
    "<|im_start|>system\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n%s")
AGGREGATES = {"last": operator.itemgetter(-1), "min": min, "mean": np.mean}


def redundancy(records, prefix):
    """Type I, the paper's stand-in for Slim-SC (arXiv 2509.13990): a path much like another can go.

    J_ij = |S_i & S_j| / |S_i | S_j|    (Jaccard; S_i is the set of token ids in prefix i)
    score_i = -max of J_ij over the other paths j of the same problem (0 where there is no other)

    Returns (paths,) float64.
    """
    scores = []
    for record in records:
        sets = [set(path[:prefix]) for path in record["paths"]]
        for i, own in enumerate(sets):
            others = sets[:i] + sets[i + 1:]
            similarity = [len(own & other) / len(own | other) for other in others]
            scores.append(-max(similarity, default=0.0))
    return np.array(scores, float)


def token_set_cover(records, prefix, confidences):
    """Type I: a set of paths that covers all tokens, the confident ones first (arXiv 2508.03979).

    Greedily, the next path taken is the one with the most confidence times new tokens:
    i = argmax of c_i |S_i - (tokens of the paths taken)|    (S_i: the token ids in prefix i)
    score_i = -(how many paths of the problem were taken before i)

    The paper keeps what covers all tokens; for a fixed number of kept paths the cover starts anew,
    among the paths not yet taken, when none of them has a new token. Ties go to the lower index.
    confidences (paths,), positive, in the order of the paths. Returns (paths,) float64.
    """
    scores = np.zeros(len(confidences))
    first = 0  # number of the problem's first path
    for record in records:
        sets = [set(path[:prefix]) for path in record["paths"]]
        waiting = list(range(len(sets)))
        covered = set()
        for taken_before in range(len(sets)):
            new = [len(sets[i] - covered) for i in waiting]
            if max(new) == 0:
                covered = set()
                new = [len(sets[i]) for i in waiting]
            gains = np.multiply(new, [confidences[first + i] for i in waiting])
            taken = waiting.pop(int(np.argmax(gains)))
            covered |= sets[taken]
            scores[first + taken] = -taken_before
        first += len(sets)
    return scores


@dataclasses.dataclass
class Steps:
    """One number for each of a path's T tokens, (T,) float64, from the distribution p_t at that
    step: the softmax of the raw logits, before temperature. "Top": the 20 most probable tokens."""
    logprob: np.ndarray      # ln p_t(y_t) of the token y_t that was drawn
    entropy: np.ndarray      # H_t = -sum of p ln p, in nats
    confidence: np.ndarray   # C_t = -(1/20) * sum of ln p over the top: high where p_t is peaked
    top_entropy: np.ndarray  # H_t of the top alone, its probabilities scaled to sum to 1, in nats


def entropy(logp):
    """Entropy in nats of log-probabilities (..., V) -> (...)."""
    return -(logp.exp() * logp).sum(-1)


def read_steps(model, hidden, path):
    """The Steps of a path of T token ids; hidden (T, hidden): the states they were drawn from."""
    size = 2 ** 25 // model.config.vocab_size + 1  # positions at a time: bounds the logits' memory
    tokens = torch.tensor(path, device=hidden.device)
    blocks = []
    for states, drawn in zip(hidden.split(size), tokens.split(size)):
        logp = model.logits(states).float().log_softmax(-1)  # (size, vocab)
        top = logp.topk(min(TOP, logp.shape[-1])).values
        logprob = logp.gather(-1, drawn[:, None])[:, 0]
        blocks.append(torch.stack((
            logprob,
            entropy(logp),
            -top.mean(-1),
            entropy(top.log_softmax(-1)))))
    return Steps(*torch.cat(blocks, dim=1).double().cpu().numpy())


def hidden_states(model, rows, name, batch):
    """Yield (i, hidden states (T, hidden) of rows[i]) for each row of T token ids, in any order.
    Rows of similar length share a pass, padded on the right, where no token of theirs looks."""
    lengths = [len(row) for row in rows]
    order = np.argsort(lengths, kind="stable").tolist()
    with progress(name, len(rows), "path") as bar:
        for start in range(0, len(rows), batch):
            chosen = order[start:start + batch]
            tensors = [torch.tensor(rows[i]) for i in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)  # (B, T)
            hidden = model(ids.to(model.device))  # (B, T, hidden)
            for i, states in zip(chosen, hidden):
                yield i, states[:lengths[i]]
            bar.update(len(chosen))


@torch.inference_mode()
def confidence(model, records, prefix, window=256, batch=16):
    """Type III: {name of CONFIDENCES: (paths,) float64}, from one pass over prompts and prefixes.
    window: DeepConf's, in tokens; a shorter path is one window."""
    prompts, paths = [], []
    for record in records:
        for path in record["paths"]:
            prompts.append(record["prompt_ids"])
            paths.append(path[:prefix])
    rows = [prompt + path for prompt, path in zip(prompts, paths)]
    scores = {name: np.zeros(len(rows)) for name in CONFIDENCES}
    for i, hidden in hidden_states(model, rows, "confidence", batch):
        drawn_from = hidden[len(prompts[i]) - 1:-1]  # the state before each token of the path
        steps = read_steps(model, drawn_from, paths[i])
        for name, value in confidence_of(steps, window).items():
            scores[name][i] = value
    return scores


def confidence_of(steps, window):
    """Type III's scores of one prefix from its Steps: {name of CONFIDENCES: float}."""
    scores = {}

    # Perplexity and entropy (the paper, appendix C.5): mean of ln p_t(y_t), and of -H_t.
    scores["mean log-probability (III)"] = steps.logprob.mean()
    scores["minus entropy (III)"] = -steps.entropy.mean()

    # DeepConf (facebookresearch/deepconf): mean of C_t over the prefix, and over its windows.
    width = min(window, len(steps.confidence))
    windows = np.lib.stride_tricks.sliding_window_view(steps.confidence, width)
    groups = windows.mean(1)  # (T - width + 1,)
    tenth = max(1, int(0.1 * len(groups)))
    scores["DeepConf mean (III)"] = steps.confidence.mean()
    scores["DeepConf lowest group (III)"] = groups.min()
    scores["DeepConf bottom 10% (III)"] = np.sort(groups)[:tenth].mean()
    scores["DeepConf tail (III)"] = groups[-1]

    # Think Just Enough (arXiv 2510.08146): minus the mean entropy of the top 20, in bits.
    scores["Think Just Enough (III)"] = -steps.top_entropy.mean() / np.log(2)
    return scores


def require(key, fits, found, expected):
    """ValueError unless a property of the judge fits."""
    if not fits:
        raise ValueError(f"judge: {key}: found {found}, expected {expected}")


def marked_text(problem, text):
    """What a reward model reads: question and text in its chat format, a mark after each step.
    Steps are separated by blank lines. A mark that the path wrote itself is removed."""
    question = problem.problem if problem.kind == "math" else instruction(problem)
    steps = []
    for part in text.replace(MARK, "").split("\n\n"):
        if part.strip():
            steps.append(part.strip() + MARK)
    answer = "".join(steps) or MARK
    return CHAT % (question, answer)


@torch.inference_mode()
def judge_scores(
        judge, judge_tokenizer, tokenizer, problems, records, prefix, aggregate="last", batch=16):
    """Type II, after LaBoR (arXiv 2506.22058): a reward model's chance that a prefix is good.

    r_s = softmax(head(h_s))[1]    (the reward: h_s is the state at the mark after step s)
    score = the last r_s, or their min or mean    (`aggregate`; the paper leaves it open)

    The judge reads text in the chat format of Qwen's reward models. A judge that shares the
    model's tokenizer and has no mark (`studies/judge.py` trains one) reads the prefix's token ids
    and is asked at their end. Returns (paths,) float64. ValueError where the judge does not fit.
    """
    vocab = judge_tokenizer.library.get_vocab()
    has_marks = MARK in vocab
    same_tokens = vocab == tokenizer.library.get_vocab()
    require("head", judge.config.reward, "next tokens", "two logits (Qwen2ForProcessRewardModel)")
    require("tokenizer", has_marks or same_tokens, "another", f"{MARK} or the model's")
    require("aggregate", aggregate in AGGREGATES, aggregate, "last, min or mean")

    rows = []
    for problem, record in zip(problems, records):
        for path in record["paths"]:
            begun = path[:prefix]
            if has_marks:
                text = tokenizer.decode(begun, skip_special_tokens=True)
                rows.append(judge_tokenizer.encode(marked_text(problem, text)))
            else:
                rows.append(record["prompt_ids"] + begun)
    longest = max(map(len, rows), default=0)
    last = max(*vocab.values(), *map(max, rows))
    size = judge.config.vocab_size
    context = judge.config.max_position_embeddings
    require("vocab_size", size > last, size, f"more than {last}, the last token id to read")
    require("context", context >= longest, context, f"at least {longest}")

    scores = np.zeros(len(rows))
    for i, hidden in hidden_states(judge, rows, "judge", batch):
        marks = [place for place, token in enumerate(rows[i]) if token == vocab.get(MARK)]
        chances = judge.logits(hidden[marks or [-1]]).double().softmax(-1)  # (marks, 2)
        rewards = chances[:, 1].tolist()
        scores[i] = AGGREGATES[aggregate](rewards)
    return scores
