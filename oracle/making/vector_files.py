"""Vectors on disk: JSON whose numbers come back bit for bit, in any language.

A float32 is written in its shortest decimal form, and read again gives the same float32, whether
it is first read as a float64 or not. A float64 is written as Python writes it, which is exact too.
"""
import hashlib
import json

import numpy as np
import torch
from safetensors.torch import load_file

from plumbing.records import write_atomic


def to_json(value):
    """JSON text of a value that may hold tensors and float32 arrays.
    Raises ValueError where a number would not come back."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        return _array_to_json(np.asarray(value))
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {to_json(item)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join([to_json(item) for item in value]) + "]"
    return json.dumps(value, allow_nan=False)


def in_json(value):
    """A value as it is read back from JSON."""
    return json.loads(to_json(value))


def _array_to_json(array):
    if array.ndim:
        return "[" + ", ".join([_array_to_json(part) for part in array]) + "]"
    if array.dtype != np.float32:
        return json.dumps(array.item(), allow_nan=False)
    text = str(array)
    if not np.isfinite(array) or np.float32(float(text)) != array:
        raise ValueError(f"found {text}, expected a finite float32, which JSON can hold")
    return text


def write_json(file, value):
    """Write an object as JSON, one line for each of its keys."""
    lines = [f"{json.dumps(key)}: {to_json(item)}" for key, item in value.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "{\n" + ",\n".join(lines) + "\n}\n")


def file_digest(file):
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def stop_in_json(stop):
    """A STOP as one JSON value: what describes it, and every tensor under its name."""
    tensors = {name: tensor.float() for name, tensor in stop.weights().items()}
    return {
        "m": stop.m,
        "shared": stop.shared,
        "rank": stop.lora.rank,
        "alpha": stop.lora.alpha,
        "targets": list(stop.lora.targets),
        "head": stop.head_kind,
        "tensors": tensors}


def checkpoint_in_json(model, folder):
    """A base model's weights as one JSON value: {name: {shape, data}}, upcast to float32; beside
    decoded MXFP4 experts the bytes of their blocks and scales, as they lie in the folder."""
    tensors = {}
    for name, weight in model.named_parameters():
        values = weight.detach().float().cpu()
        tensors[name] = {"shape": list(values.shape), "data": values.flatten()}
    for file in sorted(folder.glob("*.safetensors")):
        for name, values in load_file(file).items():
            if values.dtype == torch.uint8:
                tensors[name] = {"shape": list(values.shape), "dtype": "uint8",
                                 "data": values.flatten().tolist()}
    return {"tensors": tensors}
