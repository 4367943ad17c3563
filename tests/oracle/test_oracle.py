"""The oracle: scores as the authors' code gives them, round trips to their layout, the published
vectors, and who is caught by them: right and wrong ports that share no code with ours."""

import hashlib
import json
import math
import re
import os
import runpy
import subprocess
import sys
import tarfile
import time

import port_numpy
import pytest
import torch
from helpers import GOLDEN, ROOT, close
from safetensors.torch import load_file, save_file

from model import load
from stop import Stop

sys.path[:0] = [str(ROOT / "oracle"), str(ROOT / "oracle" / "making")]
import certify  # noqa: E402
import clauses  # noqa: E402
import compare  # noqa: E402
import implementations  # noqa: E402

SCORERS = sorted(folder.name for folder in (GOLDEN / "scorers").iterdir())


def run(capsys, monkeypatch, script, *words):
    """(exit status, JSON of the last line, lines of stdout, stderr) of a script, here."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    lines = out.splitlines()
    return (
        status,
        json.loads(lines[-1]) if status == 0 and lines[-1].startswith("{") else None,
        lines,
        err,
    )


def write_jsonl(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read_jsonl(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def golden_scorer(name):
    """(base folder, STOP folder, tensors that the authors' code gave, prefixes, labels)."""
    folder = GOLDEN / "scorers" / name
    tensors = load_file(folder / "expected.safetensors")
    prefixes = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(tensors["prefix_ids"], tensors["prefix_attention_mask"])
    ]
    base = GOLDEN / json.loads((folder / "expected.json").read_text())["base_checkpoint"]
    return base, folder / "checkpoint", tensors, prefixes, tensors["labels"][:, 1].tolist()


# ------------------------------------------------------------------------------ scores of a file


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_the_authors(tmp_path, capsys, monkeypatch, name):
    """Logits, scores and last states are those of the authors' code; so are MSE and accuracy."""
    base, stop, tensors, prefixes, labels = golden_scorer(name)
    file = write_jsonl(
        tmp_path / "p.jsonl",
        [
            {"prefix_token_ids": ids, "Soft_label": label, "problem_id": f"p{i}", "more": 1}
            for i, (ids, label) in enumerate(zip(prefixes, labels))
        ],
    )
    status, last, lines, _ = run(
        capsys,
        monkeypatch,
        "stop.py",
        "--model",
        base,
        "--stop",
        stop,
        "--score",
        file,
        "--out",
        tmp_path / "s.jsonl",
        "--trace",
        tmp_path / "trace",
        "--batch",
        3,
        "--device",
        "cpu",
    )
    found = read_jsonl(tmp_path / "s.jsonl")
    assert (
        status == 0
        and [(r["line"], r["id"], r["label"]) for r in found]
        == [(i + 1, f"p{i}", label) for i, label in enumerate(labels)]
        and len(lines) == 2
    )
    close(torch.tensor([record["logits"] for record in found]), tensors["logits"], 2e-5)
    close(torch.tensor([record["score"] for record in found]), tensors["prob"], 1e-5)
    for i in range(4):
        states = load_file(tmp_path / "trace" / f"{i + 1:06}.safetensors")
        close(states["hidden"], tensors["assess_hidden"][i], 1e-4)
        assert (
            states["layers"].shape[1:] == states["hidden"].shape
            and len(states["layers"]) == load(base).config.num_hidden_layers
        )
    both = tensors["logits"].softmax(
        -1
    )  # as their evaluator has it: over both classes, and argmax of both
    assert last["mse"] == pytest.approx(
        ((both - tensors["labels"]) ** 2).mean(-1).mean().item(), abs=1e-6
    )
    assert (
        last["hard_label_accuracy"]
        == (both.argmax(-1) == tensors["labels"].argmax(-1)).float().mean().item()
    )
    assert last["count"] == last["labels"] == 4 and last["mean_score"] == pytest.approx(
        tensors["prob"].mean().item(), abs=1e-5
    )


def test_fp32_is_the_default_and_bf16_a_flag(tmp_path, capsys, monkeypatch):
    base, stop, tensors, prefixes, _ = golden_scorer("qwen3-tiny.all")
    file = write_jsonl(tmp_path / "p.jsonl", [{"prefix_token_ids": ids} for ids in prefixes])
    seen = {}
    for flags in ((), ("--dtype", "bfloat16")):
        status, last, lines, _ = run(
            capsys,
            monkeypatch,
            "stop.py",
            "--model",
            base,
            "--stop",
            stop,
            "--score",
            file,
            *flags,
            "--device",
            "cpu",
        )
        records = [
            json.loads(line) for line in lines[1:-1]
        ]  # between the settings and the summary: nothing to --out
        assert (
            status == 0
            and len(records) == 4
            and last == {"count": 4, "mean_score": last["mean_score"]}
        )
        seen[records[0]["dtype"]] = torch.tensor([record["score"] for record in records])
    close(seen["float32"], tensors["prob"], 1e-5)
    assert 1e-5 < (seen["bfloat16"] - tensors["prob"]).abs().max() < 0.1


# -------------------------------------------------------------- round trips to the authors' layout


def shared_stop(model, head="softmax", seed=0, **settings):
    """A Stop that the released layout can express, none of whose parts is zero."""
    stop = Stop(model, **{"m": 3, "rank": 2, "alpha": 5, "head": head, "shared": True} | settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stop.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return stop.eval()


@pytest.mark.parametrize("name", SCORERS)
def test_import_export_import(tmp_path, capsys, monkeypatch, name):
    """The authors' folder, written again by the script: the same scores, bit-equal tensors."""
    base, folder, tensors, prefixes, _ = golden_scorer(name)
    status, last, _, _ = run(
        capsys,
        monkeypatch,
        "oracle/export.py",
        "--stop",
        folder,
        "--model",
        base,
        "--out",
        tmp_path / "o",
    )
    model = load(base)
    first, again = Stop.load(folder, model), Stop.load(tmp_path / "o", model)
    assert status == 0 and last["score"] == last["score_of_what_was_written"]
    assert torch.equal(again.score(model, prefixes), first.score(model, prefixes))
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items()
    )
    for file in ("assess_token_embedding.pth", "classifier_head.pth"):
        ours, theirs = (
            torch.load(part / file, weights_only=True) for part in (tmp_path / "o", folder)
        )
        assert ours.keys() == theirs.keys() and all(
            torch.equal(value, ours[key]) if torch.is_tensor(value) else value == ours[key]
            for key, value in theirs.items()
        )
    ours, theirs = (
        json.loads((part / "assess_token_config.json").read_text())
        for part in (tmp_path / "o", folder)
    )
    assert ours == theirs
    ours, theirs = (
        json.loads((part / "adapter" / "classifier" / "adapter_config.json").read_text())
        for part in (tmp_path / "o", folder)
    )
    assert {key: theirs[key] for key in ours if key != "base_model_name_or_path"} == {
        key: value for key, value in ours.items() if key != "base_model_name_or_path"
    }
    assert {path.name for path in (tmp_path / "o").rglob("*")} >= {
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    "settings", ({}, {"head": "sigmoid"}, {"head": "sigmoid", "shared": False, "m": 1})
)
def test_a_head_of_one_logit_is_two(tmp_path, settings):
    """sigmoid(z) = softmax([0, z])[1], exactly as the layout has it."""
    from export import export

    base, _, _, prefixes, _ = golden_scorer("qwen3-tiny.qv")
    model = load(base)
    stop = shared_stop(model, **settings)
    export(stop, model, tmp_path / "o")
    close(
        Stop.load(tmp_path / "o", model).score(model, prefixes), stop.score(model, prefixes), 1e-6
    )


