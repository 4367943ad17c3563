"""A base model's folder as the Hub holds it: config.json, generation_config.json, safetensors.

    folder = find_folder("directory or Hub id")
    config = read_config(folder)
    tensors = read_weights(folder, config, shapes, device="cuda", dtype=torch.bfloat16)

Everything is read strictly. What would change a hidden state and is not computed here is refused by
name; what is known to change none is let through. The models are those of the paper's section 5,
Qwen2, Qwen3 and GPT-OSS, and Llama.
"""
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from plumbing.files import embedded, is_there, require_file
from plumbing.records import read_json, require_keys_once

KINDS = ("qwen2", "qwen3", "llama", "gpt_oss")

USED = set("""
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim rms_norm_eps tie_word_embeddings
    max_position_embeddings rope_theta rope_scaling rope_parameters hidden_act attention_bias
    layer_types sliding_window use_sliding_window eos_token_id quantization_config
""".split())
USED_BY_GPT_OSS = set("""
    num_local_experts num_experts_per_tok experts_per_token swiglu_limit swiglu_alpha
""".split())
ROPE_KEYS = set("""
    rope_type type rope_theta factor original_max_position_embeddings beta_fast beta_slow truncate
    attention_factor attn_factor low_freq_factor high_freq_factor
""".split())

# Keys that change no hidden state, whatever they hold.
INERT = set("""
    auto_map base_model_name_or_path bos_token_id chunk_size_feed_forward decoder_start_token_id
    dtype finetuning_task id2label initial_context_length initializer_range is_decoder
    is_encoder_decoder label2id max_window_layers model_max_length model_name name_or_path
    output_attentions output_hidden_states output_router_logits pad_token_id prefix
    pretraining_tp problem_type return_dict router_aux_loss_coef sep_token_id
    task_specific_params tokenizer_class torch_dtype torchscript transformers_version
    trl_version unsloth_fixed unsloth_version use_bfloat16 use_cache

    attention_dropout attn_pdrop classifier_dropout embd_pdrop hidden_dropout resid_pdrop

    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _commit_hash _experts_implementation _experts_implementation_internal _name_or_path
    attn_implementation use_flash_attention use_flash_attn

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    temperature top_k top_p typical_p
""".split())

# Keys that change hidden states unless they hold this value.
NEUTRAL = {"is_causal": True, "partial_rotary_factor": 1.0, "scale_attn_weights": True}

QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")
LARGEST = 2 ** 31  # of an integer in a config.json
LARGEST_FLOAT = 2 ** 127  # of another number: what float32 holds
LARGEST_HEADER = 100_000_000  # bytes of a safetensors header, as in the library


