r"""The answer in a response, and whether two answers are the same.

Soft labels, avg@k and votes rest on these two (paper, the appendix on prompts and evaluation). No
text, however hostile, may raise or hang: extraction takes time linear in the text, and comparing
takes bounded work. Looked up, not run: sample.py extracts and grades, stop.py's vote compares.
"""
import re

from plumbing.arithmetic import CLOSE
from plumbing.claims import claims_of, is_in_its_base, without_spaces_before_letters
from plumbing.readings import readings_of, same_reading

MAX_ANSWER = 400  # characters; a longer answer equals only itself, which bounds the work
ROUNDED = 1e-9  # relative: what a decimal of nine places is away from what it rounds


# The answer in a response

# What models are taught to end a turn with, and what opens the user's next one. Behind it a model
# that was not stopped goes on in the names of both.
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
               "<|return|>", "<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>", "</s>", "<end_of_turn>")
_NEXT_TURN = ("<|im_start|>user", "<|start_header_id|>user", "<|start|>user", "<start_of_turn>user",
              "<｜User｜>", "<|user|>")
_TURN_END = re.compile(f"(?:{'|'.join(map(re.escape, END_OF_TURN + _NEXT_TURN))})(?! *}})")
_TEMPLATE_MARKS = re.compile(r"<[|｜][^<>\n]{0,40}[|｜]>")
_BRACES = re.compile(
    r"(\\(?:boxed|fbox)\s*)?\{|\}|\\[{}]"
    # \boxed 18, without braces: a number or a choice's letter
    r"|\\(?:boxed|fbox)\s*(?:(?P<number>-?[0-9][0-9.,/]*)(?=[\s$*)]|\\[)\]]|$)"
    r"|(?P<letter>(?<=\s)[A-F])(?=[.$)]|\\[)\]]|\s*$))")
# Spaces and spacing macros at the end of a text, in reverse: "57\ " is 57, "57\, " too.
_SPACING_REVERSED = re.compile(r"(?:[\s,;:!]\\(?!\\)|\s|~)*")

MAX_LAST_LINE = 1000  # characters in which a verdict is looked for
MAX_BOXES = 8  # of one answer
# Between two boxes that are one answer stand a comma or an "and", and nothing but names and what
# lists the like: another word tells of another quantity ("spends 12, leaving her with 30"), and so
# does a formula (m = 3 and n = 4, and m + n = 7).
_LISTS = re.compile(r"[,;&]|\b(?:and|or)\b")
_SENTENCE_ENDS = re.compile(r"[.?!][^\w\s]*\s|\n\s*\n")
# A unit behind the box: degrees, percent, in \text, or one word ("4 apples and 3 pears").
_UNIT_BEHIND = re.compile(
    r"(?:\s|\^\s*\{?\s*\\circ\s*\}?|\\[%$,;)\]]|[$%°*])*"
    r"(?:\\(?:text|mathrm)\s*\{(?!\W*(?:and|or)\b)[^{}]*\}"
    r"|(?!(?:and|or|each)\b)[a-z]{2,}(?=,? (?:and|or) |,))?")
_WORDS_BETWEEN = frozenset(
    """and or also either both the other another one second third fourth next as well for is are
    solution solutions root roots zero zeros pi angle triangle text textbf mathrm mathbf quad qquad
    left right alpha beta gamma theta lambda mu phi omega""".split())

