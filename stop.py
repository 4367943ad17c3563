"""STOP (arXiv 2604.16029, section 3): Launch N paths, Check their prefixes, Resume the best k, and
vote.

    python stop.py --prompt "..." --n 64 --keep 8 --prefix 2048
    python stop.py --score prefixes.jsonl --out scored.jsonl --trace DIR    # one score per record

A frozen model, m learned [STOP] embeddings appended to a cached prefix, a LoRA that is active only
there, and a head on the last [STOP] position's final hidden state h_m:

    h = f([prefix; S]),  p = sigmoid(w h_m + b)  =  the chance that this path ends right   (eq. 4)
"""
import plumbing  # first: what is imported next takes seconds (plumbing/__init__.py)

import re

import torch
import torch.nn.functional as F

from lora import TARGETS, LoRA
from plumbing import memory
from plumbing.answers import same_vote
from plumbing.budget_plan import Stage, check_stages
from plumbing.checkpoint import fingerprint
from plumbing.command_line import shown
from plumbing.stop_files import match, read_stop, write_stop
from plumbing.votes import is_decided
from sample import Batch, Path, Sampling, check_prompts, prefill, require_finite


class Stop(torch.nn.Module):
    """The three trained parts: `tokens` (m, hidden; one row if shared), `lora`, and `head`.

    head "sigmoid": one logit, soft binary cross-entropy (the paper, eq. 4). head "softmax": two
    logits, index 1 = good, soft cross-entropy (the authors' released code). targets None: all
    seven linears, or those of them that the model has. The head starts at zero, so that every
    chance is one half; the tokens start at random with the spread of the model's embeddings.
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

        if targets is None:
            linears = {name.rpartition(".")[2] for name, _ in model.named_modules()}
            targets = [target for target in TARGETS if target in linears]
        self.lora = LoRA(model, rank, 2 * rank if alpha is None else alpha, targets, dropout, seed)

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

    @torch.inference_mode()
    def score(self, model, prefixes, batch=16, bar=None):
        """Chances (N,) float32 that prefixes (prompt + prefix, lists of token ids, ragged) end
        right. Equal prefixes are scored once."""
        check_prompts(model, prefixes, self.m)
        places = {}  # of the different prefixes in `distinct`
        for prefix in prefixes:
            places.setdefault(tuple(prefix), len(places))
        distinct = list(map(list, places))
        if prefixes:
            longest = max(len(prefix) for prefix in prefixes)
            batch = min(batch, memory.rows_beside_others(model, longest + self.m))
        scores = torch.zeros(len(distinct), device=self.head.weight.device)
        for numbers in like_lengths(distinct, batch):
            cache, _ = prefill(model, [distinct[i] for i in numbers], self.m)
            scores[numbers] = self.chance(self(model, cache))
            if bar is not None:
                bar.update(len(numbers))
        if bar is not None:
            bar.update(len(prefixes) - len(distinct))
        return scores[[places[tuple(prefix)] for prefix in prefixes]]

    def trained_for(self):
        """The checkpoints (in new tokens) whose prefixes it was trained on, the usual one first."""
        found = self.trained.get("settings", {}).get("prefix", 2048)
        return parse_checkpoints(str(found))

    def limit(self, asked=None):
        """The limit of a path, in new tokens: `asked`, or the one that it was trained with; None:
        what the context leaves."""
        if asked is not None:
            return asked
        return self.trained.get("settings", {}).get("max_new_tokens")

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


@torch.inference_mode()
def launch_check_resume(model, stop, prompt_ids, n=64, keep=8, prefix=2048, cascade=None,
                        max_new_tokens=16384, temperature=0.6, top_k=40, top_p=0.95, seed=0,
                        branch=1, answer_of=None, kind="math", eos_ids=None, bar=None,
                        on_check=None):
    """n paths of a prompt, of which `keep` are finished: a list of Path, by index, pruned ones
    included.

    cascade: [(checkpoint, keep), ...] or [(checkpoint, keep, branch), ...] instead of (prefix,
    keep, branch). A path that ends before a checkpoint is scored whole and competes: exactly
    `keep` paths vote. Ties go to the lower index; with keep = n the paths are those of `generate`.
    With branch = b each kept path that still runs goes on as b paths (an ended one is never
    revived); new paths stand behind the n. answer_of(path): its answer of this kind, or None; with
    it, decoding stops as soon as no running path can change the vote (`is_decided`), and those
    that still ran are "decided". on_check(checkpoint, checked, kept) is called after each check
    with the paths that it scored and those that go on, new ones included; bar counts tokens.
    Raises ValueError on stages that cannot be."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    stages = [Stage(*stage) for stage in cascade or [(prefix, keep, branch)]]
    check_stages(stages, n, max_new_tokens)
    ends = [stage.checkpoint for stage in stages] + [max_new_tokens]
    check_prompts(model, [prompt_ids], max(max_new_tokens, stages[-1].checkpoint + stop.m))
    capacities = [len(prompt_ids) + end + stop.m for end in ends]
    require_rows(model, n, stages, capacities)

    paths = [Path(list(prompt_ids), index) for index in range(n)]
    batch = Batch(model, paths, n, capacities[0], max_new_tokens, sampling, eos_ids, bar)
    alive = list(paths)
    for stage, capacity in zip(stages, capacities[1:]):
        running = list(batch.live)
        batch.decode(until=stage.checkpoint)     # Launch: all paths up to the checkpoint
        score_live(model, stop, batch)           # Check: [STOP] on the cache, which stays as it was
        score_ended(model, stop, running)        #        ended paths have left it: prefilled again
        checked = alive
        alive, pruned = rank(checked, stage.keep)
        batch.prune(pruned)                      # Resume: the best go on, other rows are freed
        new_paths = batch.resume(stage.branch, capacity)
        alive += new_paths
        paths += new_paths
        if on_check is not None:
            on_check(stage.checkpoint, checked, alive)
    if answer_of is not None:
        batch.on_end = stop_when_decided(batch, alive, answer_of, kind)
        batch.on_end(None)  # those that have ended already may decide it
    batch.decode(until=max_new_tokens)
    return paths


