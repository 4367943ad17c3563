"""STOP (arXiv 2604.16029, section 3): Launch N paths, Check their prefixes, Resume the best k, and
vote.

    python stop.py --prompt "..." --n 64 --keep 8
    python stop.py --data questions.jsonl --out answers.jsonl               # one answer per record
    python stop.py --score prefixes.jsonl --out scored.jsonl --trace DIR    # one score per record

A frozen model, m learned [STOP] embeddings appended to a cached prefix, a LoRA that is active only
there, and a head on the last [STOP] position's final hidden state h_m:

    h = f([prefix; S]),  p = sigmoid(w h_m + b)  =  the chance that this path ends right   (eq. 4)

`solve` is the whole of it. The script decodes by engine/launch.py, which does the same, faster.
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import torch
import torch.nn.functional as F

from lora import LoRA
from plumbing import memory
from plumbing.answers import extract_answer, same_vote
from plumbing.budget_plan import Stage, parse_checkpoints, validate_stages
from plumbing.checkpoint import fingerprint
from plumbing.stop_files import match, read_stop, write_stop
from sample import Batch, Path, Sampling, prefill, require_finite, room, validate_prompts


class Stop(torch.nn.Module):
    """The three trained parts: `tokens` (m, hidden; one row if shared), `lora`, and `head`.

    head "sigmoid": one logit, soft binary cross-entropy (the paper, eq. 4). head "softmax": two
    logits, index 1 = good, soft cross-entropy (the authors' released code). targets None: all
    seven linears, or those of them that the model has. The head starts at zero, so that every
    chance is one half; the tokens start at random with the spread of the model's embeddings.

    `forward` gives logits of a cache's rows, `chance` chances of logits, `check` both in one, and
    `score` chances of prefixes as token ids.
    """

    def __init__(self, model, m=4, rank=128, alpha=None, targets=None, head="sigmoid", shared=False,
                 dropout=0.0, seed=0):
        super().__init__()
        assert head in ("sigmoid", "softmax") and m >= 1 and rank >= 1
        self.m = m
        self.shared = shared
        self.head_kind = head
        self.base_fingerprint = fingerprint(model.config)
        self.trained = {}  # settings and metrics of its training

        embeddings = model.model.embed_tokens.weight
        hidden = embeddings.shape[1]
        device = embeddings.device
        generator = torch.Generator().manual_seed((seed + 1) % 2 ** 64)
        noise = torch.randn(1 if shared else m, hidden, generator=generator)
        self.tokens = torch.nn.Parameter(noise.to(device) * embeddings.float().std())

        alpha = 2 * rank if alpha is None else alpha
        self.lora = LoRA(model, rank, alpha, targets, dropout, seed)

        self.head = torch.nn.Linear(hidden, 1 if head == "sigmoid" else 2, device=device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, model, cache):
        """Head logits (B, 1 or 2) for the prefixes in a cache's rows, which stay as they are: the
        [STOP] keys and values go to dead slots behind each row, and no row becomes longer."""
        tokens = self.tokens.expand(cache.rows, self.m, -1)  # (B, m, hidden)
        tokens = tokens.to(cache.keys[0].dtype)
        everywhere = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        hidden = model.run(tokens, cache, adapter=self.lora.at(everywhere))
        return self.head(hidden[:, -1].float())

    def chance(self, logits):
        """Head logits (B, 1 or 2) -> (B,) the chance that the path ends right. ValueError on a
        logit that is not finite: infinity, too, would give a chance in [0, 1]."""
        require_finite(logits, "STOP's score")
        if self.head_kind == "sigmoid":
            return logits.sigmoid()[:, 0]
        return logits.softmax(-1)[:, 1]

    def loss(self, logits, labels):
        """Mean soft cross-entropy between head logits (B, 1 or 2) and labels (B,) in [0, 1]."""
        if self.head_kind == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits[:, 0], labels)
        return F.cross_entropy(logits, torch.stack((1 - labels, labels), -1))

    def check(self, model, cache):
        """The paper's Check: chances (B,) of the prefixes in a cache's rows. ValueError where one
        is no number."""
        return self.chance(self(model, cache))

    @torch.inference_mode()
    def score(self, model, prefixes, batch=16, bar=None):
        """Chances (N,) float32 that prefixes (prompt + prefix, lists of token ids, ragged) end
        right. Equal prefixes are scored once."""
        validate_prompts(model, prefixes, self.m)
        places = {}  # different prefix -> its number
        for prefix in prefixes:
            places.setdefault(tuple(prefix), len(places))
        distinct = list(places)
        if prefixes:
            longest = max(len(prefix) for prefix in prefixes)
            batch = min(batch, memory.rows_beside_others(model, longest + self.m))
        scores = torch.zeros(len(distinct), device=self.head.weight.device)
        for numbers in like_lengths(distinct, batch):
            cache, _ = prefill(model, [distinct[i] for i in numbers], self.m)
            scores[numbers] = self.check(model, cache)
            if bar is not None:
                bar.update(len(numbers))
        if bar is not None:
            bar.update(len(prefixes) - len(distinct))
        return scores[[places[tuple(prefix)] for prefix in prefixes]]

    def trained_for(self):
        """The checkpoints (in new tokens) whose prefixes it was trained on, the usual one first."""
        found = self.trained.get("settings", {}).get("prefix", 2048)
        return parse_checkpoints(str(found))

    def trained_limit(self):
        """The limit of a path that it was trained with, in new tokens; None: not known."""
        return self.trained.get("settings", {}).get("max_new_tokens")

    def limit(self, model, prompt_ids, asked=None):
        """The limit of a prompt's paths, in new tokens: `asked`, or the one that it was trained
        with, or what the context leaves."""
        if asked is None:
            asked = self.trained_limit()
        return room(model, prompt_ids, asked)

    def about(self):
        """What must agree between a saved STOP's two files, and with the model it is loaded for."""
        return {
            "m": self.m,
            "shared": self.shared,
            "rank": self.lora.rank,
            "alpha": self.lora.alpha,
            "targets": list(self.lora.targets),
            "head": self.head_kind,
            "base_fingerprint": self.base_fingerprint}

    def weights(self):
        """{name on disk: tensor}: LoRA's pairs bear the names of their linears."""
        return {name.removeprefix("lora."): tensor for name, tensor in self.state_dict().items()}

    def save(self, folder, trained=None):
        """Write stop.safetensors and stop.json (with `trained`: settings and metrics) to a
        folder."""
        self.trained = trained or self.trained
        write_stop(folder, self.about(), self.weights(), self.trained)

    @classmethod
    def load(cls, folder, model):
        """The Stop in a folder, in our layout or that of the authors' released code, for `model`.
        ValueError where a file is missing or broken, or the STOP belongs to another model."""
        saved = read_stop(folder)
        expected = fingerprint(model.config)
        if saved.base_fingerprint not in (None, expected):
            raise ValueError(
                f"{saved.file}: base_fingerprint: found {saved.base_fingerprint!r}, expected "
                f"{expected!r}, the model's: this STOP was trained for another model")
        stop = cls(model, **saved.settings)
        stop.trained = saved.trained
        weights = stop.weights()
        match(saved, {name: weight.shape for name, weight in weights.items()})
        for name, weight in weights.items():
            weight.copy_(saved.tensors[name])
        return stop.eval()  # no dropout


def like_lengths(prefixes, batch):
    """Numbers of the prefixes in groups of at most `batch`, like lengths together: little
    padding."""
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    return [order[start:start + batch] for start in range(0, len(order), batch)]


# -------------------------------------------------------------------- Launch, Check, Resume, vote


def retention(budget, prefix, task):
    """Share of paths to keep (section "interaction scaling law"), for lengths in tokens.

    budget: all generated tokens; prefix: the checkpoint; task: a usual response. Fitted on a 1.5B
    model: 1 / gamma = 1.17e4 * C ** 0.46 * L_prefix ** 0.40 / L_task ** 4.55 in units of 1,024
    tokens; at most 1."""
    for name, value in (("budget", budget), ("prefix", prefix), ("task", task)):
        if value <= 0:
            raise ValueError(f"{name}: found {value}, expected a positive number of tokens")
    C = budget / 1024
    L_prefix = prefix / 1024
    L_task = task / 1024
    return min(1.0, L_task ** 4.55 / (1.17e4 * C ** 0.46 * L_prefix ** 0.40))


class StopSignal:
    """What ranks the paths of a run: STOP's chance that a path ends right. Any other signal has
    these two methods; its scores weigh votes where they can (`are_weights`)."""

    def __init__(self, model, stop):
        self.model = model
        self.stop = stop

    def of_live(self, batch):
        """Scores (B,) of the paths in a Batch, whose tokens are all in its cache."""
        return self.stop.check(self.model, batch.cache)

    def of_ended(self, paths, batch):
        """Scores (paths,) of paths that have ended. Their rows have left the batch (which may have
        noted what another signal needs of them): they are read again, whole."""
        return self.stop.score(self.model, [path.prompt_ids + path.ids for path in paths])


class Watcher:
    """Is told of a run as it goes. This one only looks on."""

    def checked(self, stage, checked, kept):
        """After a check: the Stage, the paths that it scored, and those of them that go on."""

    def resumed(self, batch, paths):
        """Behind the last check: the Batch, and the paths that will finish or have ended."""


@torch.inference_mode()
def launch_check_resume(model, stop, prompt_ids, n=64, keep=8, prefix=None, stages=None,
                        max_new_tokens=None, eos_ids=None, signal=None, watcher=Watcher(),
                        new_batch=Batch, **sampling_settings):
    """n paths of a prompt, of which the best go on at each check: a list of Path, pruned ones
    included; path i is the i-th, branches stand behind the n.

    prefix: the checkpoint, in new tokens; None: what STOP was trained for. stages: [(checkpoint,
    keep), ...] or [(checkpoint, keep, branch), ...] instead of the two: with branch = b each kept
    path that still runs goes on as b paths. max_new_tokens: None: as `Stop.limit` says.
    sampling_settings: temperature, top_k, top_p, seed, as in `generate`. signal: what ranks the
    paths; None: STOP's chances. watcher: what is told of the run. new_batch: makes what decodes
    (engine/launch.py has a faster one).

    A path that ends before a checkpoint is scored whole and competes. It is never revived, nor
    branched. Those that are not pruned in the end vote (`decide`). Ties go to the lower index; with
    keep = n the paths are those of `generate`. Raises ValueError on stages that cannot be."""
    limit = stop.limit(model, prompt_ids, max_new_tokens)
    stages = stages_of(stop, keep, prefix, stages)
    validate_stages(stages, n, limit)
    validate_prompts(model, [prompt_ids], max(limit, stages[-1].checkpoint + stop.m))
    sampling = Sampling(**sampling_settings)
    signal = signal or StopSignal(model, stop)
    capacities = row_capacities(stop, prompt_ids, stages, limit)

    paths = [Path(list(prompt_ids), index) for index in range(n)]
    batch = new_batch(model, paths, capacities[0], limit, sampling, eos_ids)
    alive = list(paths)
    for stage, capacity in zip(stages, capacities[1:]):
        running = list(batch.live)
        batch.decode(until=stage.checkpoint)     # Launch: all paths up to the checkpoint
        score_live(signal, batch)                # Check: [STOP] on the cache, which stays as it was
        score_ended(signal, running, batch)      #        ended paths have left it: prefilled again
        checked = alive
        alive, pruned = best_paths(checked, stage.keep)
        batch.prune(pruned)                      # Resume: the best go on, other rows are freed;
        watcher.checked(stage, checked, alive)
        new_paths = batch.resume(stage.branch, capacity)  # (kept ones that ended have no row)
        alive = alive + new_paths
        paths += new_paths
    watcher.resumed(batch, alive)
    batch.decode(until=limit)
    return paths


def stages_of(stop, keep=8, prefix=None, stages=None):
    """The Stages of a run: those that are given, or one check."""
    if stages is None:
        checkpoint = stop.trained_for()[0] if prefix is None else prefix
        stages = [(checkpoint, keep)]
    return [Stage(*stage) for stage in stages]


def row_capacities(stop, prompt_ids, stages, limit):
    """Positions of a row up to each check, m [STOP] tokens included, and behind the last (where
    these are spare)."""
    ends = [stage.checkpoint for stage in stages] + [limit]
    return [len(prompt_ids) + end + stop.m for end in ends]


def score_live(signal, batch):
    """Score the paths whose prefixes the cache holds. Equal prefixes have one score, that of the
    first of them: rounding differs with a row's place in the batch, and would break ties."""
    if batch.live:
        batch.settle()
        scores = signal.of_live(batch).tolist()
        prefixes = [tuple(path.ids) for path in batch.live]
        for path, score in zip(batch.live, of_first_equal(prefixes, scores)):
            path.score = score


def of_first_equal(prefixes, scores):
    """The scores, in which equal prefixes have the one of the first of them."""
    known = {}
    return [known.setdefault(prefix, score) for prefix, score in zip(prefixes, scores)]


def score_ended(signal, paths, batch):
    """Score those of `paths`, which ran at the last check, that have ended since."""
    ended = [path for path in paths if path.status != "running"]
    if ended:
        for path, score in zip(ended, signal.of_ended(ended, batch).tolist()):
            path.score = score


def best_paths(paths, keep):
    """(the best `keep` paths, the others); ties go to the lower index, and to the lower branch."""
    ordered = sorted(paths, key=lambda path: (-path.score, path.index, path.branches))
    return ordered[:keep], ordered[keep:]


def vote(answers, weights=None, kind="math"):
    """The answer with most votes, or most weight. None is no vote; equal answers (1/2, 0.5) vote
    together, under the first of them; ties go to the answer that came first."""
    if weights is None:
        weights = [1.0] * len(answers)
    votes = {}
    for answer, weight in zip(answers, weights):
        if answer is None:
            continue
        for known in votes:
            if same_vote(answer, known, kind):
                answer = known
                break
        votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=votes.get) if votes else None


def decide(answers, scores=None, kind="math"):
    """Vote: the answer of a run's finished paths, weighted by their scores where these can be
    weights, else the majority's."""
    weighted = scores is not None and are_weights(scores)
    return vote(answers, scores if weighted else None, kind)


def are_weights(scores):
    """Whether scores can weigh votes: every path has one, and none is negative, as a
    log-probability is."""
    return all(score is not None and score >= 0 for score in scores)


def solve(model, stop, tokenizer, prompt_ids, kind="math", **how):
    """The answer to a prompt: Launch, Check, Resume, and the vote of the paths that went on; None
    where no path gives one. kind: "math" or "choice". how: as in `launch_check_resume`."""
    paths = launch_check_resume(model, stop, prompt_ids, **how)
    finished = [path for path in paths if path.status != "pruned"]
    answers = [extract_answer(tokenizer.completion(path.ids), kind) for path in finished]
    return decide(answers, [path.score for path in finished], kind)


if __name__ == "__main__":
    from commands.stop import main
    main()