_WRAP = "boxed|text|textbf|textit|textrm|textsf|mathbf|mathrm|mathsf|mathit|bm|boldsymbol"
# Neither the start of a word or formula (C6H6, D'Alembert), nor the article in "answer: a good
# question". Six letters: ZebraLogic has that many, and a later one, I, is mostly prose.
_FIELD = re.compile(
    r"(?i:answer)[^A-Za-z0-9:]{0,8}:[^A-Za-z0-9]{0,12}"
    rf"(?:(?i:{_WRAP}|the|correct|final|answer|is|option|choice)[^A-Za-z0-9]{{1,6}}){{0,6}}"
    r"([A-F]|[a-f](?! +[A-Za-z]))(?![A-Za-z0-9]|['’-][A-Za-z])"
)
# A second letter behind the first: "A or D", "A, D", "(A) and (D)".
_SECOND_LETTER = (
    r"[)\]}*$\"”\s]*(?:[,/&]|\b(?:and|or)\b)[^A-Za-z0-9]*"
    rf"(?:(?:and|or|both|either|option|choice|{_WRAP})[^A-Za-z0-9]+){{0,4}}"
    r"(?:[A-F]|(?<=\()[a-f](?=\)))(?![A-Za-z0-9]| (?:is|was|has|would|does|can))"
)
_AND_SECOND = re.compile(_SECOND_LETTER)
_TWO_LETTERS = re.compile(rf"(?:\\[A-Za-z]+|[\W_])*[A-F]{_SECOND_LETTER}")
# Behind a letter that is denied ("Answer: A is wrong") or is a quantity ("Answer: E = mc^2").
_NO_CHOICE = re.compile(
    r"[)\]}*$\"”]{0,6}\s{0,3}(?:[=^+≈]|(?i:(?:is|was|seems|looks|must be|would be) (?:[a-z]+ly )?"
    r"(?:wrong|incorrect|not|false|invalid|impossible|ruled out|eliminated|out)\b"
    r"|(?:isn|wasn|can|doesn)['’]t\b|cannot\b|(?:can|does|would) not\b))")


def extract_answer(text, kind="math", whole=False):
    r"""The answer in a response, as it was written, or None. Never raises; linear in the text.

    What follows the last `</think>` counts, or harmony's last `final` message, or nothing where
    thinking has no end; the whole text if `whole` is set or no such marks are there. Where the
    prompt opened `<think>`, the caller puts it before the response.
    Nothing counts behind the first mark that ends a turn (END_OF_TURN) or opens the user's.
    "math": the last balanced \boxed{...} or \fbox{...}, with those before it in a list in the same
    sentence ("$\boxed{4}$ and $\boxed{7}$" is "4, 7", but a box behind "so the total is" stands
    alone), or a number behind \boxed without braces.
    "choice": the last `answer: letter` or the last boxed letter, whichever stands later, else one
    alone on the last line, else one that the last line states in prose ("The correct answer is
    **B**."). Two letters are none; nor is one that is denied ("Answer: A is wrong") or computed
    with ("Answer: E = mc^2").
    """
    if not isinstance(text, str):
        return None
    text = _first_turn(text)
    if not whole:
        text = _after_thinking(text)
    text = _TEMPLATE_MARKS.sub("", text).rstrip()
    boxes = _boxes(text)
    box = _boxed(text, boxes)
    if kind == "choice":
        return _chosen_letter(text, box, boxes[-1][0] if boxes else -1)
    return box


def _after_thinking(text):
    """The part of a response that is addressed to the user; empty where thinking has not ended."""
    if "<|channel|>" in text:
        _, final, message = text.rpartition("<|channel|>final")
        if not final:
            return ""
        message = message.partition("<|message|>")[2]
        return re.split(r"<\|(?:end|return)\|>", message)[0]
    answer = text.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer


def _first_turn(text):
    """The text up to the first mark that ends a turn; of texts without channels, <|end|> too."""
    end = _TURN_END.search(text)
    if end:
        text = text[: end.start()]
    return text if "<|channel|>" in text else text.partition("<|end|>")[0]


def _boxed(text, boxes):
    """The content of the last of a text's boxes, or None; of several that are listed in one
    sentence their contents in a list."""
    if not boxes:
        return None
    contents = [boxes[-1][2]]
    for place in range(len(boxes) - 1, max(0, len(boxes) - MAX_BOXES), -1):
        _, end, content = boxes[place - 1]
        if not _lists(text[end : boxes[place][0]]):
            break
        contents.insert(0, content)
    different = []
    for content in contents:
        if not any(same_vote(content, known) for known in different):
            different.append(content)
    return ", ".join(different)


