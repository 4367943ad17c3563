"""Write the published vectors again (sections 3 and 5 of the paper, on tiny checkpoints).

    python oracle/make_vectors.py [--out DIR] [--search true]

The seeds of the runs are those of the published vectors; with --search they are looked for again:
the first from `first_seed` on with which no decision is close, so that other rounding changes no
token. Bit-equal on the same machine. See oracle/README.md.
"""
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the project's root, for its rooms
import cases  # noqa: E402
import manifest  # noqa: E402
import mistakes  # noqa: E402
import reference  # noqa: E402
from plumbing.command_line import command_line, option  # noqa: E402
from sample import draw, generate, probabilities  # noqa: E402
from stop import Watcher, launch_check_resume  # noqa: E402
from vector_files import stop_in_json, write_json  # noqa: E402

CLOSE = 2e-5        # logits, noise and top-p may move by so much
CLOSE_SCORES = 2e-4  # the last path kept leads the first pruned by more


@dataclasses.dataclass
class Settings:
    """What `python oracle/make_vectors.py` can be told."""
    out: str = option(str(HERE / "vectors"), "folder to write")
    search: bool = option(False, "look for the runs' seeds again")
    cases: str | None = option(None, "those to write, as in qwen2,sampler (default: all)")
    mistakes: str | None = option(None, "only these mistakes, by their keys, and no case")


# ------------------------------------------------------------------------------- seeds of the runs


def is_firm(logits, noise, tokens, run):
    """Whether `tokens` (T,) follow from logits (T, V) and noise (T,) if all moves a little."""
    generator = torch.Generator().manual_seed(0)
    if run["temperature"] == 0:
        top = logits.topk(2, dim=-1).values
        return bool((top[:, 0] - top[:, 1] > 1e-3).all())
    for p_shift in (-1e-5, 0.0, 1e-5):
        if run["top_p"] == 1:
            p_shift = 0.0
        moved = logits + CLOSE * torch.randn(logits.shape, generator=generator)
        probs = probabilities(moved, run["temperature"], run["top_k"], run["top_p"] + p_shift)
        for shift in (-CLOSE, CLOSE):
            if draw(probs, noise + shift).tolist() != tokens:
                return False
    return True


def paths_are_firm(model, run, paths):
    """Whether no token of these uninterrupted paths hangs on a close decision."""
    prompt = run["prompt_ids"]
    for path in paths:
        ids = torch.tensor([prompt + path.ids])
        logits = model.logits(model(ids)[0, len(prompt) - 1:-1])
        noise = reference.path_numbers(run, path.index, path.branches, len(path.ids))
        if not is_firm(logits, noise, path.ids, run):
            return False
    return True


def gaps_are_wide(checks, zero_head):
    """Whether at every check the last path kept leads the first one pruned."""
    if zero_head:
        return True
    for check in checks:
        if check.left and min(check.stayed) - max(check.left) <= CLOSE_SCORES:
            return False
    return True


def shows_enough(name, paths, run):
    """Whether the run's paths show what it is there for."""
    checkpoint = run["stages"][-1][0]
    kept = [path for path in paths if path.status != "pruned"]
    ended = [path for path in kept if path.status == "eos" and len(path.ids) <= checkpoint]
    on_limit = [path for path in kept if path.status == "eos"
                and len(path.ids) == run["max_new_tokens"]]
    going_on = [path for path in kept if len(path.ids) > checkpoint + 4]
    ends = run["eos_ids"]
    at_check = [path for path in paths if len(path.ids) == checkpoint and path.ids[-1] in ends]
    if name == "main":
        return bool(ended and at_check and len(going_on) >= 2)
    if name == "cascade":
        return bool(ended and on_limit)
    if name == "branches":
        early = [path for path in paths if path.status == "eos" and len(path.ids) <= 4]
        twice = {tuple(path.ids) for path in kept if len(path.branches) == 2}
        return bool(early and len(twice) >= 4)
    return True


