"""One question through Launch, Check, Resume (section 3), and a file of questions: an answer a
record.

    python stop.py --data questions.jsonl --out answers.jsonl --budget 1400

Each line of the file holds: id, problem, prompt (a digest of its token ids), answer (by score),
majority, votes ({answer: number of paths, weight}), scores ({path: score} of those that went on),
tokens, n, kept, seal; where the right answer is known, also expected, kind, right and
majority_right. A run that was killed
goes on behind its last record; several processes (torchrun) share the questions.
"""
import contextlib
import dataclasses
import json
import time

from commands import picture
from commands.stages import by_plan, stages_asked, tell
from engine.decided import Decider
from engine.launch import launch_check_resume
from engine.stored import model_digest, stop_digest
from plumbing import processes
from plumbing.answers import extract_answer, same_answer
from plumbing.progress import progress
from plumbing.records import Job, digest, locked
from sample import Path as SampledPath
from sample import decoded_tokens, sampling_of, validate_prompts
from stop import Watcher, decide, vote


@dataclasses.dataclass
class Ballot:
    """What a path that was finished says."""
    path: SampledPath
    answer: str | None

    @property
    def score(self):
        """Of the path, at its last check."""
        return self.path.score


@dataclasses.dataclass
class Answered:
    """A question, and what its paths say."""
    paths: list        # of sample.Path, pruned ones included
    ballots: list      # of Ballot, in the order of the paths
    votes: list        # of picture.Vote, the winner first; none where no path gave an answer
    answer: str | None    # by score
    majority: str | None
    tokens: int        # decoded

    @property
    def best(self):
        """The Ballot of the winning answer with the highest score, the first of equals; None where
        there is no answer."""
        return max(self.votes[0].bars, key=lambda ballot: ballot.score) if self.votes else None

    def of(self, answer):
        """The picture.Vote of an answer."""
        return next(vote for vote in self.votes if vote.answer == answer)


def answer_question(model, stop, tokenizer, prompt_ids, kind, n, stages, limit, settings,
                    make_watcher=lambda decider: decider or Watcher(), bar=None):
    """The Answered of a prompt. stages: the checks; limit: of a path, in new tokens.
    make_watcher(engine.decided.Decider or None): what is told of the run."""
    def answer_of(path):
        return extract_answer(tokenizer.completion(path.ids), kind)

    decider = Decider(answer_of, kind) if settings.decide else None
    paths = launch_check_resume(
        model, stop, prompt_ids, n, stages=stages, max_new_tokens=limit,
        watcher=make_watcher(decider), bar=bar, **dataclasses.asdict(sampling_of(settings)))
    finished = [path for path in paths if path.status in ("eos", "length")]
    ballots = [Ballot(path, answer_of(path)) for path in finished]
    answers = [ballot.answer for ballot in ballots]
    return Answered(
        paths=paths,
        ballots=ballots,
        votes=picture.tally(ballots, kind),
        answer=decide(answers, [ballot.score for ballot in ballots], kind),
        majority=vote(answers, kind=kind),
        tokens=decoded_tokens(paths))


# ------------------------------------------------------------------------------ a file of questions


def answer_file(model, stop, tokenizer, problems, settings):
    """Answer Problems into the file settings.out; the last line printed is one JSON object.
    ValueError, before any path is decoded, on a question without room for its paths, or where the
    file holds what another run made."""
    start = time.perf_counter()
    prompts = [tokenizer.ask(problem) for problem in problems]
    limit = min(stop.limit(model, prompt, settings.max_new_tokens) for prompt in prompts)
    settings = by_plan(settings, stop, limit)
    n, stages = stages_asked(settings, stop, limit)
    longest = max(limit, *(stage[0] + stop.m for stage in stages))
    validate_prompts(model, prompts, longest)
    identity = digest(
        model_digest(model), stop_digest(stop), list(model.config.eos_ids), settings.dtype,
        dataclasses.asdict(sampling_of(settings)), n, [list(stage) for stage in stages], limit,
        settings.decide)
    heads = [head_of(problem, prompt) for problem, prompt in zip(problems, prompts)]
    with locked(settings.out) if processes.is_first() else contextlib.nullcontext():
        job = Job(settings.out, identity, heads)
        todo = processes.mine(job.todo())
        done = len(problems) - len(job.todo())
        if done:
            tell(f"{settings.out}: {done} of {len(problems)} questions are answered already")
        with job, progress("questions", len(todo), "question") as bar:
            for i in todo:
                answered = answer_question(
                    model, stop, tokenizer, prompts[i], problems[i].kind, n, stages, limit,
                    settings)
                job.add(i, fields_of(answered, problems[i], n))
                bar.update()
        records = job.finish()
    if processes.is_first():
        result = summary(records) | {"seconds": round(time.perf_counter() - start, 3)}
        for line in describe(result):
            print(line)
        print(json.dumps({"out": settings.out, **result}))


def head_of(problem, prompt_ids):
    """The fields of a record that say which question it answers."""
    head = {"id": problem.id, "problem": problem.problem, "prompt": digest(prompt_ids)}
    if problem.answer is not None:
        head |= {"expected": problem.answer, "kind": problem.kind}
    return head


def fields_of(answered, problem, n):
    """The other fields of a question's record."""
    fields = {}
    if problem.answer is not None:
        fields["right"] = same_answer(answered.answer, problem.answer, problem.kind)
        fields["majority_right"] = same_answer(answered.majority, problem.answer, problem.kind)
    votes = {}
    for one in answered.votes:
        votes[one.answer] = {"number": len(one.bars), "weight": round(one.weight, 6)}
    kept = [path for path in answered.paths if path.status != "pruned"]
    return {
        "answer": answered.answer,
        "majority": answered.majority,
        "votes": votes,
        "scores": {path.name: round(path.score, 6) for path in kept},
        "tokens": answered.tokens,
        "n": n,
        "kept": len(kept),
        **fields}


def summary(records):
    """What a file of answers holds, in numbers; how many are right where that is known."""
    result = {
        "questions": len(records),
        "answered": sum(record["answer"] is not None for record in records),
        "tokens": sum(record["tokens"] for record in records)}
    graded = [record for record in records if "right" in record]
    if graded:
        result["graded"] = len(graded)
        result["right"] = sum(record["right"] for record in graded)
        result["accuracy"] = result["right"] / len(graded)
        right = sum(record["majority_right"] for record in graded)
        result["majority_accuracy"] = right / len(graded)
    return result


def describe(result):
    """A summary in words, line by line."""
    yield (f"{result['answered']:,} of {result['questions']:,} questions have an answer; "
           f"{result['tokens'] / result['questions']:,.0f} tokens a question")
    if "graded" in result:
        yield (f"{result['right']:,} of {result['graded']:,} are right ({result['accuracy']:.1%}); "
               f"by majority {result['majority_accuracy']:.1%}")