def test_what_the_layout_cannot_express(tmp_path, capsys, monkeypatch):
    """Four different vectors, as the toy's STOP has, or a folder in use: nothing is written."""
    words = ("oracle/export.py", "--model", ROOT / "toy", "--out", tmp_path / "o", "--stop")
    status, _, _, err = run(capsys, monkeypatch, *words, ROOT / "toy" / "stop")
    assert (
        status == 2
        and "tokens: found 4 different vectors" in err
        and err.count("\n") == 1
        and not (tmp_path / "o").exists()
    )
    shared_stop(load(ROOT / "toy")).save(tmp_path / "s")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").touch()
    status, _, _, err = run(capsys, monkeypatch, *words, tmp_path / "s")
    assert (
        status == 2
        and "found something there" in err
        and [path.name for path in (tmp_path / "o").iterdir()] == ["mine"]
    )


@pytest.mark.parametrize("name", SCORERS)
def test_an_export_in_peft(tmp_path, name):
    """The same scores with transformers and PEFT, the adapter off on the prefix."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from export import export

    base, _, _, prefixes, _ = golden_scorer(name)
    model = load(base)
    stop = shared_stop(
        model, "sigmoid", targets=Stop.load(golden_scorer(name)[1], model).lora.targets
    )
    export(stop, model, tmp_path / "o", base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(
        theirs, tmp_path / "o" / "adapter" / "classifier", adapter_name="classifier"
    ).eval()
    head = torch.load(tmp_path / "o" / "classifier_head.pth", weights_only=True)
    token = torch.load(tmp_path / "o" / "assess_token_embedding.pth", weights_only=True)[
        "input_embedding"
    ]
    scores = []
    with torch.no_grad():
        for ids in prefixes:
            with theirs.disable_adapter():
                cache = theirs(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
            L = len(ids)
            hidden = theirs(
                inputs_embeds=token.expand(1, stop.m, -1),
                past_key_values=cache,
                output_hidden_states=True,
                attention_mask=torch.ones(1, L + stop.m, dtype=torch.long),
                position_ids=torch.arange(L, L + stop.m)[None],
            ).hidden_states[-1][:, -1]
            scores.append(
                torch.nn.functional.linear(hidden, head["weight"], head["bias"]).softmax(-1)[0, 1]
            )
    close(stop.score(model, prefixes), torch.stack(scores), 1e-5)


# ------------------------------------------------------------------------------- the vectors

ORACLE = ROOT / "oracle"
VECTORS = ORACLE / "vectors"
CASES = ("qwen2", "qwen3", "gpt_oss", "mxfp4", "m8", "sampler", "choices")
MISTAKES = [json.loads(file.read_text()) for file in sorted((VECTORS / "mistakes").glob("*.json"))]


def key_of(mistake):
    return mistake["key"]


def published(name, what="expected"):
    return json.loads((VECTORS / name / f"{what}.json").read_text())


def hand_in(folder, rows):
    """Write {case: rows} as a port would."""
    folder.mkdir(exist_ok=True)
    for name, value in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def certified(capsys, monkeypatch, folder, *words):
    """(exit status, {level: verdict}, the report, stdout) of certify.py."""
    file = folder / "report"
    monkeypatch.setattr(sys, "argv", ["certify.py", *map(str, (folder, "--json", file, *words))])
    status = certify.main()
    out, err = capsys.readouterr()
    assert status != 2, err
    report = json.loads(file.read_text())
    return status, report["levels"], report, out


def cause_of(report):
    """(case, row, cause) of the first failure that the report explains, or None."""
    if not report["causes"]:
        return None
    first = report["causes"][0]
    return first["case"], first["row"], first["cause"]


def test_every_clause_has_a_vector_and_every_vector_a_clause():
    """The numbered sentences of README.md, the rows, and the inputs name each other."""
    text = (ORACLE / "README.md").read_text()
    numbered = set(re.findall(r"^- \*\*([DCTSR]\d+)\*\*", text, re.M))
    assert len(numbered) == 14 + 9 + 4 + 9 + 9
    manifest = json.loads((VECTORS / "manifest.json").read_text())
    tested = set()
    for row, clauses in manifest["clauses"].items():
        assert clauses and set(clauses) <= numbered, row
        tested |= set(clauses)
    for name in CASES:
        for key, items in published(name, "case").items():
            if key in (
                "prefixes",
                "runs",
                "distributions",
                "draws",
                "keys",
                "noise",
                "tokens",
                "ranks",
                "votes",
            ):
                for item in items:
                    assert item["clauses"] and set(item["clauses"]) <= numbered, (name, key)
                    tested |= set(item["clauses"])
    assert tested == numbered
    rows = {row for level in manifest["levels"].values() for row in level["rows"]}
    assert rows == set(manifest["clauses"])


def test_every_clause_has_a_mistake_that_it_catches():
    """Of each clause a published mistake shows in a row that names it; CLAUSES.md is the table."""
    assert set(clauses.BROKEN_BY) == {clause for row in compare.CLAUSES.values() for clause in row}
    for clause, patterns in clauses.BROKEN_BY.items():
        caught = []
        for mistake in MISTAKES:
            for rows in mistake["cases"].values():
                named = [row for row in rows if clause in compare.CLAUSES[row]]
                if clause in mistake["clauses"] and any(rows[row]["entries"] for row in named):
                    caught.append(mistake["key"])
        assert caught, clause
        for pattern in patterns.split():
            assert any(clauses.fits(mistake["key"], pattern) for mistake in MISTAKES), pattern
    assert [mistake["key"] for mistake in MISTAKES if not mistake["clauses"]] == []
    assert (ORACLE / "CLAUSES.md").read_text() == clauses.table(VECTORS)


def test_ids_are_those_of_their_places():
    """An input keeps its id: case, kind, and the number at which it stood from its first day."""
    seen = set()
    for name in CASES:
        for items in published(name, "case").values():
            for number, item in enumerate(items if isinstance(items, list) else ()):
                if isinstance(item, dict):
                    case, kind, place = item["id"].split("/")
                    assert case == name and int(place) == number and isinstance(item["flags"], list)
                    assert item["id"] not in seen
                    seen.add(item["id"])
    assert len(seen) > 190


def is_valid(schema, value):
    """Whether a value fits a JSON schema, of whose keywords ours use these."""
    kinds = {"array": list, "object": dict, "string": str, "integer": int, "boolean": bool,
             "number": (int, float), "null": type(None)}
    types = schema.get("type", list(kinds))
    types = types if isinstance(types, list) else [types]
    is_number = type(value) is not bool or "boolean" in types
    if not is_number or not any(isinstance(value, kinds[kind]) for kind in types):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, list):
        return all(is_valid(schema.get("items", {}), item) for item in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        for key, item in value.items():
            inner = known.get(key, others)
            if inner is False or inner is not True and not is_valid(inner, item):
                return False
        return all(key in value for key in schema.get("required", []))
    return True


def test_the_schemas_are_those_of_the_vectors():
    schemas = {name: json.loads((ORACLE / "schemas" / f"{name}.json").read_text())
               for name in ("case", "hand_in")}
    for name in CASES:
        case, rows = published(name, "case"), published(name)
        assert is_valid(schemas["case"], case) and is_valid(schemas["hand_in"], rows), name
        assert not is_valid(schemas["case"], case | {"prefixes": [{"ids": "all"}]})
    assert not is_valid(schemas["hand_in"], {"scores": [True]})
    assert not is_valid(schemas["hand_in"], {"score": [0.5]})


def test_implementations_are_those_of_the_reports():
    assert (ROOT / "IMPLEMENTATIONS.md").read_text() == implementations.text()


def test_reports_are_of_these_vectors():
    """Each says which files it was made with, and nothing of the machine that made it."""
    manifest = VECTORS / "manifest.json"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    for file in sorted((ORACLE / "reports").glob("*.json")):
        text = file.read_text()
        report = json.loads(text)
        assert report["version"] != json.loads(manifest.read_text())["version"] or (
            report["manifest_sha256"] == digest), file.name
        assert not re.search(r'(^|[\s"])(/|[A-Z]:\\|https?:)', text), file.name


def test_the_vectors_hold_the_edges():
    """Lengths, seeds, indices and ends that earlier vectors lacked."""
    lengths = {
        len(prefix["ids"])
        for name in ("qwen2", "qwen3", "gpt_oss", "mxfp4")
        for prefix in published(name, "case")["prefixes"]
    }
    assert {1, 65, 300, 4100} <= lengths
    for name in ("qwen2", "qwen3", "gpt_oss"):
        runs = {run["name"]: run for run in published(name, "case")["runs"]}
        rows = published(name)
        number = {run: i for i, run in enumerate(runs)}
        assert all(int(runs[run]["seed"]) > 2**32 for run in ("main", "keep all", "cascade"))
        assert len(runs["keep all"]["prompt_ids"]) > 512 and runs["keep all"]["n"] == 10
        assert len(rows["kept"][number["keep all"]]) == 10
        assert runs["main"]["n"] > 32 and runs["main"]["max_new_tokens"] > 32
        assert max(len(path["ids"]) for path in rows["uninterrupted"][number["main"]]) > 32
        main = [path for path in rows["paths"][number["main"]] if path["status"] == "eos"]
        assert any(len(path["ids"]) <= 10 for path in main)  # ended, and among the best
        ends = runs["main"]["eos_ids"]
        whole = rows["uninterrupted"][number["main"]]
        ended = {len(path["ids"]) for path in whole if path["ids"][-1] in ends}
        assert min(ended) < 10 and 10 in ended and max(ended) > 10
        cascade = rows["paths"][number["cascade"]]
        assert any(path["status"] == "eos" and len(path["ids"]) == 12 for path in cascade)
        ties = [path["score"] for path in rows["paths"][number["ties"]]]
        assert len(set(ties)) == 1 and rows["kept"][number["ties"]] == [0, 1]
    scores = published("mxfp4")["scores"]
    assert 1.0 in scores and min(scores) < 1e-3


def test_numbers_come_back_bit_for_bit():
    from vector_files import to_json

    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(20000, generator=generator) * 10.0 ** torch.randint(
        -30, 30, (20000,), generator=generator
    )
    text = to_json({"x": numbers, "y": numbers.double() / 3})
    back = json.loads(text)
    assert torch.equal(torch.tensor(back["x"], dtype=torch.float64).float(), numbers)
    assert torch.equal(torch.tensor(back["y"], dtype=torch.float64), numbers.double() / 3)
    with pytest.raises(ValueError, match="finite"):
        to_json(torch.tensor([math.nan]))


def test_the_manifest_is_of_these_files():
    """Digests are those of the published files, none is missing, and the checkpoints stay small."""
    manifest = json.loads((VECTORS / "manifest.json").read_text())
    for name, about in manifest["files"].items():
        assert hashlib.sha256((ORACLE / name).read_bytes()).hexdigest() == about["sha256"], name
    written = {
        f"vectors/{file.relative_to(VECTORS)}" for file in VECTORS.rglob("*") if file.is_file()
    }
    assert {name for name in manifest["files"] if name.startswith("vectors/")} == written - {
        "vectors/manifest.json"
    }
    assert f"## {manifest['version']}" in (ORACLE / "CHANGELOG.md").read_text()
    golden = sum(file.stat().st_size for file in (ORACLE / "golden").rglob("*") if file.is_file())
    assert golden < 8_000_000


@pytest.mark.parametrize("name", ("mxfp4", "m8", "sampler", "choices"))
def test_vectors_are_made_again(tmp_path, monkeypatch, capsys, name):
    """On one machine bit-equal; on another within what is allowed."""
    import cases
    import make_vectors
    from plain_sampler import choices_rows, sampler_rows

    if name in ("sampler", "choices"):
        inputs = cases.sampler_inputs() if name == "sampler" else cases.choices_inputs()
        make = sampler_rows if name == "sampler" else choices_rows
        make_vectors.write_model_free(name, inputs, make(inputs), tmp_path)
    else:
        make_vectors.write_case(cases.BY_NAME[name], tmp_path, False)
    assert (tmp_path / name / "case.json").read_bytes() == (
        VECTORS / name / "case.json"
    ).read_bytes()
    made = {name: json.loads((tmp_path / name / "expected.json").read_text())}
    levels = certified(capsys, monkeypatch, hand_in(tmp_path, made), "--cases", name)[1]
    assert "FAIL" not in levels.values() and "PASS" in levels.values()


@pytest.mark.parametrize("name", ("qwen2", "mxfp4", "m8", "sampler", "choices"))
def test_the_rooms_pass(tmp_path, capsys, monkeypatch, name):
    """The project's own code against numbers that a plain decoder and sampler computed."""
    import cases
    import reference
    from vector_files import in_json

    inputs = published(name, "case")
    if name in cases.MODEL_FREE:
        rows = {"sampler": reference.rooms_sampler_rows, "choices": reference.rooms_choices_rows}
        found = in_json(rows[name](inputs))
    else:
        case = cases.BY_NAME[name]
        model = case.model()
        found = in_json(reference.rooms_rows(case, model, case.stop(model), inputs))
    _, levels, _, text = certified(
        capsys, monkeypatch, hand_in(tmp_path, {name: found}), "--cases", name
    )
    assert "FAIL" not in levels.values() and "PASS" in levels.values(), text