@dataclasses.dataclass
class Config:
    """What the decoder needs of config.json. Lengths are in tokens."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: dict                # rope_type, rope_theta, and the settings of YaRN or Llama 3
    windows: tuple            # per layer: how many keys a query sees, itself included; None = all
    tie_word_embeddings: bool = False
    experts: int = 0          # GPT-OSS
    experts_per_token: int = 0
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    quantized: bool = False   # experts stored as MXFP4
    reward: bool = False      # Qwen2ForProcessRewardModel: two logits (bad, good), no next token
    eos_ids: tuple = ()       # where generation stops
    # R1-0528-Qwen3-8B's attn_factor of 0.878: transformers ignores it (cos and sin times 1.1386),
    # vLLM does not (1.0). False follows transformers.
    apply_attn_factor: bool = False

    @classmethod
    def from_dict(cls, raw, source="config.json", apply_attn_factor=False):
        """Config from the content of a config.json, in the spelling of transformers 4 or 5.
        Raises ValueError naming the key that it cannot honour."""
        keys = Keys(raw, source)
        kind = raw.get("model_type")
        keys.require("model_type", kind in KINDS, " or ".join(KINDS))
        quantized = read_quantization(keys, kind)
        refuse_unknown(keys, kind)

        heads = keys.integer("num_attention_heads")
        kv_heads = keys.integer("num_key_value_heads")
        layers = keys.integer("num_hidden_layers")
        hidden = keys.integer("hidden_size")
        inner = keys.integer("intermediate_size")
        context = keys.integer("max_position_embeddings")
        derived = hidden // heads if kind in ("qwen2", "llama") else None
        head_dim = keys.integer("head_dim", derived)
        has_biases = kind in ("qwen2", "gpt_oss")

        keys.require("hidden_act", raw.get("hidden_act", "silu") == "silu", "silu")
        keys.require("num_key_value_heads", heads % kv_heads == 0, f"a divisor of {heads} heads")
        keys.require("head_dim", head_dim > 0, "at least 1: hidden_size / num_attention_heads")
        keys.require("head_dim", head_dim % 2 == 0, "an even number, for RoPE's halves")
        for key in ("attention_bias", "qkv_bias"):
            biased = keys.flag(key, has_biases)
            keys.require(key, biased == has_biases, f"{has_biases} for {kind}")

        experts = 0
        experts_per_token = 0
        if kind == "gpt_oss":
            experts = keys.integer("num_local_experts")
            experts_per_token = read_experts_per_token(keys, experts)
            for key, size in (("intermediate_size", inner), ("hidden_size", hidden)):
                fits = not quantized or size % 32 == 0
                keys.require(key, fits, "a multiple of 32, for MXFP4's blocks")

        reward = raw.get("architectures") == ["Qwen2ForProcessRewardModel"]
        tied = keys.flag("tie_word_embeddings", False)
        return cls(
            model_type=kind,
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=keys.number("rms_norm_eps"),
            max_position_embeddings=context,
            rope=read_rope(keys, kind, context),
            windows=read_windows(keys, kind, layers),
            tie_word_embeddings=tied and not reward,
            experts=experts,
            experts_per_token=experts_per_token,
            swiglu_limit=keys.number("swiglu_limit", 7.0),
            swiglu_alpha=keys.number("swiglu_alpha", 1.702),
            quantized=quantized,
            reward=reward,
            apply_attn_factor=apply_attn_factor)


def shorten(value):
    """The repr of a found value, on one line and of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Keys:
    """The keys of a JSON object, read one at a time.
    A ValueError names the file, the key, what was found and what was expected."""

    def __init__(self, raw, source):
        self.raw = raw
        self.source = source

    def refuse(self, key, expected):
        found = shorten(self.raw.get(key))
        raise ValueError(f"{self.source}: {key}: found {found}, expected {expected}")

    def require(self, key, fine, expected):
        if not fine:
            self.refuse(key, expected)

    def read(self, key, kinds, expected, default=None):
        """The value of a key, of one of the types `kinds`; null or absent, the default."""
        value = self.raw.get(key)
        if value is None:
            value = default
        self.require(key, type(value) in kinds, expected)
        return value

    def integer(self, key, default=None):
        value = self.read(key, (int,), "a positive integer", default)
        self.require(key, 0 < value < LARGEST, "a positive integer")
        return value

    def number(self, key, default=None):
        value = self.read(key, (int, float), "a positive number", default)
        self.require(key, 0 < value < LARGEST_FLOAT, "a positive number")
        return value

    def flag(self, key, default=None):
        return self.read(key, (bool,), "true or false", default)

    def mapping(self, key):
        return self.read(key, (dict,), "an object", {})

    def items(self, key):
        return self.read(key, (list,), "a list", [])


def read_quantization(keys, kind):
    """Whether the experts are stored as MXFP4. Any other quantisation is refused."""
    for key in QUANTIZATION_KEYS:
        found = keys.raw.get(key)
        if found is None or found == {}:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else None
        is_mxfp4 = key == "quantization_config" and kind == "gpt_oss" and method == "mxfp4"
        expected = "none, or quant_method mxfp4 on gpt_oss: take an upload that is not quantised"
        keys.require(key, is_mxfp4, expected)
        return True
    return False