def _lists(between):
    """Whether what stands between two boxes makes them one list."""
    if len(between) > 200 or not _LISTS.search(between) or _SENTENCE_ENDS.search(between):
        return False
    between = _UNIT_BEHIND.sub("", between, count=1).replace("**", "")
    if re.search(r"[-+*/^<>|]", between):
        return False
    words = re.findall(r"[A-Za-z]+", between)
    return all(word.lower() in _WORDS_BETWEEN or _is_name(word) for word in words)


def _is_name(word):
    """Whether a word is a variable (x), a line or an angle (AB, ABC)."""
    return len(word) == 1 or len(word) <= 3 and word.isupper()


def _boxes(text):
    """(begin, end, content) of the innermost boxes, balanced and not blank or without braces, in
    order."""
    boxes = []
    opened = []  # per open brace: (begin, where its content begins) of a box; None of no box
    innermost = -1
    for match in _BRACES.finditer(text):
        if match[0] == "}" and opened:
            box = opened.pop()
            if box is not None and box[0] > innermost:
                content = _without_spacing(text[box[1] : match.start()])
                if content:
                    boxes.append((box[0], match.end(), content))
                    innermost = box[0]
        elif match["number"] or match["letter"]:
            content = match["letter"] or match["number"].rstrip(".,/")
            boxes.append((match.start(), match.end(), content))
            innermost = match.start()
        elif match[1]:
            opened.append((match.start(), match.end()))
        elif match[0] == "{":
            opened.append(None)
    return boxes


def _without_spacing(content):
    r"""The content of a box without spaces and spacing macros (`\ `) around it."""
    content = content.lstrip()
    spacing = _SPACING_REVERSED.match(content[::-1])
    return content[: len(content) - spacing.end()]


def _chosen_letter(text, box, box_begin):
    """The letter that a response to a multiple-choice question gives, or None. box: the content of
    its last box, which begins at `box_begin`, or None."""
    letter_in_box = _letter(box or "") or _option(box or "")
    field = _last_field(text)
    if field and box_begin > field.start(1):
        if letter_in_box:
            return letter_in_box
        if _TWO_LETTERS.match(box):
            return None
    if field:
        return None if _AND_SECOND.match(text, field.end()) else field[1].upper()
    last_line = text.rpartition("\n")[2]
    return (letter_in_box or _letter(last_line) or _bold_option(last_line)
            or _stated_letter(text))


def _last_field(text):
    """The match of the last `answer: letter` that stands: neither it nor a later one of the same
    letter is denied. None if there is none."""
    standing = {}
    for field in _FIELD.finditer(text):
        letter = field[1].upper()
        if _NO_CHOICE.match(text, field.end()):
            standing.pop(letter, None)
        else:
            standing[letter] = field
    return max(standing.values(), key=lambda field: field.start(), default=None)


def _letter(text):
    r"""C of "C", "(c)", "**C**", "\textbf{(C)}", "Option C"; else None."""
    match = re.fullmatch(
        r"(?:\\[A-Za-z]+|(?i:option|choice|answer)|[\W_])*([A-Fa-f])[\W_]*", text[:100])
    return match[1].upper() if match else None


_OPTION = re.compile(
    r"(?:\\[A-Za-z]+|(?i:option|choice|answer)(?![A-Za-z])|[^\w\\])*"
    r"([A-Fa-f])(?:[*}\s$]*[).:\]]|\s+[-–—]\s|\s*\}\s*)(?![A-Za-z])")
_NEXT_OPTION = re.compile(r"(?:[,;\n]|\b(?:and|or)\b|\\\\)[^A-Za-z0-9]*[A-F]\s*[):.]")


def _option(text):
    r"""C of an option with its text, "C) 12", "\text{C. A worm}", "E: none of these"; else None."""
    match = _OPTION.match(text[:100])
    if match is None:
        return None
    rest = match.end(1)
    if _AND_SECOND.match(text, rest) or _NEXT_OPTION.search(text, rest):
        return None
    return match[1].upper()


def _bold_option(line):
    """C of a line that is an option in bold, "**C) 12**"; else None."""
    bold = re.fullmatch(r"\s*\*\*([^*]+)\*\*[.\s]*", line)
    return _option(bold[1]) if bold else None


