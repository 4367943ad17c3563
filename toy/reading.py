"""Where a path of the embedded toy goes wrong: its lines, held against the right reading.

A second, independent reading of what make.py writes. Looked up by studies/picture.py and
studies/walkthrough.py; not run.

A question is "Q : Tom has 25 coins . gives 4 to each of 2 friends . ... What is the count ? <nl>".
A path is "Start : 25 coins . <nl>", then a line a sentence, "Next gives 4 to each of 2 friends :
4 * 2 = 8 , 25 - 8 = 17 . <nl>", and "Answer : \\boxed{ 17 }". It may take lines back: "Wait , no .
Back to 25 . <nl>" the last one, "Wait , no . Redo From the Start : 25 . <nl>" all of them.
"""
import re

QUESTION = re.compile(r"Q : \w+ has (\d+) \w+ \. (.+) \. What is the count \? <nl>")
LINE = re.compile(r"(?:Next|Then) (.+) : (.+) \. <nl>")


def right_count(sentence, count):
    """The count after a sentence of a question, read rightly."""
    numbers = [int(number) for number in re.findall(r"\d+", sentence)]
    if sentence.startswith("gets"):         # gets 3 bags with 4 each
        return count + numbers[0] * numbers[1]
    if sentence.startswith("gives"):        # gives 3 to each of 4 friends
        return count - numbers[0] * numbers[1]
    if sentence.startswith("has"):          # has 3 more than the box , which is the count now
        return count - numbers[0]
    if sentence.startswith("finds twice"):  # finds twice as many again
        return 3 * count
    if sentence.startswith("buys"):         # buys 3 , drops 4
        return count + numbers[0] - numbers[1]
    if sentence.startswith("finds"):        # finds 3
        return count + numbers[0]
    if sentence.startswith("loses"):        # loses 3
        return count - numbers[0]
    raise ValueError(f"sentence: found {sentence[:60]!r}, expected one of the toy's")


def right_lines(question):
    """(sentence, right count after it) of each sentence of a question of the toy; None of another
    question."""
    match = QUESTION.fullmatch(question.strip())
    if match is None:
        return None
    count = int(match[1])
    lines = []
    for sentence in match[2].split(" . "):
        count = right_count(sentence, count)
        lines.append((sentence, count))
    return lines


def wrong_part(question, text):
    """(first, behind the last) character of the line where a path leaves the right reading and is
    never taken back; None where there is none. The text may end anywhere."""
    expected = right_lines(question)
    if expected is None:
        return None
    wrong = {}  # number of a sentence -> the line that misread it
    number = 0  # the sentence that comes next
    for line in re.finditer(r"\S.*?<nl>", text):
        words = line[0]
        if words.startswith("Wait"):
            number = 0 if "Redo" in words else max(0, number - 1)
            wrong = {known: span for known, span in wrong.items() if known < number}
            continue
        read = LINE.fullmatch(words)
        if read is None:  # the start line
            continue
        if number == len(expected):
            wrong[number] = line.span()
            continue
        if is_wrong(read, *expected[number]):
            wrong[number] = line.span()
        number += 1
    return wrong[min(wrong)] if wrong else None


def is_wrong(read, sentence, count):
    """Whether a line is about another sentence, or comes to another count."""
    reached = read[2].rpartition(" = ")[2]
    return read[1] != sentence or reached != str(count)