@pytest.mark.parametrize("name", ("qwen3.qv", "gpt_oss.attn"))
def test_vectors_are_the_authors(name):
    """What the golden data has too (made by the authors' code) is equal within its tolerances."""
    name, targets = name.split(".")
    rows = published(name)
    folder = {"qwen3": "qwen3-tiny", "gpt_oss": "gptoss-tiny"}[name]
    golden = golden_scorer(f"{folder}.{targets}")[2]
    for key, other, tolerance in (
        ("logits", "logits", 2e-5),
        ("scores", "prob", 1e-5),
        ("stop.hidden", "assess_hidden", 1e-4),
    ):
        close(torch.tensor(rows[key][:4]), golden[other], tolerance)
    close(torch.tensor([rows["loss"]]), golden["loss"].view(1), 1e-5)
    names = {
        "grad/assess_token_embedding": "tokens",
        "grad/classifier_head.weight": "head.weight",
        "grad/classifier_head.bias": "head.bias",
    }
    gradients = {key: value for key, value in golden.items() if key.startswith("grad/")}
    assert len(gradients) == len(rows["grad"])
    for key, gradient in gradients.items():
        ours = key.replace("grad/lora/base_model.model.", "").replace(".classifier.", ".")
        found = torch.tensor(rows["grad"][names.get(key, ours)]).reshape(gradient.shape)
        assert (found - gradient).abs().max() <= 1e-4 * gradient.abs().max(), key


# -------------------------------------------------------------------- who passes, and who does not


@pytest.fixture(scope="module")
def numpy_port():
    """What the numpy port hands in, without prefixes of more than 300 tokens."""
    rows = {}
    for name in CASES:
        rows[name] = port_numpy.outputs(name, longest=300, runs=name == "gpt_oss")
    return rows


