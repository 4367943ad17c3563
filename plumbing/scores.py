"""The file that `python stop.py --score` writes: a score a record, in order, resumable, with
traces if wanted.

In: JSON lines with `prefix_token_ids` (plumbing/labels.py). Out: for each a line of: line, id,
prefix (a digest of the ids), dtype, model and stop (digests of weights), label, logits, score. A
trace is a file LINE.safetensors of the [STOP] positions' states: `layers` (layers, m, hidden)
after each decoder layer, `hidden` (m, hidden) after the norm.
"""
import contextlib
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save

from plumbing.files import is_there, read_bytes
from plumbing.progress import progress
from plumbing.records import Job, digest, locked, write_atomic


def score_file(prefixes, batches, check, chance, who, out=None, trace=None):
    """Score LabelledPrefix records and write `out` (None: print), and a summary as the last line.

    batches: numbers of the prefixes that share a pass. check(list of ids) -> (head logits, states)
    of one batch; chance(logits) -> chances; who: which model, STOP and dtype. trace: a folder for
    the states. ValueError where `out` holds scores of another input, model, STOP or dtype, or
    where the trace of a score is missing."""
    heads = []
    for prefix in prefixes:
        heads.append({
            "line": prefix.line,
            "id": prefix.problem,
            "prefix": digest(prefix.ids),
            "label": prefix.label})
    if trace is not None:
        Path(trace).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        for path in (trace, out):
            if path is not None:
                locks.enter_context(locked(path))
        if out is None:
            scores = _print_scores(prefixes, batches, check, chance, heads, who, trace)
        else:
            job = Job(out, digest(who), [who | head for head in heads])
            _require_traces(job, prefixes, trace)
            with job:
                _score_missing(job, prefixes, batches, check, chance, trace)
            scores = [record["score"] for record in job.finish()]
    print(json.dumps(summary(scores, [prefix.label for prefix in prefixes])))


def _score_missing(job, prefixes, batches, check, chance, trace):
    """Make the records that the job lacks, a batch at a time; a batch is the same in every run."""
    missing = set(job.todo())
    done = len(prefixes) - len(missing)
    with progress("score", len(prefixes), "prefix", done) as bar:
        for numbers in batches:
            wanted = missing.intersection(numbers)
            if not wanted:
                continue
            for number, fields, states in _score_batch(prefixes, numbers, check, chance):
                if number in wanted:
                    job.add(number, fields | _write_trace(trace, prefixes[number], states))
            bar.update(len(wanted))


def _score_batch(prefixes, numbers, check, chance):
    """Yield (number, {logits, score}, states) of the prefixes of one batch."""
    logits, states = check([prefixes[number].ids for number in numbers])
    for row, number in enumerate(numbers):
        if not torch.isfinite(logits[row]).all():
            raise ValueError(
                f"line {prefixes[number].line}: score: found NaN or infinity, expected a finite "
                "number")
    chances = chance(logits).tolist()
    for row, number in enumerate(numbers):
        yield number, {"logits": logits[row].tolist(), "score": chances[row]}, states[row]


def _write_trace(trace, prefix, states):
    """Write the states of one prefix, if asked to; -> {"trace": the file's digest} for its record,
    or {}."""
    if trace is None:
        return {}
    content = save({"layers": states[:-1].contiguous(), "hidden": states[-1].contiguous()})
    write_atomic(_trace_file(trace, prefix), content)
    return {"trace": hashlib.sha256(content).hexdigest()}


def _trace_file(trace, prefix):
    return Path(trace) / f"{prefix.line:06}.safetensors"


def _require_traces(job, prefixes, trace):
    """Raise ValueError where a score that is there already has no trace, or another one."""
    if trace is None:
        return
    for prefix, record in zip(prefixes, job.records):
        if record is None:
            continue
        file = _trace_file(trace, prefix)
        if not is_there(file):
            raise ValueError(
                f"{file}: missing, but {job.file} has its score: choose another --out, or remove "
                "the file")
        if hashlib.sha256(read_bytes(file)).hexdigest() != record.get("trace"):
            raise ValueError(
                f"{file}: found other states than those of its score in {job.file}: remove both")


def _print_scores(prefixes, batches, check, chance, heads, who, trace):
    """Score everything, then print the records in the order of the file; -> the scores."""
    records = [None] * len(prefixes)
    for numbers in batches:
        for number, fields, states in _score_batch(prefixes, numbers, check, chance):
            traced = _write_trace(trace, prefixes[number], states)
            records[number] = who | heads[number] | fields | traced
    for record in records:
        print(json.dumps(record))
    return [record["score"] for record in records]


def summary(scores, labels):
    """Count and mean of the scores; where there are labels MSE and hard-label accuracy, as the
    authors' evaluator has them: right is what lies above one half, of scores and of labels."""
    report = {"count": len(scores), "mean_score": sum(scores) / len(scores)}
    pairs = [(score, label) for score, label in zip(scores, labels) if label is not None]
    if pairs:
        squares = [(score - label) ** 2 for score, label in pairs]
        agreements = [(score > 0.5) == (label > 0.5) for score, label in pairs]
        report["labels"] = len(pairs)
        report["mse"] = sum(squares) / len(pairs)
        report["hard_label_accuracy"] = sum(agreements) / len(pairs)
    return report
