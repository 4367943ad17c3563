"""A STOP module's folder: ours (stop.safetensors, stop.json), and that of the authors' release.

Ours repeats what describes the module (m, rank, alpha, targets, head, shared, the base model's
fingerprint) in the metadata of stop.safetensors, so that the two files cannot be exchanged
unnoticed, and stop.json holds a digest of the tensors' bytes. The release (README of
github.com/bijiaxihh/STOP) is a PEFT adapter, one token shared by all m, and a head of two logits.
"""
import dataclasses
import hashlib
import json
import re
from pathlib import Path

from safetensors.torch import save

from plumbing.budget_plan import CHECKPOINTS
from plumbing.checkpoint import Keys, is_finite, open_tensors, read_tensors, tensors_digest
from plumbing.files import embedded, is_there, read_bytes
from plumbing.records import read_json, write_atomic

DESCRIPTION = ("m", "shared", "rank", "alpha", "targets", "head", "base_fingerprint")

# An adapter_config.json of PEFT. Those of its keys that are read here:
PEFT_USED = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights"}
# Those that change no score, whatever they hold:
PEFT_INERT = set("""
    auto_mapping base_model_name_or_path revision peft_version inference_mode task_type
    megatron_core qalora_group_size eva_config loftq_config corda_config lora_ga_config
""".split())
# Any other must be off: under it PEFT computes something else than (alpha / r) B A x, or on other
# tokens or layers. Of its ways to begin a training these leave the base model as it is; the others
# (pissa, olora, corda, loftq, lora_ga) take the adapter's first product out of the base weights.
PEFT_OFF = (None, False, {}, [], "", "none")
PEFT_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass
class SavedStop:
    """What a STOP's folder holds, read and checked, but not yet matched with a model."""
    settings: dict           # of a Stop: m, rank, alpha, targets, head, shared, dropout
    tensors: dict            # {name: tensor}: tokens, head.weight, head.bias, LoRA's pairs
    sources: dict            # {name: the file it was read from}
    base_fingerprint: str | None   # of the model it was trained for; None: the release does not say
    trained: dict            # settings and metrics of its training
    file: Path               # the file that a missing tensor is missed in


def read_stop(folder):
    """The SavedStop in a folder, in our layout or the authors'.
    Raises ValueError where a file is missing, broken or changed."""
    folder = embedded(folder)
    if (folder / "adapter").is_dir():
        return read_release(folder)
    file = folder / "stop.safetensors"
    json_file = folder / "stop.json"
    about = read_json(json_file)
    tensors = read_tensors(file)
    described = read_metadata(file)
    settings = check_description(described, file)
    check_agreement(about, described, json_file)
    check_digest(about, tensors, json_file, file)
    trained = read_trained(Keys(about, json_file).mapping("trained"), json_file)
    check_numbers(tensors, dict.fromkeys(tensors, file))
    return SavedStop(
        settings=settings,
        tensors=tensors,
        sources=dict.fromkeys(tensors, file),
        base_fingerprint=described["base_fingerprint"],
        trained=trained,
        file=file)


def read_trained(trained, json_file):
    """What stop.json says of a STOP's training. Raises ValueError where a later run could not take
    its checkpoint and its limit from there."""
    keys = Keys(Keys(trained, json_file).mapping("settings"), json_file)
    checkpoints = "a number of tokens, or several as in 1024,2048"
    prefix = keys.read("prefix", (int, str), checkpoints, "2048")
    keys.require("prefix", CHECKPOINTS.fullmatch(str(prefix)), checkpoints)
    keys.integer("max_new_tokens", 1)  # absent: what the context leaves
    return {key: value for key, value in trained.items() if value is not None}


def read_metadata(file):
    """The description of the module in the metadata of stop.safetensors."""
    with open_tensors(file) as opened:
        metadata = opened.metadata() or {}
    if "stop" not in metadata:
        raise ValueError(f"{file}: its metadata describe no STOP: found no entry `stop`")
    return read_json(f"{file}: metadata", metadata["stop"].encode())


def check_description(described, source):
    """The settings of a Stop out of its description: each value's type and range are checked."""
    keys = Keys(described, source)
    fingerprint = keys.read("base_fingerprint", (str,), "a text")
    is_digest = re.fullmatch(r"[0-9a-f]{16}", fingerprint) is not None
    keys.require("base_fingerprint", is_digest, "16 hexadecimal digits")
    return {
        "m": keys.integer("m"),
        "rank": keys.integer("rank"),
        "alpha": keys.number("alpha"),
        "targets": read_targets(keys),
        "head": read_head_kind(keys),
        "shared": keys.flag("shared"),
        "dropout": read_dropout(keys, "dropout")}


def read_targets(keys):
    """The names of the linears that LoRA joins."""
    targets = keys.items("targets")
    are_names = all(isinstance(target, str) for target in targets)
    keys.require("targets", are_names, "a list of linears' names")
    keys.require("targets", len(set(targets)) == len(targets), "each linear's name once")
    return targets


def read_head_kind(keys):
    """sigmoid (one logit) or softmax (two)."""
    head = keys.read("head", (str,), "sigmoid or softmax")
    keys.require("head", head in ("sigmoid", "softmax"), "sigmoid or softmax")
    return head


def read_dropout(keys, key):
    """LoRA's dropout in training; absent, there is none."""
    dropout = keys.read(key, (int, float), "a number from 0 to below 1", 0.0)
    keys.require(key, 0 <= dropout < 1, "a number from 0 to below 1")
    return dropout