def with_long_rows(name, rows):
    """The rows of a port, with the published numbers in the place of the longest prefix's."""
    expected = published(name)
    whole = {}
    for row, entries in rows.items():
        if isinstance(entries, list) and row in expected:
            pairs = zip(entries, expected[row])
            whole[row] = [right if entry is None else entry for entry, right in pairs]
        else:
            whole[row] = entries
    return whole


def test_numpy_passes(tmp_path, capsys, monkeypatch, numpy_port):
    """A right port in plain numpy: all that it shows is right, on every architecture."""
    status, levels, report, text = certified(capsys, monkeypatch, hand_in(tmp_path, numpy_port))
    assert status == 0, text
    assert levels["sampler"] == "PASS" and "FAIL" not in levels.values(), text
    assert levels["decoder"] == "NOT SHOWN"  # a prefix is left out: part of a row is not a pass
    completed = {name: with_long_rows(name, rows) for name, rows in numpy_port.items()}
    status, levels, _, text = certified(capsys, monkeypatch, hand_in(tmp_path, completed))
    assert levels["decoder"] == levels["score"] == "PASS", text
    status, levels, *_ = certified(capsys, monkeypatch, tmp_path, "--cases", "gpt_oss")
    assert levels["run"] == "PASS" and levels["training"] == levels["sampler"] == "NOT SHOWN"


