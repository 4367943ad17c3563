"""`sample.sample_paths` and `train.make_labels` as jobs: a record as soon as it is made, taken up
where a run stopped, shared by the processes of a run. tests/engine/test_stored.py and
test_9_labels_and_fit (tests/test_invariants.py) compare them.

A file of paths is named by all that shapes them, the weights included.
"""
import dataclasses

from engine.refill import sample_all
from plumbing import processes
from plumbing.checkpoint import fingerprint, weights_digest
from plumbing.grading import grade, grader
from plumbing.progress import progress
from plumbing.records import Job, digest
from sample import room, sampling_of, validate_prompts
from train import Example, count_right, cut_prefixes, require_room, stratify


def model_digest(model):
    """Digits that stand for a model: its config and every byte of its weights."""
    return digest(fingerprint(model.config), weights_digest(model))


def stop_digest(stop):
    """Digits that stand for a STOP: its shape and every byte of its weights."""
    return digest(stop.about(), weights_digest(stop))


def sample_paths(model, tokenizer, problems, folder, n, max_new_tokens, sampling, batch=None):
    """n finished, graded paths of each problem, stored in `folder` and read from there the next
    time: the records of `sample.sample_paths`.

    Interrupted, it is taken up where it stopped; ValueError on an edited line or another run's."""
    prompts = [tokenizer.ask(problem) for problem in problems]
    limit = min(room(model, prompt, max_new_tokens) for prompt in prompts)
    validate_prompts(model, prompts, limit)
    graded = [[problem.id, problem.kind, problem.answer] for problem in problems]
    identity = digest(model_digest(model), list(model.config.eos_ids),
                      prompts, graded, n, limit, dataclasses.asdict(sampling))
    folder.mkdir(parents=True, exist_ok=True)
    heads = [{"id": problem.id, "prompt_ids": prompt} for problem, prompt in zip(problems, prompts)]
    job = Job(folder / f"paths-{identity[:12]}.jsonl", identity, heads)
    todo = processes.mine(job.todo())

    def store(number, paths):
        ids = [path.ids for path in paths]
        answers, right = grade(tokenizer, problems[todo[number]], ids)
        job.add(todo[number], {
            "answers": answers, "right": right, "paths": ids, "grader": grader()})

    missing = [prompts[i] for i in todo]
    with job, progress("paths", len(todo) * n * limit, "tok") as bar:
        sample_all(model, missing, n, limit, sampling, store, batch=batch, bar=bar)
    return graded_now(job.finish(), tokenizer, problems)


def graded_now(records, tokenizer, problems):
    """Records as this grader grades them: paths that another one graded are graded again."""
    older = 0
    for record, problem in zip(records, problems, strict=True):
        if record.pop("grader", None) != grader():
            record["answers"], record["right"] = grade(tokenizer, problem, record["paths"])
            older += 1
    if older and processes.is_first():
        print(f"paths: those of {older} problems were graded by another version of the grader, "
              "and are graded again", flush=True)
    return records


def make_labels(model, tokenizer, problems, settings, out, told=None):
    """The Examples of `train.make_labels`, a record each in out/labels.jsonl. told(records, cuts)
    is called once the paths are there and cut."""
    records = sample_paths(model, tokenizer, problems, out, settings.paths, settings.max_new_tokens,
                           sampling_of(settings), settings.batch)
    staying = stratify(records, problems, settings)
    cuts = cut_prefixes(staying, settings)
    if processes.is_first():
        print(f"stratified: {len(staying)} of {len(problems)} problems stay, with {len(cuts)} "
              "prefixes", flush=True)
        if told is not None:
            told(records, cuts)
    limit = require_room(model, [record["prompt_ids"] for record in records], settings)
    examples = []
    for label in roll_out(model, tokenizer, cuts, limit, settings, out):
        examples.append(Example(label["prefix_token_ids"], label["soft_label"], label["id"],
                                label["checkpoint"]))
    return examples


def roll_out(model, tokenizer, cuts, limit, settings, out):
    """The soft labels of Cuts, as `train.roll_out` gives them: a record each."""
    if not cuts:
        raise ValueError(
            f"data: found no problem with {settings.low} to {settings.high} of {settings.paths} "
            "paths right, expected some to train on")
    K = settings.rollouts
    sampling = sampling_of(settings)
    graded = [[cut.problem.kind, cut.problem.answer] for cut in cuts]
    identity = digest(model_digest(model), list(model.config.eos_ids),
                      dataclasses.asdict(sampling), graded, K, limit)
    job = Job(out / "labels.jsonl", identity, [about(cut) for cut in cuts])
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
            prompts = [cuts[i].prefix_ids for i in chosen]

            def count(place, paths):
                i = chosen[place]
                add(i, count_right(tokenizer, cuts[i], paths))

            length = limit - checkpoint
            total = len(prompts) * K * length
            with progress(f"rollouts from {checkpoint}", total, "tok") as bar:
                sample_all(
                    model, prompts, K, length, sampling, count, batch=settings.batch, bar=bar)
    return job.finish()


def about(cut):
    """The fields of a Cut's label that say which one it is."""
    return {"id": cut.record["id"], "path": cut.number, "checkpoint": cut.checkpoint,
            "prefix_token_ids": cut.prefix_ids}
