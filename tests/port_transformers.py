"""A stranger's port of STOP on transformers and PEFT: it imports nothing of ours.

    python tests/port_transformers.py --out DIR [--cases qwen2] [--dtype bfloat16] [--inputs DIR]

Needs transformers and peft, which the project itself does not. The sampler in it is plain Python.
"""

import argparse
import json
from pathlib import Path

import peft
import torch
import transformers

from port_numpy import ORACLE, case_of, distribution, make_key, make_number, pick, rank

MODEL_CASES = ("qwen2", "qwen3", "gpt_oss", "mxfp4", "m8")


class Port:
    def __init__(self, case, dtype=torch.float32):
        stop = json.loads((ORACLE / "vectors" / case["name"] / "stop.json").read_text())
        self.stop = stop
        config = transformers.AutoConfig.from_pretrained(ORACLE / case["checkpoint"])
        how = {"dtype": dtype, "attn_implementation": "eager"}
        if getattr(config, "quantization_config", None):
            how["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        self.base = transformers.AutoModelForCausalLM.from_pretrained(
            ORACLE / case["checkpoint"], **how
        )
        self.base = self.base.to(dtype).eval()
        lora = peft.LoraConfig(
            r=stop["rank"],
            lora_alpha=stop["alpha"],
            bias="none",
            target_modules=stop["targets"],
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(self.base, lora).eval()
        own = dict(self.model.named_parameters())
        self.parts = {}
        for name, value in stop["tensors"].items():
            value = torch.tensor(value)
            if ".lora_" in name:
                parameter = own["base_model.model." + name.replace(".weight", ".default.weight")]
                with torch.no_grad():
                    parameter.copy_(value)
                self.parts[name] = parameter
            else:
                self.parts[name] = value.requires_grad_()
        self.states = []
        for layer in self.base.model.layers:
            layer.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.states.append(output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def read(self, ids, cache=None):
        with self.model.disable_adapter():
            out = self.base.model(
                input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True
            )
        return out.past_key_values, out.last_hidden_state[0]

    def check(self, ids, zero_head=False):
        """(layers, hidden, logits, score) of a prefix."""
        m = self.stop["m"]
        L = len(ids)
        cache, _ = self.read(ids)
        self.states.clear()
        fed = self.parts["tokens"].expand(m, -1)[None].to(self.base.dtype)
        out = self.base.model(
            inputs_embeds=fed,
            past_key_values=cache,
            use_cache=True,
            attention_mask=torch.ones(1, L + m, dtype=torch.long),
            position_ids=torch.arange(L, L + m)[None],
        )
        hidden = out.last_hidden_state[0]
        weight = self.parts["head.weight"] * (0 if zero_head else 1)
        logits = torch.nn.functional.linear(hidden[-1].float(), weight, self.parts["head.bias"])
        layers = torch.stack([state[0] for state in self.states])
        score = logits.sigmoid()[0] if len(logits) == 1 else logits.softmax(-1)[1]
        return layers, hidden, logits, score

    def train(self, prefixes, labels):
        for part in self.parts.values():
            part.grad = None
        logits = torch.stack([self.check(ids)[2] for ids in prefixes])
        labels = torch.tensor(labels)
        if logits.shape[-1] == 1:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels)
        else:
            loss = torch.nn.functional.cross_entropy(logits, torch.stack((1 - labels, labels), -1))
        loss.backward()
        return loss.item(), {name: part.grad.tolist() for name, part in self.parts.items()}

    def path(self, run, index):
        """An uninterrupted path."""
        key = make_key(int(run["seed"]), run["prompt_ids"], index)
        ids, cache, fed = [], None, run["prompt_ids"]
        while len(ids) < run["max_new_tokens"]:
            cache, hidden = self.read(fed, cache)
            logits = self.base.lm_head(hidden[-1]).float().detach()
            probs = distribution(logits.numpy(), run["temperature"], run["top_k"], run["top_p"])
            ids.append(pick(probs, make_number(key, len(ids))))
            fed = ids[-1:]
            if ids[-1] in run["eos_ids"]:
                return {"index": index, "ids": ids, "status": "eos"}
        return {"index": index, "ids": ids, "status": "length"}

    @torch.no_grad()
    def run(self, run):
        whole = [self.path(run, i) for i in range(run["n"])]
        alive, scores, cut = list(range(run["n"])), {}, {}
        for checkpoint, keep in run["stages"]:
            for i in alive:
                ids = whole[i]["ids"][:checkpoint]
                scores[i] = self.check(run["prompt_ids"] + ids, run["zero_head"])[3].item()
            kept = rank([(i, scores[i]) for i in alive], keep)
            cut |= {i: checkpoint for i in alive if i not in kept}
            alive = kept
        paths = []
        for i, path in enumerate(whole):
            path = path | {"score": scores[i]}
            if i in cut:
                path |= {"ids": path["ids"][: cut[i]], "status": "pruned"}
            paths.append(path)
        return whole, paths, alive


def outputs(name, dtype=torch.float32, longest=None, runs=True, case=None, port=None):
    """What the port hands in for a case."""
    case = case or case_of(name)
    port = port or Port(case, dtype)
    rows = {
        row: []
        for row in ("hidden", "next_logits", "stop.layers", "stop.hidden", "logits", "scores")
    }
    for prefix in case["prefixes"]:
        entry = {}
        if longest is None or len(prefix["ids"]) <= longest:
            with torch.no_grad():
                _, hidden = port.read(prefix["ids"])
                entry = {"hidden": hidden[-4:], "next_logits": port.base.lm_head(hidden[-1])}
                found = port.check(prefix["ids"])
            entry |= dict(zip(("stop.layers", "stop.hidden", "logits", "scores"), found))
        for row, values in rows.items():
            values.append(entry[row].tolist() if row in entry else None)
    if "decoder" not in case["levels"]:
        del rows["hidden"], rows["next_logits"]
    prefixes = [prefix["ids"] for prefix in case["prefixes"][: len(case["labels"])]]
    rows["loss"], rows["grad"] = port.train(prefixes, case["labels"])
    if runs and case["runs"]:
        rows |= {"uninterrupted": [], "paths": [], "kept": []}
        for run in case["runs"]:
            if len(run["stages"][0]) == 3:  # it does not branch
                for row in ("uninterrupted", "paths", "kept"):
                    rows[row].append(None)
                continue
            for row, value in zip(("uninterrupted", "paths", "kept"), port.run(run)):
                rows[row].append(value)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(MODEL_CASES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--inputs", type=Path, default=ORACLE / "vectors",
                        help="folder of the cases, as certify.py --fresh writes it")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True, parents=True)
    for name in arguments.cases.split(","):
        rows = outputs(name, getattr(torch, arguments.dtype),
                       case=case_of(name, arguments.inputs))
        (arguments.out / f"{name}.json").write_text(json.dumps(rows))
        print(name, flush=True)


if __name__ == "__main__":
    main()