def is_inert(key, value):
    """Whether a key that is not read may be passed over: known to be inert, or switched off."""
    if key in NEUTRAL:
        return value is None or value == NEUTRAL[key]
    return key in INERT or value is None or value is False or value in ("", [], {})


def refuse_unknown(keys, kind):
    """Refuse a key that is not read and might change a hidden state."""
    known = USED | {"qkv_bias"} | set(QUANTIZATION_KEYS)
    if kind == "gpt_oss":
        known = known | USED_BY_GPT_OSS
    for key, value in keys.raw.items():
        if key not in known and not is_inert(key, value):
            keys.refuse(key, f"no such key: it is not known what it changes in a {kind}")


def read_experts_per_token(keys, experts):
    """How many experts compute a token of GPT-OSS, which some files spell in two ways."""
    short = keys.raw.get("experts_per_token")
    count = keys.integer("num_experts_per_tok", short)
    keys.require("num_experts_per_tok", count <= experts, f"at most num_local_experts = {experts}")
    agree = short is None or short == count
    keys.require("experts_per_token", agree, f"{count} as num_experts_per_tok")
    return count


def read_windows(keys, kind, layers):
    """Per layer, how many keys a query sees (itself included), or None for all."""
    allowed = ["full_attention"]
    if kind == "gpt_oss":
        allowed = ["sliding_attention", "full_attention"]  # in turns, beginning with a window
    else:
        windowed = keys.flag("use_sliding_window", False)
        keys.require("use_sliding_window", not windowed, f"false for {kind}")

    types = keys.items("layer_types")
    if not types:
        types = [allowed[layer % len(allowed)] for layer in range(layers)]
    fine = len(types) == layers and all(name in allowed for name in types)
    keys.require("layer_types", fine, f"{layers} of {' or '.join(allowed)}")

    windows = []
    for name in types:
        is_windowed = name == "sliding_attention"
        windows.append(keys.integer("sliding_window") if is_windowed else None)
    return tuple(windows)


def read_rope(keys, kind, context):
    """RoPE's settings, from rope_theta and rope_scaling (transformers 4) or rope_parameters (5)."""
    scaling = keys.mapping("rope_scaling")
    parameters = keys.mapping("rope_parameters")
    if parameters:
        agree = all(parameters.get(key) == value for key, value in scaling.items())
        keys.require("rope_scaling", agree, "nothing else than rope_parameters says, beside it")
    scaling = scaling | parameters
    if kind == "gpt_oss":  # without it transformers takes its YaRN, and other readers none
        found = scaling != {}
        keys.require("rope_scaling", found, "YaRN's settings, as published gpt-oss has them")
    given = {key: value for key, value in scaling.items() if value is not None}
    rope_keys = Keys({"rope_theta": keys.raw.get("rope_theta")} | given, keys.source)
    for key, value in given.items():
        if key not in ROPE_KEYS and not is_inert(key, value):
            rope_keys.refuse(key, "no such key: it is not known what it changes in RoPE")

    rope_type = given.get("rope_type", given.get("type", "default"))
    rope_keys.raw["rope_type"] = rope_type
    known = ("default", "yarn", "llama3")
    rope_keys.require("rope_type", rope_type in known, "default, yarn or llama3")
    rope = {"rope_type": rope_type, "rope_theta": rope_keys.number("rope_theta")}
    if rope_type == "yarn":
        original = rope_keys.number("original_max_position_embeddings", context)
        rope["original_max_position_embeddings"] = original
        rope["factor"] = rope_keys.number("factor")
        rope["truncate"] = rope_keys.flag("truncate", True)
        rope["beta_fast"] = rope_keys.number("beta_fast", 32)
        rope["beta_slow"] = rope_keys.number("beta_slow", 1)
        for key in ("attention_factor", "attn_factor"):
            if key in given:
                rope[key] = rope_keys.number(key)
    if rope_type == "llama3":
        original = rope_keys.number("original_max_position_embeddings", context)
        rope["original_max_position_embeddings"] = original
        for key in ("factor", "low_freq_factor", "high_freq_factor"):
            rope[key] = rope_keys.number(key)
        low = rope["low_freq_factor"]
        rises = rope["high_freq_factor"] > low
        rope_keys.require("high_freq_factor", rises, f"more than low_freq_factor = {low}")
    return rope


