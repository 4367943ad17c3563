"""Write the published vectors again (sections 3 and 5 of the paper, on tiny checkpoints).

    python oracle/making/make_vectors.py [--out DIR] [--search true]

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

HERE = Path(__file__).resolve().parent.parent  # oracle/
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "making")]  # the root has the rooms
import acceptable  # noqa: E402
import cases  # noqa: E402
import manifest  # noqa: E402
import mistakes  # noqa: E402
import reference  # noqa: E402
from plain_decoder import Port  # noqa: E402
from plain_sampler import choices_rows, sampler_rows  # noqa: E402
from plumbing.command_line import command_line, option  # noqa: E402
from rounding import log_odds  # noqa: E402
from sample import draw, generate, probabilities  # noqa: E402
from stop import Watcher, launch_check_resume  # noqa: E402
from vector_files import stop_in_json, write_json  # noqa: E402

CLOSE = 2e-5        # logits, noise and top-p may move by so much
CLOSE_SCORES = 2e-4  # the last path kept leads the first pruned by more
SATURATED = 20.0     # of a log odds whose score is 1 in float32, however it is rounded
SMALL = (-80.0, -31.0)  # log odds of scores that float32 holds, and that clamping makes equal
ROPE_POSITIONS = (0, 1, 7, 63, 64, 299, 4099)


@dataclasses.dataclass
class Settings:
    """What `python oracle/making/make_vectors.py` can be told."""
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
    """Whether at every check the last path kept leads the first one pruned, or all are exactly 1
    on both sides."""
    if zero_head:
        return True
    for check in checks:
        tied = check.left and max(check.left) == 1 == min(check.stayed)
        if check.left and not tied and min(check.stayed) - max(check.left) <= CLOSE_SCORES:
            return False
    return True


def ties_are_saturated(model, stop, run, paths, last):
    """Whether scores near 1 are 1 beyond doubt, and a tie of them hides another order of logits."""
    port = Port(model, stop, None, torch.float64)
    odds = []
    for path in paths:
        z = log_odds(port.score_entry(run["prompt_ids"] + path.ids[:last])["logits"].tolist())
        if 8 < z < SATURATED:
            return False
        odds.append(z)
    tied = [(z, path.status == "pruned") for z, path in zip(odds, paths) if z >= SATURATED]
    pruned = [z for z, is_pruned in tied if is_pruned]
    kept = [z for z, is_pruned in tied if not is_pruned]
    return bool(pruned and kept and max(pruned) > min(kept))


def small_scores_decide(model, stop, run, paths):
    """Whether the last path kept and the first pruned have small scores that lie far apart, and
    the indices would decide otherwise if such scores were equal."""
    port = Port(model, stop, None, torch.float64)
    last = run["stages"][-1][0]
    kept = []
    pruned = []
    for path in paths:
        z = log_odds(port.score_entry(run["prompt_ids"] + path.ids[:last])["logits"].tolist())
        (pruned if path.status == "pruned" else kept).append((z, path.index))
    worst = min(kept)
    best = max(pruned)
    small = [(z, index) for z, index in kept if z < SMALL[1]]
    wide = worst[0] - best[0] > 1 and SMALL[0] < best[0] and worst[0] < SMALL[1]
    return wide and max(index for _, index in small) > min(index for _, index in pruned)


def shows_enough(name, paths, run, checks):
    """Whether the run's paths show what it is there for."""
    if name == "branch ties":
        return sum(bool(path.branches) for path in paths) == 9
    if name == "branch ties twice":
        return sum(len(path.branches) == 2 for path in paths) == 6
    if name == "ended in a cascade":
        first, second = [stage[0] for stage in run["stages"]]
        left = [path for path in paths if path.status == "pruned" and path.ids[-1] in run["eos_ids"]
                and id(path) not in checks[0].pruned]
        return bool([path for path in left if len(path.ids) <= first]
                    and [path for path in left if first < len(path.ids) < second])
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
                pruned = {id(path) for path in checked if path.status == "pruned"}
                checks.append(SimpleNamespace(stayed=stayed, left=left, pruned=pruned))

        with reference.without_head(stop, run.zero_head):
            paths = launch_check_resume(
                model, stop, inputs["prompt_ids"], run.n, stages=run.stages, watcher=Recorder(),
                **reference.settings_of(inputs))
        if not shows_enough(run.name, paths, inputs, checks):
            continue
        if run.name == "small scores":
            if not small_scores_decide(model, stop, inputs, paths):
                continue
        elif not gaps_are_wide(checks, run.zero_head):
            continue
        if run.name == "saturated" and not ties_are_saturated(
                model, stop, inputs, paths, run.stages[-1][0]):
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
        for run in [run for run in cases.RUNS if case.name in run.cases]:
            runs.append(cases.run_inputs(run, seed_of(case, run, model, stop, search), vocab))
            print(f"{case.name}: run {run.name}: seed {runs[-1]['seed']}", flush=True)
    inputs = {
        "name": case.name,
        "checkpoint": case.checkpoint,
        "stop": case.stop_name,
        "levels": list(case.levels),
        "rope_positions": list(ROPE_POSITIONS) if "decoder" in case.levels else [],
        "prefixes": prefixes,
        "labels": labels,
        "runs": cases.with_ids(case.name, "run", runs)}
    expected, allowed = reference.case_rows(case, model, stop, inputs)
    write_json(folder / "case.json", inputs)
    write_json(folder / "expected.json", expected)
    write_json(folder / "allowed.json", allowed)
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
            write_model_free(name, inputs, sampler_rows(inputs), out)
        elif name == "choices":
            inputs = cases.choices_inputs()
            write_model_free(name, inputs, choices_rows(inputs), out)
        else:
            write_case(cases.BY_NAME[name], out, settings.search)
    acceptable.write_all(out, [name for name in names if name in cases.BY_NAME])
    mistakes.write_all(out, names, keys)
    manifest.write(out)
    print(json.dumps({"out": str(out)}))


def write_model_free(name, inputs, expected, out):
    """case.json and expected.json of a case without a model."""
    write_json(out / name / "case.json", {"name": name} | inputs)
    write_json(out / name / "expected.json", expected)


if __name__ == "__main__":
    command_line(Settings, main)
