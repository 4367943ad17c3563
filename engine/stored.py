"""Paths and labels as jobs: a record as soon as it is made, and taken up where a run stopped.

A file of paths is named by all that shapes them, the weights included.
"""
import dataclasses

from engine.forecast import restate
from plumbing import processes
from plumbing.answers import extract_answer, same_answer
from plumbing.checkpoint import fingerprint, weights_digest
from plumbing.progress import progress
from plumbing.records import Job, digest
from sample import check_prompts, room, sample_all, sampling_of
from stop import parse_checkpoints
from train import count_right, cut_prefixes, stratify


def model_digest(model):
    """Digits that stand for a model: its config and every byte of its weights."""
    return digest(fingerprint(model.config), weights_digest(model))


def stop_digest(stop):
    """Digits that stand for a STOP: its shape and every byte of its weights."""
    return digest(stop.about(), weights_digest(stop))


def sample_paths(model, tokenizer, problems, folder, n, max_new_tokens, sampling, batch=None):
    """n finished, graded paths of each problem, stored in `folder` and read from there the next
    time.

    Returns records in the order of the problems: {"id", "prompt_ids", "answers", "right",
    "paths"}, the last three with an entry a path. The file is named by all that shapes the paths,
    weights included. Interrupted, it is taken up where it stopped; ValueError on an edited line or
    another run's."""
    prompts = [tokenizer.ask(problem) for problem in problems]
    limit = min(room(model, prompt, max_new_tokens) for prompt in prompts)
    check_prompts(model, prompts, limit)
    graded = [[problem.id, problem.kind, problem.answer] for problem in problems]
    identity = digest(model_digest(model), list(model.config.eos_ids),
                      prompts, graded, n, limit, dataclasses.asdict(sampling))
    folder.mkdir(parents=True, exist_ok=True)
    heads = [{"id": problem.id, "prompt_ids": prompt} for problem, prompt in zip(problems, prompts)]
    job = Job(folder / f"paths-{identity[:12]}.jsonl", identity, heads)
    todo = processes.mine(job.todo())

    def store(number, paths):
        problem = problems[todo[number]]
        answers = [extract_answer(tokenizer.completion(path.ids), problem.kind) for path in paths]
        right = [same_answer(answer, problem.answer, problem.kind) for answer in answers]
        ids = [path.ids for path in paths]
        job.add(todo[number], {"answers": answers, "right": right, "paths": ids})

    with job, progress("paths", len(todo) * n * limit, "tok") as bar:
        sample_all(model, [prompts[i] for i in todo], n, limit, sampling, store, None, batch, bar)
    return job.finish()


def make_labels(model, tokenizer, problems, settings, out, plan):
    """Soft labels of prefixes, a record each in out/labels.jsonl; -> the records, in order."""
    sampling = sampling_of(settings)
    records = sample_paths(model, tokenizer, problems, out, settings.paths, settings.max_new_tokens,
                           sampling, settings.batch)
    staying = stratify(records, settings)
    pairs = zip(records, problems)
    kept = [pair for pair, stays in zip(pairs, staying) if stays]
    cuts = cut_prefixes(kept, settings)
    if processes.is_first():
        print(f"stratified: {len(kept)} of {len(problems)} problems stay, with {len(cuts)} "
              "prefixes", flush=True)
        restate(plan, records, cuts)
    limit = require_room(model, [record["prompt_ids"] for record in records], settings)
    return roll_out(model, tokenizer, cuts, limit, settings, out)


def require_room(model, prompts, settings):
    """The limit of these prompts' paths, in new tokens. Raises ValueError unless every checkpoint
    leaves room for rollouts and for [STOP] tokens."""
    last = max(parse_checkpoints(settings.prefix))
    limit = min(room(model, prompt, settings.max_new_tokens) for prompt in prompts)
    if limit <= last:
        raise ValueError(
            f"prefix: found {last}, expected less than the limit of {limit} new tokens")
    check_prompts(model, prompts, max(limit, last + settings.m))
    return limit


def roll_out(model, tokenizer, cuts, limit, settings, out):
    """The soft labels of Cuts: the share of K continuations that end right, prefix and continuation
    together of at most `limit` new tokens. A path that has ended gets its own grade; with K = 0
    every path does."""
    if not cuts:
        raise ValueError(
            f"data: found no problem with {settings.low} to {settings.high} of {settings.paths} "
            "paths right, expected some to train on")
    K = settings.rollouts
    sampling = sampling_of(settings)
    graded = [[cut.problem.kind, cut.problem.answer] for cut in cuts]
    identity = digest(model_digest(model), dataclasses.asdict(sampling), graded, K, limit)
    job = Job(out / "labels.jsonl", identity, [cut.head() for cut in cuts])

    most = max(1, K)  # successes that a label may have

    def add(i, successes):
        job.add(i, {"soft_label": successes / most, "successes": successes, "rollouts": K})

    with job:
        running = []
        for i in processes.mine(job.todo()):
            if K == 0 or cuts[i].ended:
                add(i, most * cuts[i].record["right"][cuts[i].number])
            else:
                running.append(i)
        for checkpoint in sorted({cuts[i].checkpoint for i in running}):
            chosen = [i for i in running if cuts[i].checkpoint == checkpoint]
            prompts = [job.heads[i]["prefix_token_ids"] for i in chosen]

            def grade(place, paths):
                cut = cuts[chosen[place]]
                add(chosen[place], count_right(tokenizer, cut, paths))

            length = limit - checkpoint
            with progress(f"rollouts from {checkpoint}", len(prompts) * K * length, "tok") as bar:
                sample_all(
                    model, prompts, K, length, sampling, grade, batch=settings.batch, bar=bar)
    return job.finish()