def fingerprint(config):
    """Sixteen digits of every field that shapes hidden states: what a STOP module is trained for.
    A field at its default stays out, so that one added later changes no digest; 10000 and 1e4 are
    the same."""
    blind = ("eos_ids", "quantized", "max_position_embeddings", "reward")
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in blind and value != field.default:
            fields[field.name] = value

    rope = {}
    for key, value in config.rope.items():
        is_scaled = config.rope["rope_type"] != "default"
        if key == "rope_theta" or is_scaled:  # the other keys are YaRN's or Llama 3's
            rope[key] = float(value) if type(value) is int else value
    fields["rope"] = rope
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------- the folder


def find_folder(path):
    """The local directory of a checkpoint: `path` itself, the embedded toy's (`files.embedded`), or
    a Hub id's files. These are fetched, or taken from the cache when offline; of a repository the
    top level alone, since its subfolders hold other formats and training states."""
    folder = embedded(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path}: found a file, expected a checkpoint's directory or a Hub id")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise ValueError(f"{path}: no such directory, and not a Hub id (owner/name)")
    try:
        folder = huggingface_hub.snapshot_download(
            str(path),
            allow_patterns=["*.safetensors", "*.json", "*.jinja"],
            ignore_patterns=["*/*"])
    except (ValueError, OSError) as error:  # the Hub library's own errors are one or the other
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = f"{path}: no such directory, and the Hub did not give it: {lines[0]}"
        raise ValueError(message) from None
    return Path(folder)


def read_config(folder, apply_attn_factor=False):
    """The Config of a checkpoint's folder, with eos_ids. Raises ValueError naming file and key."""
    file = folder / "config.json"
    raw = read_json(file)
    config = Config.from_dict(raw, file, apply_attn_factor)
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if is_there(generation_file) else {}
    if generation.get("eos_token_id") is not None:
        config.eos_ids = read_eos_ids(Keys(generation, generation_file), config.vocab_size)
    else:
        config.eos_ids = read_eos_ids(Keys(raw, file), config.vocab_size)
    return config


def read_eos_ids(keys, vocab_size):
    """The ids of "eos_token_id": a token id, a list of them, or none."""
    found = keys.raw.get("eos_token_id")
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    for token in ids:
        fine = type(token) is int and 0 <= token < vocab_size
        keys.require("eos_token_id", fine, f"token ids from 0 to {vocab_size - 1}")
    return tuple(ids)


# --------------------------------------------------------------------------------- the weights

FLOATS = ("F32", "F16", "BF16")
PACKED = ("_blocks", "_scales")  # MXFP4's endings, bytes both

