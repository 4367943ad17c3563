"""The answers of paths, and whether they are right."""
from plumbing.answers import extract_answer, same_answer


def grade(tokenizer, problem, completions):
    """(answers, which of them are right) of completions of a problem, lists of token ids. An answer
    is a text, or None."""
    answers = [extract_answer(tokenizer.completion(ids), problem.kind) for ids in completions]
    right = [same_answer(answer, problem.answer, problem.kind) for answer in answers]
    return answers, right