@torch.inference_mode()
def find_seed(model, stop, run, vocab):
    """The first seed from run.first_seed on that shows enough and leaves no decision close."""
    for seed in range(run.first_seed, run.first_seed + 3000):
        inputs = cases.run_inputs(run, seed, vocab)
        checks = []

        class Recorder(Watcher):
            def checked(self, stage, checked, kept):
                stayed = [path.score for path in kept]
                left = [path.score for path in checked if path.status == "pruned"]
                checks.append(SimpleNamespace(stayed=stayed, left=left))

        with reference.without_head(stop, run.zero_head):
            paths = launch_check_resume(
                model, stop, inputs["prompt_ids"], run.n, stages=run.stages, watcher=Recorder(),
                **reference.settings_of(inputs))
        if not shows_enough(run.name, paths, inputs) or not gaps_are_wide(checks, run.zero_head):
            continue
        if not paths_are_firm(model, inputs, [path for path in paths if path.branches]):
            continue
        whole = generate(model, [inputs["prompt_ids"]], run.n, **reference.settings_of(inputs))[0]
        if paths_are_firm(model, inputs, whole):
            return seed
    raise ValueError(f"{run.name}: found no seed without close decisions")


def seed_of(case, run, model, stop, search):
    """The run's seed: the published one, or one that is looked for."""
    file = HERE / "vectors" / case.name / "case.json"
    if not search and file.is_file():
        for published in cases.read_case(case.name).get("runs", []):
            if published["name"] == run.name:
                return int(published["seed"])
    return find_seed(model, stop, run, model.config.vocab_size)


# ------------------------------------------------------------------------------------------ writing


def write_case(case, out, search):
    """case.json, expected.json and stop.json of a case."""
    folder = out / case.name
    model = case.model()
    if case.golden is None:
        cases.make_stop(case, model).save(folder / "stop")
    stop = case.stop(model, out)
    vocab = model.config.vocab_size
    prefixes, labels = cases.prefixes_of(case, vocab)
    runs = []
    if "run" in case.levels:
        for run in cases.RUNS:
            runs.append(cases.run_inputs(run, seed_of(case, run, model, stop, search), vocab))
            print(f"{case.name}: run {run.name}: seed {runs[-1]['seed']}", flush=True)
    inputs = {
        "name": case.name,
        "checkpoint": case.checkpoint,
        "stop": case.stop_name,
        "levels": list(case.levels),
        "prefixes": prefixes,
        "labels": labels,
        "runs": runs}
    expected = reference.case_rows(case, model, stop, inputs)
    write_json(folder / "case.json", inputs)
    write_json(folder / "expected.json", expected)
    write_json(folder / "stop.json", stop_in_json(stop))


def main(settings):
    """Write the cases, the mistakes and the manifest."""
    torch.set_num_threads(1)
    out = Path(settings.out)
    known = [*cases.BY_NAME, *cases.MODEL_FREE]
    names = known if settings.cases is None else settings.cases.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"cases: found {name[:60]!r}, expected some of {', '.join(known)}")
    keys = None if settings.mistakes is None else settings.mistakes.split(",")
    for key in keys or ():
        if key not in mistakes.TITLES:
            raise ValueError(f"mistakes: found {key[:60]!r}, expected keys of mistakes.py")
    for name in names if keys is None else ():
        if name == "sampler":
            inputs = cases.sampler_inputs()
            write_model_free(name, inputs, reference.sampler_rows(inputs), out)
        elif name == "choices":
            inputs = cases.choices_inputs()
            write_model_free(name, inputs, reference.choices_rows(inputs), out)
        else:
            write_case(cases.BY_NAME[name], out, settings.search)
    mistakes.write_all(out, names, keys)
    manifest.write(out)
    print(json.dumps({"out": str(out)}))


def write_model_free(name, inputs, expected, out):
    """case.json and expected.json of a case without a model."""
    write_json(out / name / "case.json", {"name": name} | inputs)
    write_json(out / name / "expected.json", expected)


if __name__ == "__main__":
    command_line(Settings, main)