# A byte of MXFP4 holds two codes of four bits, the low half first.
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BYTES = [[CODES[byte % 16], CODES[byte // 16]] for byte in range(256)]
POWERS = [2.0 ** (byte - 127) for byte in range(256)]


@dataclasses.dataclass
class StoredTensor:
    """Where a tensor lies on disk, and what its file's header says of it."""
    file: Path
    shape: tuple
    dtype: str      # in safetensors' spelling: F32, BF16, U8, ...


def read_weights(folder, config, shapes, device, dtype):
    """{name: tensor on `device` in `dtype`} for every name in `shapes`: {name: shape} of the model.
    Strict both ways: a missing, unexpected or wrongly shaped tensor is a ValueError that names it,
    its file and both shapes, before any is read; so is NaN or infinity in one that was read.
    A tied lm_head.weight is not in `shapes`; on disk it may be absent, or equal to the embeddings.
    Host memory stays below the finished model plus one shard."""
    packed = [name for name in shapes if config.quantized and is_packed(name)]
    stored = list_tensors(folder)
    expected = shapes_on_disk(shapes, packed)
    head = take_unused_head(stored, config)
    check_stored(folder, stored, expected, config)

    tensors = {}
    parts = {}  # of MXFP4: blocks and scales may lie in different shards
    for file, names in names_by_file(stored).items():
        with open_tensors(file) as opened:
            for name in names:
                mapped = opened.get_tensor(name)
                if name.endswith(PACKED):
                    parts[name] = mapped.to(device=device, copy=True)
                    unpack_complete(parts, tensors, name[:-len("_blocks")], file, dtype)
                else:
                    tensors[name] = mapped.to(device=device, dtype=dtype, copy=True)
                    check_finite(tensors[name], mapped, file, name)
    if head is not None and config.tie_word_embeddings:
        check_tied_head(head, tensors["model.embed_tokens.weight"])
    return tensors


def is_packed(name):
    """Whether a quantised GPT-OSS stores this parameter as MXFP4."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def shapes_on_disk(shapes, packed):
    """`shapes`, with blocks of 32 inputs and their scales for the packed parameters."""
    expected = {name: tuple(shape) for name, shape in shapes.items() if name not in packed}
    for name in packed:
        experts, inner, out = shapes[name]
        expected[name + "_blocks"] = (experts, out, inner // 32, 16)
        expected[name + "_scales"] = (experts, out, inner // 32)
    return expected


def list_shards(folder):
    """The paths of a checkpoint's safetensors files: one, or those that the index names."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if is_there(single):
        return [single]
    if not is_there(index):
        raise ValueError(f"{folder}: neither {single.name} nor {index.name}: not a checkpoint")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index}: weight_map: expected an object of tensor names and shard files")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(f"{index}: weight_map: shard {name!r} lies outside the checkpoint")
    return [folder / name for name in names]


def require_memory(error):
    """Raise MemoryError if a reader failed for want of memory: its file may be whole."""
    if "allocate memory" in str(error):
        raise MemoryError(str(error)) from None


def open_tensors(file):
    """The library's reader of a safetensors file. ValueError naming the file where it is not one,
    or where its header names a tensor twice, of which the library takes the last."""
    check_header(file)
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # SafetensorError, OSError; other versions raise others
        require_memory(error)
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from None


def check_header(file):
    """Raise ValueError unless a safetensors file is a plain file, or where a key stands twice in
    its header (8 bytes of length, little end first, then JSON)."""
    require_file(file)
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, LARGEST_HEADER))
    require_keys_once(f"{file}: header", header)


def list_tensors(folder):
    """{tensor name: StoredTensor} of a checkpoint, from its files' headers alone."""
    stored = {}
    for file in list_shards(folder):
        opened = open_tensors(file)
        for name in opened.keys():
            if name in stored:
                raise ValueError(f"{file}: {name}: found twice, in {stored[name].file.name} too")
            header = opened.get_slice(name)
            stored[name] = StoredTensor(file, tuple(header.get_shape()), header.get_dtype())
    return stored


def take_unused_head(stored, config):
    """Take out of `stored` the lm_head.weight that a tied or a reward model makes no use of."""
    if config.tie_word_embeddings or config.reward:
        return stored.pop("lm_head.weight", None)
    return None


def check_stored(folder, stored, expected, config):
    """Raise ValueError unless the files hold just the tensors expected, in shape and dtype."""
    for name in sorted(expected.keys() - stored.keys()):
        shape = list(expected[name])
        raise ValueError(f"{folder}: missing tensor {name}, expected with shape {shape}")
    for name in sorted(stored.keys() - expected.keys()):
        reason = f"a {config.model_type} of this config has none"
        raise ValueError(f"{stored[name].file}: unexpected tensor {name}: {reason}")
    for name, found in stored.items():
        dtypes = ("U8",) if name.endswith(PACKED) else FLOATS
        if found.shape != expected[name] or found.dtype not in dtypes:
            raise ValueError(
                f"{found.file}: {name}: found shape {list(found.shape)} of {found.dtype}, "
                f"expected {list(expected[name])} of {' or '.join(dtypes)}")