def require_rows(model, n, stages, capacities):
    """Raise ValueError where the rows of a stretch do not fit the free memory: all prefixes are
    held until they are checked. capacities: positions of a row before each check, and behind the
    last."""
    element = model.model.embed_tokens.weight.element_size()
    free = memory.free_bytes(model.device)
    rows = [n] + [stage.keep * stage.branch for stage in stages]
    for count, capacity in zip(rows, capacities):
        needed = count * memory.row_bytes(model.config, capacity, element)
        if needed > free:
            raise ValueError(
                f"n: found {n}; {count} rows of {capacity:,} positions need "
                f"{needed / memory.GB:.1f} GB, {free / memory.GB:.1f} GB are free: lower --n, "
                "--keep or --prefix")


def score_live(model, stop, batch):
    """Score the paths whose prefixes the cache holds."""
    if batch.live:
        batch.settle()
        scores = stop.chance(stop(model, batch.cache))
        prefixes = [tuple(path.ids) for path in batch.live]
        for path, score in zip(batch.live, of_first_equal(prefixes, scores.tolist())):
            path.score = score


def of_first_equal(prefixes, scores):
    """The scores, in which equal prefixes have one, that of the first of them: rounding differs
    with a row's place in the batch, and would break ties."""
    known = {}
    return [known.setdefault(prefix, score) for prefix, score in zip(prefixes, scores)]


def score_ended(model, stop, paths):
    """Score those of `paths`, which ran at the last check, that have ended since, whole: their rows
    have left the cache."""
    ended = [path for path in paths if path.status != "running"]
    scores = stop.score(model, [path.prompt_ids + path.ids for path in ended])
    for path, score in zip(ended, scores.tolist()):
        path.score = score


def rank(paths, keep):
    """(the best `keep` paths, the others); ties go to the lower index, and to the lower branch."""
    ranked = sorted(paths, key=lambda path: (-path.score, path.index, path.branches))
    return ranked[:keep], ranked[keep:]


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
    """The answer of some paths: the vote weighted by their scores, or the majority's where a path
    has none. Terminal, page and studies all ask here."""
    weighted = scores is not None and None not in scores
    return vote(answers, scores if weighted else None, kind)


def stop_when_decided(batch, paths, answer_of, kind):
    """A function for batch.on_end that ends all paths as soon as neither vote of `paths`, by
    majority or by score, can change any more."""
    answers = {}  # name of an ended path -> its answer

    def ended(path):
        if path is not None and path.status == "decided":
            return
        done = [other for other in paths if other.status != "running"]
        running = [other for other in paths if other.status == "running"]
        for other in done:
            if other.name not in answers:
                answers[other.name] = answer_of(other)
        found = [answers[other.name] for other in done]
        scores = [other.score for other in done]
        open_scores = sum(other.score for other in running)
        by_majority = is_decided(found, [1.0] * len(done), len(running), kind)
        if by_majority and is_decided(found, scores, open_scores, kind):
            batch.finish("decided")

    return ended


def parse_checkpoints(text):
    """"2048,1024" -> [2048, 1024]: different numbers of new tokens."""
    if re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text, re.ASCII):
        checkpoints = [int(number) for number in text.split(",")]
        if len(set(checkpoints)) == len(checkpoints):
            return checkpoints
    raise ValueError(
        f"prefix: found {shown(text)}, expected a number of tokens, or several as in 1024,2048")


if __name__ == "__main__":
    from commands.stop import main
    main()