# "The correct answer is **B**.", "the answer is option (C)", "The right choice should be: D"
_STATEMENT = re.compile(
    r"(?i:\b(?:answer|(?:correct|right|best) (?:option|choice))"
    r"(?: (?:to|for|of|among|from) [a-z]+(?: [a-z]+){0,4}?)?"
    r" (?:is|should be|must be)"
    r"(?: (?:therefore|thus|then|indeed|clearly|likely|probably))?)"
    r"[^A-Za-z0-9?]{1,12}"
    r"(?:(?i:the|correct|option|choice|letter|text|textbf|mathbf|mathrm)[^A-Za-z0-9?]{1,6}){0,4}"
    r"([A-Fa-f])(?![A-Za-z0-9])"
)
# What may follow the letter: nothing but marks, a closing mark, the end of a clause (but "B.
# subtilis" names a species), a reason, or the option's text in brackets or after a dash.
_AFTER_LETTER = re.compile(
    r"[\W_]*$|\s?[)\]}*\"”$]|\.(?!\s*[a-z])(?![A-Za-z0-9])|[,;:!](?![A-Za-z0-9])"
    r"| (?:because|since|as|due|given|based)\b| [(–—-](?![A-Za-z0-9]-)"
)
_CLAUSE_ENDS = re.compile(r"[,.;:!?\n]|\b(?i:then|so|thus|hence|therefore)\b")
_SUPPOSED = re.compile(
    r"\b(?i:if|whether|when|unless|until|suppose|supposing|assume|assuming|say|not|never"
    r"|would|could|might|may|doubt|unlikely)\b|n['’]t\b"
)
_TURNS = re.compile(
    r"\?|\b(?i:but|wait|however|hmm+|actually|alternatively|unless|let me|let's|let us"
    r"|not sure|double-check)\b"
    rf"|^{_SECOND_LETTER}"
)
# "Option D is correct.", "(D) is the right answer"
_VERDICT = re.compile(
    r"(?:(?P<word>(?i:option|choice|answer)) )?[^A-Za-z0-9?\n]{0,8}\b(?P<letter>[A-F])"
    r"[)\]}*$\"”]{0,4}(?: \([^()\n]{1,80}\))? is"
    r" (?:(?i:therefore|thus|then|indeed|clearly) )?"
    r"(?i:correct|right|the (?:only )?(?:correct|right|best)(?: (?:answer|option|choice|one))?)\b"
)
_OTHER_BEFORE = re.compile(r"\b[A-F]\b[^A-Za-z0-9]*(?:and|or|nor)?[^A-Za-z0-9]*$")
_LEADS_IN = ("", "only", "that", "which means", "i think", "we conclude that", "clearly", "indeed")


def _stated_letter(text):
    """The letter of the last `answer is B` or `B is correct`, if it is a conclusion; else None.

    A conclusion stands on the last line, so that no later text takes it back; its own clause
    supposes or denies nothing ("if the answer is B"); and what follows on the line neither turns
    ("but wait", "?") nor names a second letter ("B or C").
    """
    statements = list(_STATEMENT.finditer(text))
    last_line = max(text.rfind("\n") + 1, len(text) - MAX_LAST_LINE)
    verdicts = list(_VERDICT.finditer(text, last_line))
    if verdicts and (not statements or verdicts[-1].start() > statements[-1].start()):
        return _verdict(text, verdicts[-1])
    if not statements:
        return None
    statement = statements[-1]
    rest = text[statement.end() :]
    if "\n" in rest or not _AFTER_LETTER.match(rest) or _TURNS.search(rest):
        return None
    if _SUPPOSED.search(_clause_before(text, statement.start())):
        return None
    letter = statement[1]
    if letter == "a" and rest == "":  # an article, behind which the tokens ran out
        return None
    return letter.upper()