def check_agreement(about, described, json_file):
    """Raise ValueError unless stop.json and the metadata of stop.safetensors say the same."""
    keys = Keys(about, json_file)
    for key in DESCRIPTION:
        same = json.dumps(about.get(key)) == json.dumps(described[key])
        keys.require(key, same, f"{described[key]!r} as in stop.safetensors")
    check_description(about, json_file)


def check_digest(about, tensors, json_file, file):
    """Raise ValueError where stop.json holds the digest of other tensors. Older files hold none."""
    if about.get("digest") is None:
        return
    found = tensors_digest(tensors)
    if found != about["digest"]:
        raise ValueError(
            f"{file}: found tensors of digest {found}, expected {about['digest']!r}, which "
            f"{json_file.name} holds: the file was damaged or exchanged")


def check_numbers(tensors, sources):
    """Raise ValueError unless every tensor holds finite floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{sources[name]}: {name}: found {tensor.dtype}, expected floats")
        if not is_finite(tensor):
            message = "found NaN or infinity, expected finite numbers"
            raise ValueError(f"{sources[name]}: {name}: {message}")


def read_release(folder):
    """The SavedStop in the authors' layout: adapter/, classifier_head.pth, assess_token_*."""
    classifier = folder / "adapter" / "classifier"
    adapter_file = classifier / "adapter_config.json"
    adapter = Keys(read_json(adapter_file), adapter_file)
    count_file = folder / "assess_token_config.json"
    count = Keys(read_json(count_file), count_file)
    check_peft(adapter)

    file = classifier / "adapter_model.bin"
    if not is_there(file):
        file = classifier / "adapter_model.safetensors"
    head_file = folder / "classifier_head.pth"
    token_file = folder / "assess_token_embedding.pth"
    pairs = {}
    for name, tensor in read_tensors(file).items():
        pairs[str(name).removeprefix("base_model.model.")] = tensor
    head = read_tensors(head_file, "weight", "bias")
    token = read_tensors(token_file, "input_embedding")["input_embedding"]

    tensors = dict(pairs)
    tensors["tokens"] = token[None]
    tensors["head.weight"] = head["weight"]
    tensors["head.bias"] = head["bias"]
    sources = dict.fromkeys(pairs, file)
    sources["tokens"] = token_file
    sources["head.weight"] = head_file
    sources["head.bias"] = head_file
    check_numbers(tensors, sources)
    check_targets(adapter, pairs)
    return SavedStop(
        settings={
            "m": count.integer("num_assess_tokens"),
            "rank": adapter.integer("r"),
            "alpha": adapter.number("lora_alpha"),
            "targets": adapted_linears(pairs),
            "head": "softmax",
            "shared": True,
            "dropout": read_dropout(adapter, "lora_dropout")},
        tensors=tensors,
        sources=sources,
        base_fingerprint=None,
        trained={},
        file=file)


def check_peft(adapter):
    """Raise ValueError on a key of an adapter_config.json that makes the scores others."""
    adapter.require("peft_type", adapter.raw.get("peft_type", "LORA") == "LORA", "LORA")
    init = adapter.raw.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else init
    adapter.require(
        "init_lora_weights", init in PEFT_INITS,
        "one that leaves the base weights as they are (true, false, gaussian, eva, orthogonal, "
        "mica): convert the adapter with PEFT's path_initial_model_for_weight_conversion")
    for key, value in adapter.raw.items():
        if key not in PEFT_USED | PEFT_INERT:
            adapter.require(key, value in PEFT_OFF, "none: the scores would be others")


def check_targets(adapter, pairs):
    """Raise ValueError where there are tensors of linears that target_modules does not name: PEFT
    would pass over them. Where it is a text (a pattern, all-linear), the tensors decide."""
    targets = adapter.raw.get("target_modules")
    if isinstance(targets, list):
        names = {str(target).rpartition(".")[2] for target in targets}
        found = adapted_linears(pairs)
        adapter.require(
            "target_modules", names.issuperset(found), f"{', '.join(found)} as its tensors have")


def adapted_linears(pairs):
    """Last names of the linears with LoRA weights: layers.0.self_attn.q_proj.lora_A -> q_proj."""
    linears = {name.partition(".lora_")[0] for name in pairs if ".lora_" in name}
    return sorted({linear.rpartition(".")[2] for linear in linears})


def write_stop(folder, about, tensors, trained):
    """Write stop.safetensors and stop.json, each whole or not at all.
    about: the description (DESCRIPTION's keys); trained: its training's settings and metrics."""
    folder = Path(folder)
    stored = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    content = save(stored, {"stop": json.dumps(about)})
    described = about | {"digest": tensors_digest(stored), "trained": trained}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "stop.safetensors", content)
    write_atomic(folder / "stop.json", json.dumps(described, indent=1) + "\n")


def files_digest(folder):
    """Digits that stand for every byte of a STOP's two files, or None where one is missing."""
    found = hashlib.sha256()
    for name in ("stop.safetensors", "stop.json"):
        file = Path(folder) / name
        if not is_there(file):
            return None
        found.update(hashlib.sha256(read_bytes(file)).digest())
    return found.hexdigest()


def match(saved, expected_shapes):
    """Raise ValueError unless a SavedStop's tensors have exactly these shapes, {name: shape}."""
    for name in sorted(expected_shapes.keys() | saved.tensors.keys()):
        found = list(saved.tensors[name].shape) if name in saved.tensors else "none"
        expected = list(expected_shapes[name]) if name in expected_shapes else "none"
        if found != expected:
            file = saved.sources.get(name, saved.file)
            raise ValueError(f"{file}: {name}: found shape {found}, expected {expected}")