@pytest.mark.parametrize("name", ("qwen2", "mxfp4"))
def test_transformers_and_peft_pass(tmp_path, capsys, monkeypatch, name):
    """Gradients too, by another's autograd."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import port_transformers

    rows = with_long_rows(name, port_transformers.outputs(name, longest=300, runs=False))
    _, levels, _, text = certified(
        capsys, monkeypatch, hand_in(tmp_path, {name: rows}), "--cases", name
    )
    assert [levels[level] for level in ("decoder", "score", "training")] == ["PASS"] * 3, text


def wrong_cases(mistake):
    """The cases in which a mistake shows, the cheapest to try first."""
    order = ("sampler", "choices", "m8", "mxfp4", "qwen2", "qwen3", "gpt_oss")
    if mistake["chain"] == "run":
        order = ("qwen2", "mxfp4", "qwen3", "gpt_oss")
    found = []
    for name in order:
        rows = mistake["cases"].get(name, {}).values()
        if any(about["entries"] for about in rows):
            found.append(name)
    return found


def wrong_run_rows(mistake, name, cache):
    """The rows of one run of the numpy port with a mistake, on the right uninterrupted paths."""
    key = mistake["key"]
    case = published(name, "case")
    about = mistake["cases"][name]
    in_paths = about.get("uninterrupted", {}).get("entries")
    touched = list(in_paths or about["paths"]["entries"])
    number = 2 if in_paths and "2" in touched else int(touched[0])  # the cascade is short
    run = case["runs"][number]
    if name not in cache:
        cache[name] = port_numpy.Model(ORACLE / case["checkpoint"], published(name, "stop"))
    changed = set()
    for one in about.values():
        changed |= {*one["entries"], *one.get("unknown", [])}
    rows = {}  # runs that the mistake leaves alone are right
    for row in ("uninterrupted", "paths", "kept"):
        entries = published(name)[row]
        rows[row] = [None if str(i) in changed else entry for i, entry in enumerate(entries)]
    whole = published(name)["uninterrupted"][number]
    rows["uninterrupted"][number] = whole
    if len(run["stages"][0]) == 3:
        port = port_numpy.Branching(cache[name], run, key)
        rows["paths"][number], rows["kept"][number] = port.all()
        return rows
    port = port_numpy.Paths(cache[name], run, key)
    if key not in port_numpy.RANKED_OTHERWISE:
        port.scored = cache.setdefault((name, number), {})
    if in_paths:
        rows["uninterrupted"][number] = port.whole()
        return rows
    rows["paths"][number], rows["kept"][number] = port.all(whole)
    return rows


RUN_MODELS = {}


@pytest.mark.parametrize(
    "mistake", [one for one in MISTAKES if not one["key"].startswith(("loss", "grad"))], ids=key_of
)
def test_a_wrong_port_is_named(tmp_path, capsys, monkeypatch, mistake):
    """The numpy port with each known mistake, none of whose numbers is ours: refused, and named."""
    far = ("bfloat16-positions", "ring-64", "positions-capped")
    for name in wrong_cases(mistake):
        if mistake["chain"] == "run":
            found = {name: wrong_run_rows(mistake, name, RUN_MODELS)}
            if name == "mxfp4" and "qwen2" not in wrong_cases(mistake):
                found["qwen2"] = published("qwen2")  # where it is right: that tells it from others
        else:
            longest = 300 if mistake["key"] in far else 70
            found = {name: port_numpy.outputs(name, mistake["key"], longest=longest, runs=False)}
            if mistake["key"].startswith("score-") and wrong_cases(mistake) == ["mxfp4"]:
                found["m8"] = published("m8")  # where it is right: that tells it from others
        status, levels, report, text = certified(
            capsys, monkeypatch, hand_in(tmp_path, found), "--cases", ",".join(found)
        )
        if "FAIL" in levels.values():
            break  # in the cases before it moved no number far enough
    assert status == 1 and "FAIL" in levels.values(), text
    assert cause_of(report)[2] == mistake["what"], text


def test_wrong_training_steps_are_named(tmp_path, capsys, monkeypatch):
    """Made from the right gradients by hand."""
    expected = published("qwen3")
    port = {key: expected[key] for key in ("logits", "scores", "loss")}
    gradients = {key: torch.tensor(value) for key, value in expected["grad"].items()}
    scaled = {
        "grad-sum": {key: 4 * value for key, value in gradients.items()},
        "grad-lora-unscaled": {
            key: value / 2 if "lora" in key else value for key, value in gradients.items()
        },
        "grad-tokens-mean": {
            key: value / 4 if key == "tokens" else value for key, value in gradients.items()
        },
        "grad-negative": {key: -value for key, value in gradients.items()},
        "grad-no-bias": {
            key: 0 * value if key == "head.bias" else value for key, value in gradients.items()
        },
        "grad-lora-zero": {
            key: 0 * value if "lora" in key else value for key, value in gradients.items()
        },
    }
    titles = {one["key"]: one["what"] for one in MISTAKES}
    for key, changed in scaled.items():
        rows = port | {"grad": {name: value.tolist() for name, value in changed.items()}}
        _, levels, report, text = certified(
            capsys, monkeypatch, hand_in(tmp_path, {"qwen3": rows}), "--cases", "qwen3"
        )
        assert levels["training"] == "FAIL" and cause_of(report)[2] == titles[key], text
    chances = torch.tensor(expected["scores"][:4]).double()
    labels = torch.tensor(published("qwen3", "case")["labels"]).double()
    losses = {
        "loss-sum": 4 * expected["loss"],
        "loss-squares": ((chances - labels) ** 2).mean().item(),
        "loss-hard": torch.nn.functional.binary_cross_entropy(chances, labels.round()).item(),
        "loss-inverted": torch.nn.functional.binary_cross_entropy(chances, 1 - labels).item(),
    }
    for key, loss in losses.items():
        _, levels, report, text = certified(
            capsys,
            monkeypatch,
            hand_in(tmp_path, {"qwen3": port | {"loss": loss}}),
            "--cases",
            "qwen3",
        )
        assert levels["training"] == "FAIL" and cause_of(report)[2] == titles[key], text


def test_each_mistake_is_its_own():
    """No two published mistakes of different names give the same numbers everywhere."""
    assert len({one["what"] for one in MISTAKES}) >= 150
    seen = {}
    for mistake in MISTAKES:
        numbers = json.dumps(mistake["cases"], sort_keys=True)
        other = seen.setdefault(numbers, mistake["what"])
        assert other == mistake["what"], mistake["key"]


def test_an_unknown_mistake_is_not_named(tmp_path, capsys, monkeypatch):
    """Noise, a shifted token, nan and infinity have no known cause."""
    expected = published("qwen2")
    changes = {
        "scores": lambda rows: [rows[0], rows[1] + 1e-3, *rows[2:]],
        "logits": lambda rows: [[value[0] + 0.01] for value in rows],
        "next_logits": lambda rows: [[number + 1e-2 for number in rows[0]], *rows[1:]],
        "hidden": lambda rows: [[[float("nan")] * len(rows[0][0])] * len(rows[0]), *rows[1:]],
        "loss": lambda loss: loss * 1.01,
        "kept": lambda rows: [rows[0][:-1] + [33], *rows[1:]],
    }
    for row, change in changes.items():
        rows = expected | {row: change(expected[row])}
        _, _, report, text = certified(
            capsys, monkeypatch, hand_in(tmp_path, {"qwen2": rows}), "--cases", "qwen2"
        )
        assert cause_of(report)[1:] == (row, None), text
        assert "no known mistake" in text


def test_a_cause_explains_every_case_that_fails(tmp_path, capsys, monkeypatch):
    """One case's numbers are a known mistake's, another fails where that mistake is right."""
    mistake = next(one for one in MISTAKES if one["key"] == "rank-ties-higher")
    rows = published("choices")
    for label, entry in mistake["cases"]["choices"]["ranks"]["entries"].items():
        rows["ranks"][int(label)] = entry["value"]
    words = ("--cases", "choices")
    folder = hand_in(tmp_path, {"choices": rows})
    _, _, report, text = certified(capsys, monkeypatch, folder, *words)
    assert cause_of(report)[2] == mistake["what"], text
    vote = next(one for one in MISTAKES if one["key"] == "read-first")["cases"]
    other = published("qwen2")
    wrong = vote["qwen2"]["logits"]["entries"]
    values = {int(label): entry["values"] for label, entry in wrong.items()}
    logits = [values.get(i, entry) for i, entry in enumerate(other["logits"])]
    m8 = published("m8")
    found = {"qwen2": {"logits": logits}, "m8": {"logits": m8["logits"]}}
    words = ("--cases", "qwen2,m8")
    _, _, report, text = certified(capsys, monkeypatch, hand_in(tmp_path, found), *words)
    assert cause_of(report)[2] is None, text  # m8 is right, and would not be


NEIGHBOURS = {
    "the temperature squared": ("distribution", lambda args: (args[0], args[1] ** 2, *args[2:])),
    "a floor that is not published": (
        "distribution",
        lambda args: (args[0], max(args[1], 0.02), *args[2:]),
    ),
    "half of top-k": ("distribution", lambda args: (*args[:2], args[2] // 2, args[3])),
    "a seed of 24 bits": ("make_key", lambda args: (int(args[0]) % 2**24, *args[1:])),
    "the seed plus one": ("make_key", lambda args: (int(args[0]) + 1, *args[1:])),
    "the last 300 ids": ("make_key", lambda args: (args[0], args[1][-300:], args[2])),
    "an index modulo 12": ("make_key", lambda args: (*args[:2], args[2] % 12)),
    "every second number": ("make_number", lambda args: (args[0], 2 * args[1])),
    "positions modulo 128": ("make_number", lambda args: (args[0], args[1] % 128)),
}


@pytest.mark.parametrize("what", NEIGHBOURS)
def test_a_neighbour_of_a_known_mistake_is_not_named(tmp_path, capsys, monkeypatch, what):
    """Mistakes like the published ones, but others: refused, and no wrong name is given."""
    name, change = NEIGHBOURS[what]
    right = getattr(port_numpy, name)

    def wrong(*args):
        return right(
            *change(args[: 4 if name == "distribution" else 3 if name == "make_key" else 2])
        )

    monkeypatch.setattr(port_numpy, name, wrong)
    rows = {"sampler": port_numpy.outputs("sampler")}
    _, levels, report, text = certified(
        capsys, monkeypatch, hand_in(tmp_path, rows), "--cases", "sampler"
    )
    assert levels["sampler"] == "FAIL" and cause_of(report)[2] is None, text


def test_the_check_is_blamed_only_where_the_paths_were_right(tmp_path, capsys, monkeypatch):
    """A run whose uninterrupted paths are wrong is not called a disturbed cache."""
    expected = published("qwen2")
    rows = json.loads(json.dumps(expected))
    left = next(one for one in MISTAKES if one["key"] == "cache-left")["cases"]["qwen2"]["paths"][
        "entries"
    ]
    for label, entry in left.items():
        changed = {path["index"]: path for path in entry["value"]}
        paths = rows["paths"][int(label)]
        rows["paths"][int(label)] = [changed.get(path["index"], path) for path in paths]
    rows["paths"] = [
        rows["paths"][int(label)] if str(label) in left else None
        for label in range(len(rows["paths"]))
    ]
    _, _, report, _ = certified(
        capsys, monkeypatch, hand_in(tmp_path, {"qwen2": rows}), "--cases", "qwen2"
    )
    assert cause_of(report)[1] == "paths" and "left in the cache" in cause_of(report)[2]
    rows["uninterrupted"][0][13]["ids"][5] += 1
    _, _, report, _ = certified(
        capsys, monkeypatch, hand_in(tmp_path, {"qwen2": rows}), "--cases", "qwen2"
    )
    assert cause_of(report) == ("qwen2", "uninterrupted", None)


def test_part_of_a_row_is_not_a_pass(tmp_path, capsys, monkeypatch):
    """Scores alone, one of eight hidden states, two of the gradients, paths without scores."""
    expected = published("qwen2")
    bare = json.loads(json.dumps(expected))
    for paths in bare["paths"]:
        for path in paths:
            path.pop("score")
    parts = {
        "score": {"scores": expected["scores"]},
        "decoder": {
            "next_logits": expected["next_logits"],
            "hidden": [expected["hidden"][0]] + [None] * 7,
        },
        "training": {"loss": expected["loss"], "grad": dict(list(expected["grad"].items())[:2])},
        "run": {row: bare[row] for row in ("uninterrupted", "paths", "kept")},
    }
    for level, rows in parts.items():
        status, levels, _, text = certified(
            capsys, monkeypatch, hand_in(tmp_path, {"qwen2": rows}), "--cases", "qwen2"
        )
        assert levels[level] == "NOT SHOWN" and status == 1, text
    rows = {row: value for row, value in expected.items() if not row.startswith("stop.")}
    status, levels, _, text = certified(
        capsys, monkeypatch, hand_in(tmp_path, {"qwen2": rows}), "--cases", "qwen2"
    )
    assert levels["score"] == "PASS" and status == 0 and "(only qwen2)" in text


def test_a_score_that_is_missing_fails_or_is_named(tmp_path, capsys, monkeypatch):
    """Branches whose scores were lost; a run whose check was left out; a run that is not there."""
    expected = published("qwen2")
    names = [run["name"] for run in published("qwen2", "case")["runs"]]
    branches = names.index("branches")
    all_stay = names.index("keep all")
    for number, lost, shown in (
        (branches, lambda path: "branches" in path, f"[{branches}] path"),
        (all_stay, lambda path: True, f"[{all_stay}]: no path has a score, though every path"),
    ):
        rows = json.loads(json.dumps(expected))
        for path in rows["paths"][number]:
            if lost(path):
                path["score"] = None
        words = ("--cases", "qwen2", "--levels", "run")
        folder = hand_in(tmp_path, {"qwen2": rows})
        status, levels, _, text = certified(capsys, monkeypatch, folder, *words)
        assert levels["run"] == "FAIL" and shown in text and "score" in text, text
    rows = expected | {"kept": [None, *expected["kept"][1:]]}
    folder = hand_in(tmp_path, {"qwen2": rows})
    _, levels, _, text = certified(capsys, monkeypatch, folder, *words)
    assert levels["run"] == "NOT SHOWN" and f"{len(names) - 1} of {len(names)}: [0] is" in text


def test_what_was_found_is_shown(tmp_path, capsys, monkeypatch):
    """In place of a number that must be equal: NaN, null, text, a shorter list."""
    expected = published("sampler")
    words = ("--cases", "sampler")
    for value, shown in ((math.nan, "NaN"), (None, "None"), ("0.5", "'0.5'")):
        noise = [[value, *expected["noise"][0][1:]], *expected["noise"][1:]]
        folder = hand_in(tmp_path, {"sampler": expected | {"noise": noise}})
        _, _, _, text = certified(capsys, monkeypatch, folder, *words)
        assert f"[0][0]: found {shown}, expected {expected['noise'][0][0]!r}" in text
    noise = [expected["noise"][0][:-1], *expected["noise"][1:]]
    folder = hand_in(tmp_path, {"sampler": expected | {"noise": noise}})
    _, _, _, text = certified(capsys, monkeypatch, folder, *words)
    assert "found nothing, expected" in text


def test_a_misspelt_file_is_noted(tmp_path, capsys, monkeypatch):
    hand_in(tmp_path, {"qwen_2": published("qwen2"), "sampler": published("sampler")})
    status, levels, report, text = certified(capsys, monkeypatch, tmp_path)
    assert status == 0 and "note: qwen_2.json: no case has this name" in text
    assert levels["decoder"] == "NOT SHOWN" and len(report["notes"]) == 1


def test_harmless_differences_pass(tmp_path, capsys, monkeypatch):
    """Paths in the order of their scores, keys with 0x and capitals, kept in any order."""
    expected = published("qwen2")
    rows = json.loads(json.dumps(expected))
    for paths in rows["paths"]:
        paths.sort(key=lambda path: -path["score"])
    rows["kept"] = [kept[::-1] for kept in rows["kept"]]
    sampler = published("sampler")
    sampler["keys"] = ["0x" + key.upper().lstrip("0") for key in sampler["keys"]]
    _, levels, _, text = certified(
        capsys,
        monkeypatch,
        hand_in(tmp_path, {"qwen2": rows, "sampler": sampler}),
        "--cases",
        "qwen2,sampler",
    )
    assert set(levels.values()) == {"PASS"}, text


def test_one_wrong_shape_fails_its_row_only(tmp_path, capsys, monkeypatch):
    expected = published("qwen2")
    rows = expected | {
        "score": [0.5],
        "scores": expected["scores"][:3] + [[0.5]] + expected["scores"][4:],
        "grad": expected["grad"] | {"head.bias": [[0.0]]},
        "kept": "all",
    }
    _, levels, report, text = certified(
        capsys, monkeypatch, hand_in(tmp_path, {"qwen2": rows}), "--cases", "qwen2"
    )
    failed = {row["row"] for row in report["rows"] if row["result"] == "FAIL"}
    assert failed == {"scores", "grad", "kept"} and levels["decoder"] == "PASS", text
    assert "'score': unknown" in report["notes"][0]


ROUNDINGS = sorted(file.stem for file in (VECTORS / "acceptable").iterdir())


@pytest.mark.parametrize("key", ROUNDINGS)
def test_a_rounding_that_a_port_may_choose_is_acceptable(tmp_path, capsys, monkeypatch, key):
    """RoPE's angles with fewer roundings, where that shows; half of a row in it is neither."""
    about = json.loads((VECTORS / "acceptable" / f"{key}.json").read_text())
    what, about = about["what"], about["cases"]
    name = "gpt_oss"
    assert len(ROUNDINGS) == 4
    rows = published(name)
    for row, entries in about[name].items():
        for label, value in entries.items():
            if row == "grad":
                rows[row][label] = value
            elif row != "loss":
                rows[row][int(label)] = value
    words = ("--cases", name, "--levels", "decoder,score")
    folder = hand_in(tmp_path, {name: rows})
    status, levels, _, text = certified(capsys, monkeypatch, folder, *words)
    assert status == 0 and levels["decoder"] == "ACCEPTABLE", text
    assert levels["score"] in ("ACCEPTABLE", "PASS")
    assert what in text or "angles in float64" in what and "angles in float64" in text
    rows["hidden"][0][0][0] += 1e-3
    _, levels, _, text = certified(capsys, monkeypatch, hand_in(tmp_path, {name: rows}), *words)
    assert levels["decoder"] == "FAIL", text