def _verdict(text, verdict):
    """The letter of `option D is correct`, if it is a conclusion; else None."""
    rest = text[verdict.end() :]
    if not _AFTER_LETTER.match(rest) or _TURNS.search(rest):
        return None
    clause = _clause_before(text, verdict.start())
    if _SUPPOSED.search(clause) or _OTHER_BEFORE.search(clause):
        return None
    words = re.sub("[^a-z ]", "", clause.lower()).strip()
    if verdict["word"] is None and words not in _LEADS_IN:  # "vitamin D is correct"
        return None
    return verdict["letter"]


def _clause_before(text, place):
    """What stands before a place in its clause."""
    return _CLAUSE_ENDS.split(text[max(0, place - 200) : place])[-1]


# Whether two answers are the same

_MANY_DECIMALS = re.compile(r"\.[0-9]{9}")


def same_answer(answer, reference, kind="math"):
    r"""Whether an extracted answer equals the published one. Never raises; bounded work.

    None or blank equals nothing. "choice": the same letter. "math": as `same_vote`, but only the
    brackets of the reference fix the order of a list, and a decimal of nine or more places equals
    what it rounds (to a relative 1e-9). A reference accepts more than a vote unites
    (`claims.py`): the value that a last equation states (m + n = 204 is 204), an inequality for
    its interval, the digits of a number in another base, 4 h for 4h. Of a reference
    `080 or 081 (both were accepted)` either is right.
    """
    if same_vote(answer, reference, kind):
        return True
    if kind == "choice" or not isinstance(answer, str) or not isinstance(reference, str):
        return False
    answer = answer.strip()
    reference = reference.strip()
    if max(len(answer), len(reference)) > MAX_ANSWER:
        return False
    many_decimals = _MANY_DECIMALS.search(answer) or _MANY_DECIMALS.search(reference)
    tolerance = ROUNDED if many_decimals else CLOSE
    return any(_accepts(one, answer, tolerance) for one in _accepted(reference))


def _accepts(reference, answer, tolerance):
    """Whether one reference has a reading of an answer, or claims what the answer claims."""
    if _same_meaning(answer, reference, tolerance) or is_in_its_base(reference, answer):
        return True
    claims = claims_of(answer, reference)
    if any(same_reading(claim, expected, tolerance) for claim, expected in claims):
        return True
    joined = [without_spaces_before_letters(text) for text in (answer, reference)]
    return joined != [answer, reference] and _same_meaning(*joined, tolerance)


def same_vote(answer, other, kind="math"):
    r"""Whether the answers of two paths are one in a vote. Never raises; bounded work.

    "math": numbers compare exactly, or in 40 of 100 digits where they are irrational; expressions
    and equations with variables by their values at fixed points; the rest as text (the grammar is
    in `expressions.py`, the spellings in `readings.py`). Units, percent and degree signs are
    dropped (50\% is 50). A name alone on the left may go (x = 5 is 5); \pm gives two. A comma
    list, bare or in braces, is a multiset; one in ( ) or [ ] (a point, an interval) fixes the order
    too, and the brackets if both have any. `1,234` is one number or two, 1\frac12 is 3/2,
    2\frac53 is 10/3, 1e-3 is 0.001, 5 million is 5000000. Which of the two comes first changes
    nothing.
    """
    if not isinstance(answer, str) or not isinstance(other, str):
        return False
    answer = answer.strip()
    other = other.strip()
    if kind == "choice":
        letter = _letter(answer)
        return letter is not None and letter == _letter(other)
    if answer == other:
        return answer != ""
    return _same_meaning(answer, other) and _same_meaning(other, answer)


def _same_meaning(answer, other, tolerance=CLOSE):
    """Whether a reading of one is a reading of the other; two texts of bounded length."""
    if max(len(answer), len(other)) > MAX_ANSWER:
        return False
    for expected in readings_of(other):
        if any(same_reading(found, expected, tolerance) for found in readings_of(answer)):
            return True
    return False


def _accepted(reference):
    """The answers that are right: two of `080 or 081 (both were accepted)`, else the reference."""
    note = re.fullmatch(r"(.+?)\s*\((?:both|either|all)\b[^()]*\baccepted\)", reference)
    return re.split(r",? or |, ", note[1]) if note else [reference]