def names_by_file(stored):
    """{file: its tensors' names}: a shard is closed before the next one is opened."""
    names = {}
    for name, tensor in stored.items():
        names.setdefault(tensor.file, []).append(name)
    return names


def is_finite(tensor):
    """Whether no element is NaN or infinite, in one pass and without a temporary of the tensor's
    size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN, if any, is both
    return math.isfinite(low) and math.isfinite(high)


def check_finite(converted, original, file, name):
    """Raise ValueError if a tensor holds NaN or infinity, be it since it was converted."""
    if is_finite(converted):
        return
    if is_finite(original):
        largest = original.abs().max().item()
        raise ValueError(
            f"{file}: {name}: found a value of {largest:.3g}, which overflows in "
            f"{converted.dtype}: take another dtype")
    raise ValueError(f"{file}: {name}: found NaN or infinity, expected finite numbers")


def unpack_complete(parts, tensors, name, file, dtype):
    """Once `parts` holds both blocks and scales of a parameter, put it into `tensors` and let them
    go."""
    if name + "_blocks" in parts and name + "_scales" in parts:
        blocks = parts.pop(name + "_blocks")
        scales = parts.pop(name + "_scales")
        weights = dequantize_mxfp4(blocks, scales)
        tensors[name] = weights.to(dtype)
        check_finite(tensors[name], weights, file, name)


def check_tied_head(head, embeddings):
    """Raise ValueError unless the lm_head.weight on disk equals the embeddings it is tied to."""
    with open_tensors(head.file) as opened:
        weight = opened.get_tensor("lm_head.weight").to(embeddings)
    if not torch.equal(weight, embeddings):
        raise ValueError(
            f"{head.file}: lm_head.weight: found other values than the embeddings', expected the "
            "same, since tie_word_embeddings is true")


def dequantize_mxfp4(blocks, scales, dtype=torch.bfloat16):
    """MXFP4 weights: blocks (E, out, groups, 16), scales (E, out, groups) -> (E, groups * 32, out).
    Both are uint8. A byte of blocks holds two codes, the low half first; 32 codes share the scale
    2 ** (byte - 127). On the inputs' device, one expert at a time. Code and scale are looked up: a
    GPU's power of two need not be exact."""
    experts, rows, groups, _ = blocks.shape
    codes = torch.tensor(BYTES, dtype=torch.bfloat16, device=blocks.device)
    powers = torch.tensor(POWERS, dtype=torch.float64, device="cpu")
    powers = powers.to(torch.bfloat16).to(blocks.device)
    weights = torch.empty(experts, groups * 32, rows, dtype=dtype, device=blocks.device)
    for expert in range(experts):
        values = codes.index_select(0, blocks[expert].flatten().int()).view(rows, groups, 32)
        values *= powers[scales[expert].int()][..., None]
        weights[expert] = values.view(rows, groups * 32).T
    return weights


def parameter_bytes(shapes, dtype):
    """How many bytes the parameters of {name: shape} take in `dtype`."""
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


# ------------------------------------------------------------------------------ single tensors


def read_tensors(file, *names):
    """{name: tensor} of a .safetensors, .bin or .pth file: these names, or all. ValueError naming
    the file."""
    require_file(file)
    if file.suffix == ".safetensors":
        check_header(file)
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, "cpu", weights_only=True)
        return {name: torch.as_tensor(found[name]) for name in names or found}
    except Exception as error:  # of a broken file the readers raise nearly anything
        require_memory(error)
        reason = str(error).partition("\n")[0]
        wanted = " and ".join(names)
        raise ValueError(f"{file}: not a whole file of tensors {wanted}: {reason}") from None


def tensors_digest(tensors):
    """SHA-256, in hexadecimal, of {name: tensor}: every name, dtype, shape and byte, on any
    device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content = tensor.contiguous().view(-1).view(torch.uint8)
        for piece in content.split(2 ** 26):
            digest.update(piece.cpu().numpy())
    return digest.hexdigest()


def weights_digest(module):
    """Sixteen digits that stand for every byte of a module's parameters."""
    return tensors_digest(dict(module.named_parameters()))[:16]