def test_safetensors_are_read_too(tmp_path, capsys, monkeypatch):
    expected = published("m8")
    tensors = {
        "logits": torch.tensor(expected["logits"]),
        "scores": torch.tensor(expected["scores"]),
        "loss": torch.tensor([expected["loss"]]),
    }
    tensors |= {f"grad.{key}": torch.tensor(value) for key, value in expected["grad"].items()}
    tensors |= {
        f"stop.hidden.{i}": torch.tensor(value) for i, value in enumerate(expected["stop.hidden"])
    }
    save_file(tensors, tmp_path / "m8.safetensors")
    _, levels, _, text = certified(capsys, monkeypatch, tmp_path, "--cases", "m8")
    assert levels["score"] == levels["training"] == "PASS", text


def test_bfloat16_of_ours_passes_and_a_mistake_does_not(tmp_path, capsys, monkeypatch):
    import cases
    import reference
    from vector_files import in_json

    case = cases.BY_NAME["qwen2"]
    model = case.model(torch.bfloat16)
    inputs = published("qwen2", "case")
    rows = in_json(reference.rooms_rows(case, model, case.stop(model), inputs))
    words = ("--cases", "qwen2", "--dtype", "bfloat16")
    _, levels, _, text = certified(capsys, monkeypatch, hand_in(tmp_path, {"qwen2": rows}), *words)
    assert [levels[level] for level in ("decoder", "score", "training", "run")] == [
        "PASS"
    ] * 4, text
    _, levels, _, _ = certified(capsys, monkeypatch, tmp_path, "--cases", "qwen2")
    assert levels["decoder"] == "FAIL"  # it is not float32
    wrong = port_numpy.outputs("qwen2", "rope-pairs", longest=300, runs=False)
    _, levels, _, text = certified(capsys, monkeypatch, hand_in(tmp_path, {"qwen2": wrong}), *words)
    assert levels["decoder"] == levels["score"] == "FAIL", text
    for number, paths in enumerate(rows["paths"]):
        for path in paths:
            if path["status"] != "pruned":
                path["ids"] = path["ids"][:-1] + [0]
                path["status"] = "length"
    _, levels, _, text = certified(capsys, monkeypatch, hand_in(tmp_path, {"qwen2": rows}), *words)
    assert levels["run"] == "FAIL", text


