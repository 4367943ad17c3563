"""Ask an engine that speaks HTTP for the rows of a case. PORTING.md says what it must answer."""
import json
import urllib.error
import urllib.request

import cases
import follow

TIMEOUT = 600  # seconds for one answer


def post(url, request):
    """The JSON object that the engine answers, or None where it does not offer this."""
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    message = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(message, timeout=TIMEOUT) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (404, 405, 501):
            return None
        raise ValueError(f"{url}: found status {error.code}, expected 200, 404 or 501") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{url}: no JSON answer: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{url}: found {type(found).__name__}, expected a JSON object")
    return found


def inputs_of(name, options):
    """The inputs of a case: published, or fresh."""
    if options.fresh is not None:
        return follow.fresh_inputs(name, options.fresh)
    return cases.read_case(name)


def ask(url, name, options):
    """{row: value} of a case, gathered from an engine's answers."""
    url = url.rstrip("/")
    inputs = inputs_of(name, options)
    if name in cases.MODEL_FREE:
        return post(f"{url}/stop/{name}", inputs) or {}
    about = {"case": name, "checkpoint": inputs["checkpoint"], "stop": inputs["stop"],
             "dtype": options.dtype}
    found = {}
    for number, prefix in enumerate(inputs["prefixes"]):
        answer = post(f"{url}/stop/score", about | {"prefix_token_ids": prefix["ids"]})
        if answer is None:
            break
        for row, value in answer.items():
            entries = found.setdefault(row, [None] * len(inputs["prefixes"]))
            entries[number] = value
    labels = inputs["labels"]
    labelled = [prefix["ids"] for prefix in inputs["prefixes"][:len(labels)]]
    training = {"prefixes": labelled, "labels": labels}
    found |= post(f"{url}/stop/train", about | training) or {}
    for number, run in enumerate(inputs["runs"]):
        answer = post(f"{url}/stop/run", about | run)
        if answer is None:
            break
        for row, value in answer.items():
            entries = found.setdefault(row, [None] * len(inputs["runs"]))
            entries[number] = value
    return found