def test_fresh_inputs(tmp_path, capsys, monkeypatch):
    """Right answers pass, those to other inputs fail, and a seed gives the same inputs again."""
    import cases

    status, _, _, err = run(
        capsys,
        monkeypatch,
        "oracle/certify.py",
        "--fresh",
        7,
        "--write",
        tmp_path / "in",
        "--cases",
        "qwen2",
    )
    assert status == 0, err
    inputs = json.loads((tmp_path / "in" / "qwen2" / "case.json").read_text())
    assert inputs["prefixes"] != cases.fresh_case(cases.BY_NAME["qwen2"], 8, 512)["prefixes"]
    rows = port_numpy.outputs("qwen2", case=inputs)
    words = ("--cases", "qwen2", "--fresh")
    _, levels, _, text = certified(
        capsys, monkeypatch, hand_in(tmp_path / "out", {"qwen2": rows}), *words, 7
    )
    assert [levels[level] for level in ("decoder", "score", "run")] == ["PASS"] * 3, text
    rows["paths"][0][rows["kept"][0][0]]["ids"][-1] ^= 1
    _, levels, _, text = certified(
        capsys, monkeypatch, hand_in(tmp_path / "out", {"qwen2": rows}), *words, 7
    )
    assert levels["run"] == "FAIL" and levels["score"] == "PASS", text
    rows["paths"][0][rows["kept"][0][0]]["ids"][-1] = 10 ** 6
    _, levels, _, text = certified(
        capsys, monkeypatch, hand_in(tmp_path / "out", {"qwen2": rows}), *words, 7
    )
    assert levels["run"] == "FAIL" and "expected token ids from 0 to 511" in text


def test_fresh_problems_without_a_model(tmp_path, capsys, monkeypatch):
    import follow

    words = ("--cases", "sampler,choices", "--levels", "sampler,run", "--fresh", 5)
    rows = {name: getattr(port_numpy, name)(follow.Fresh(name, 5).inputs)
            for name in ("sampler", "choices")}
    _, levels, _, text = certified(capsys, monkeypatch, hand_in(tmp_path, rows), *words)
    assert levels == {"sampler": "PASS", "run": "PASS"}, text
    rows["choices"] = port_numpy.choices(follow.Fresh("choices", 6).inputs)
    _, levels, _, text = certified(capsys, monkeypatch, hand_in(tmp_path, rows), *words)
    assert levels["run"] == "FAIL", text


def test_a_port_changed_at_random_is_refused(capsys, monkeypatch):
    """Places in the numpy port's ranks and votes: what passes changes nothing."""
    import changed_ports

    monkeypatch.setattr(sys, "argv", ["changed_ports.py", "--part", "choices"])
    changed_ports.main()
    *lines, counts = capsys.readouterr().out.splitlines()
    passing = [line.split()[1] for line in lines if line.startswith("passes")]
    # The weight of each answer where all weigh the same; what is asked where ties are not `late`
    assert [place.split(":")[0] for place in passing] == ["votes"] * 3, passing
    assert json.loads(counts)["places"] == len(lines) > 15


def test_an_engine_is_asked_over_http(capsys, monkeypatch):
    """A server that answers scores and the sampler, and does not offer the rest."""
    import http.server
    import threading

    expected = published("m8")
    prefixes = [prefix["ids"] for prefix in published("m8", "case")["prefixes"]]

    class Engine(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = None
            if self.path == "/stop/score":
                i = prefixes.index(request["prefix_token_ids"])
                answer = {row: expected[row][i] for row in ("logits", "scores")}
            elif self.path == "/stop/sampler":
                answer = port_numpy.sampler(request)
            if self.path == "/stop/choices":
                answer = {"error": "out of memory"}
            self.send_response(200 if answer else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() if answer else b"")

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    status, _, lines, err = run(
        capsys, monkeypatch, "oracle/certify.py", "--server", url, "--cases", "m8,sampler"
    )
    words = ("oracle/certify.py", "--server", url, "--cases", "choices")
    broken, _, _, message = run(capsys, monkeypatch, *words)
    assert broken == 2 and "answered an error: 'out of memory'" in message
    words = ("oracle/certify.py", "--server", "http://local host:1", "--cases", "choices")
    assert run(capsys, monkeypatch, *words)[0] == 2
    server.shutdown()
    text = "\n".join(lines)
    assert (
        status == 0 and "score     float32   PASS" in text and "sampler   float32   PASS" in text
    ), (text + err)
    assert "training  float32   NOT SHOWN" in text


@pytest.fixture(scope="module")
def archive_root(tmp_path_factory):
    """The archive, unpacked; of one base model and of MXFP4, without the others' weights."""
    import archive

    folder = tmp_path_factory.mktemp("archive")
    every = archive.cases.CASES
    archive.cases.CASES = [case for case in every if case.name in ("qwen2", "mxfp4")]
    try:
        content = archive.pack(archive.contents())
        assert content == archive.pack(archive.contents())
    finally:
        archive.cases.CASES = every
    (folder / "a.tar.gz").write_bytes(content)
    with tarfile.open(folder / "a.tar.gz") as opened:
        opened.extractall(folder)  # our own: `filter` is not there before Python 3.11.4
    (root,) = folder.glob("stop-oracle-*")
    return root


def test_the_archive_needs_no_python(archive_root):
    """It lists its files' digests; weights come back bit for bit; MXFP4 as blocks and scales."""
    for line in (archive_root / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((archive_root / name).read_bytes()).hexdigest() == digest, name
    folder = archive_root / "golden" / "checkpoints" / "qwen2-tied-sharded"
    weights = json.loads((folder / "weights.json").read_text())["tensors"]
    for name, weight in load(folder).named_parameters():
        values = torch.tensor(weights[name]["data"]).view(weights[name]["shape"])
        assert torch.equal(values, weight), name
    folder = archive_root / "golden" / "mxfp4" / "gptoss-mxfp4-tiny"
    weights = json.loads((folder / "weights.json").read_text())["tensors"]
    name = "model.layers.1.mlp.experts.down_proj"
    parts = [weights[f"{name}_{part}"] for part in ("blocks", "scales")]
    parts = [port_numpy.np.array(part["data"], "uint8").reshape(part["shape"]) for part in parts]
    decoded = port_numpy.unpack(*parts, None)
    assert decoded.reshape(-1).tolist() == weights[name]["data"]


def alone(script, *words, **options):
    """(exit status, stdout, stderr) of a script by Python without any package."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), *map(str, words)],
        capture_output=True, text=True, timeout=300, **options,
    )
    return done.returncode, done.stdout, done.stderr


def test_certify_needs_the_standard_library_alone(tmp_path, archive_root):
    """From the archive, in another folder; the report on stdout is JSON and nothing else."""
    rows = {name: published(name) for name in CASES}
    script = archive_root / "certify.py"
    status, out, err = alone(script, hand_in(tmp_path, rows), "--json", "-", cwd=tmp_path)
    assert status == 0, err
    assert set(json.loads(out)["levels"].values()) == {"PASS"}
    assert "decoder   float32   PASS" in err
    status, out, err = alone(script, tmp_path, "--fresh", 3, "--cases", "sampler")
    assert status == 2 and err.count("\n") == 1 and "needs torch" not in out
    expected = archive_root / "vectors" / "m8" / "expected.json"
    content = expected.read_bytes()
    expected.write_bytes(content.replace(b'"scores": [0', b'"scores": [1', 1))
    status, _, err = alone(script, tmp_path)
    expected.write_bytes(content)
    assert status == 2 and "vectors/m8/expected.json: its SHA-256" in err
    manifest = archive_root / "vectors" / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b"1e-06", b"1e-01", 1))
    status, _, err = alone(script, tmp_path)
    assert status == 2 and "vectors/manifest.json: its SHA-256 is not that of digest.py" in err
    manifest.unlink()
    status, _, err = alone(script, tmp_path)
    manifest.write_bytes(content)
    assert status == 2 and "vectors/manifest.json: missing" in err and err.count("\n") == 1


def test_what_the_archive_names_is_in_it(archive_root):
    """Folders of checkpoints and STOPs, and certify as it is called there."""
    for name in ("qwen2", "mxfp4"):
        case = json.loads((archive_root / "vectors" / name / "case.json").read_text())
        assert (archive_root / case["checkpoint"]).is_dir()
    for name in CASES[:5]:  # STOPs are small: those of all cases are there
        assert (archive_root / published(name, "case")["stop"]).is_dir(), name
    for name in ("README.md", "PORTING.md"):
        text = (archive_root / name).read_text()
        assert "python3 -I certify.py" in text and "oracle/certify.py" not in text


PORT = """import json, sys, time
case = json.load(sys.stdin)
if case["name"] == "choices":
    {choices}
folder = case["root"] + "/vectors/" + case["name"]
json.dump(json.load(open(folder + "/expected.json")), sys.stdout)
"""


@pytest.mark.parametrize("choices, message", (
    ("pass", None),
    ("time.sleep(60)", "no answer within 2 seconds"),
    ("sys.exit('it broke')", "exit status 1: 'it broke'"),
    ("print('{')", "not JSON"),
    ("sys.stdout.write('{\"votes\": 1, \"votes\": 2}'); sys.exit()", "stands twice"),
))
def test_a_command_is_run_once_a_case(tmp_path, choices, message):
    (tmp_path / "port.py").write_text(PORT.replace("{choices}", choices))
    status, out, err = alone(
        ORACLE / "certify.py", "--command", f"{sys.executable} {tmp_path / 'port.py'}",
        "--cases", "sampler,choices", "--timeout", 2 if "sleep" in choices else 60,
    )
    if message is None:
        assert status == 0 and "sampler   float32   PASS" in out
        assert "run       float32   PASS" in out
    else:
        assert status == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("command, message", (
    ("yes", "found more than 67,108,864 bytes on its standard output"),
    ("", "found no word in it, expected a program"),
    ("sh -c 'yes >&2'", "no answer within 3 seconds"),
))
def test_a_command_without_end_is_ended(command, message):
    """Nothing of it is left, in one line, in the time that it was given."""
    begun = time.monotonic()
    status, _, err = alone(ORACLE / "certify.py", "--command", command, "--cases", "sampler",
                           "--timeout", 3)
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert time.monotonic() - begun < 30


def test_no_verdict_on_what_was_not_asked(tmp_path, capsys, monkeypatch):
    """m8 has no runs: nothing is said to have passed there."""
    words = ("--cases", "m8", "--levels", "run")
    for more in ((), ("--dtype", "bfloat16")):
        status, levels, _, text = certified(
            capsys, monkeypatch, hand_in(tmp_path, {"m8": published("m8")}), *words, *more
        )
        assert status == 1 and levels == {"run": "NOT SHOWN"}, text


def test_devices_and_links_stay(tmp_path):
    """A device is refused as the report's file, from the archive too, and a link stays one."""
    hand_in(tmp_path, {"choices": published("choices")})
    words = (tmp_path, "--cases", "choices", "--json")
    status, _, err = alone(ORACLE / "certify.py", *words, "/dev/null")
    assert (status, err) == (2, "error: /dev/null: found a device, expected a file or none\n")
    assert not os.path.isfile("/dev/null")
    (tmp_path / "report").touch()
    (tmp_path / "link").symlink_to("report")
    assert alone(ORACLE / "certify.py", *words, tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "report").read_text()
    status, _, err = alone(ORACLE / "certify.py", *words, tmp_path / "no" / "report")
    assert status == 2 and "cannot be written" in err and err.count("\n") == 1


HOSTILE = {
    "a nesting without end": "[" * 100000,
    "an integer of 5,000 digits": '{"scores": [1' + "0" * 5000 + "]}",
    "an integer beyond float64": '{"scores": [1' + "0" * 400 + "]}",
    "infinity": '{"scores": [1e999]}',
    "NaN": '{"scores": [NaN, 1]}',
    "true": '{"scores": [true, false], "kept": [[true]], "loss": true}',
    "a lone surrogate": '{"scores": ["\\ud800"], "\\ud800": 1}',
    "control characters": '{"scores": ["\\u001b[2J"], "a\\nb": 1}',
    "ragged": '{"scores": [[1, [2]], []], "logits": [[[]]], "grad": [1], "hidden": {"0": 1}}',
    "null inside": '{"logits": [[null]], "paths": [[null]], "uninterrupted": [[{}]]}',
    "strange paths": '{"paths": [[{"index": [1], "branches": {"a": 1}, "ids": "x", "score": {}}]]}',
    "mixed": '{"kept": [[1, "a", null, [2], {"b": 3}]], "paths": "all", "uninterrupted": 7}',
    "not UTF-8": b"\xff\xfe{",
    "an array": "[]",
    "nothing": "",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_hand_ins(tmp_path, capsys, monkeypatch, what):
    """Read, and failed, or refused in one line of plain text; never a traceback."""
    content = HOSTILE[what]
    (tmp_path / "qwen2.json").write_bytes(content if isinstance(content, bytes) else
                                          content.encode())
    monkeypatch.setattr(sys, "argv", ["certify.py", str(tmp_path), "--cases", "qwen2"])
    status = certify.main()
    out, err = capsys.readouterr()
    assert status in (1, 2) and (status == 1) == (err == "") and err.count("\n") <= 1
    assert (out + err).replace("\n", "").isprintable() and (out + err).isascii()
    if what == "NaN":
        assert "[0]: found NaN" in out


def test_a_hand_in_of_gigabytes_is_one_line(tmp_path, capsys, monkeypatch):
    with open(tmp_path / "qwen2.json", "wb") as file:
        file.truncate(2 * 10 ** 9)  # sparse
    monkeypatch.setattr(sys, "argv", ["certify.py", str(tmp_path), "--cases", "qwen2"])
    assert certify.main() == 2
    err = capsys.readouterr().err
    assert "found 2,000,000,000 bytes, expected at most" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "what, message",
    (
        ("no folder", "no such folder"),
        ("junk", "qwen2.safetensors: not a whole"),
        ("beyond", "qwen2.safetensors: 'scores': not a tensor of"),
        ("twice", "qwen2.json: not JSON: the key 'scores' stands twice"),
        ("json", "qwen2.json: not JSON"),
        ("case", "--cases: found 'llama'"),
        ("level", "--levels: found 'all'"),
        ("write", "--write"),
        ("nothing", "expected one of DIR"),
        ("fresh bfloat16", "--dtype: found bfloat16 beside --fresh, expected float32"),
    ),
)
def test_bad_outputs(tmp_path, capsys, monkeypatch, what, message):
    """Exit status 2 and one line that names the file."""
    words = {"case": ["--cases", "llama"], "level": ["--levels", "all"],
             "fresh bfloat16": ["--fresh", 7, "--dtype", "bfloat16"]}.get(what, [])
    folder = [tmp_path]
    if what == "no folder":
        folder = [tmp_path / "no"]
    elif what == "junk":
        (tmp_path / "qwen2.safetensors").write_bytes(b"junk")
    elif what == "beyond":  # the data are as long as the shape wants, the offsets are not
        header = b'{"scores": {"dtype": "F32", "shape": [8], "data_offsets": [0, 999]}}'
        size = len(header).to_bytes(8, "little")
        (tmp_path / "qwen2.safetensors").write_bytes(size + header + bytes(32))
    elif what == "twice":
        (tmp_path / "qwen2.json").write_text('{"scores": [0.5], "scores": [0.25]}')
    elif what == "json":
        (tmp_path / "qwen2.json").write_text("{")
    elif what == "write":
        folder = ["--write", tmp_path]
    elif what == "nothing":
        folder = []
    status, _, _, err = run(capsys, monkeypatch, "oracle/certify.py", *folder, *words)
    assert (
        status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
    ), err
