"""A published checkpoint beside transformers, where one is at hand:

    STOP_REAL_MODEL=DIR python -m pytest -q tests -k real_model

DIR is a checkpoint directory of a chat model (Qwen2.5-Coder-0.5B-Instruct, say). Prompts, logits
and greedy paths are transformers'; a check leaves the cache as it was; and the STOP that ships for
this checkpoint gives the same scores from its cache and from one masked pass. Skipped without DIR.
"""
import os
import pathlib

import pytest
import torch

from model import load
from plumbing.tokenizer import Tokenizer
from sample import generate, prefill
from stop import Stop, launch_check_resume

FOLDER = os.environ.get("STOP_REAL_MODEL")
SHIPPED = pathlib.Path(__file__).parents[2] / "real" / "qwen2.5-coder-0.5b-svamp"

pytestmark = pytest.mark.skipif(not FOLDER, reason="STOP_REAL_MODEL names no checkpoint directory")

MESSAGES = (
    "What is 17 * 23? Please reason step by step, and put your final answer within \\boxed{}.",
    "A baker has 12 trays with 8 rolls each and sells 57 rolls. How many are left?\n\nPlease "
    "reason step by step, and put your final answer within \\boxed{}.",
    "Wie heißt die Hauptstadt von Österreich?  (日本語でも可) 🙂")


@pytest.fixture(scope="module")
def model():
    return load(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(FOLDER)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.prompt(message) for message in MESSAGES]


@pytest.fixture(scope="module")
def reference():
    """(transformers' model in float32, its tokenizer)."""
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager")
    return other.eval(), transformers.AutoTokenizer.from_pretrained(FOLDER)


def test_prompts_are_those_of_the_chat_template(prompts, reference):
    _, other = reference
    for message, prompt in zip(MESSAGES, prompts):
        chat = [{"role": "user", "content": message}]
        text = other.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert prompt == other(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def test_logits_are_those_of_transformers(model, prompts, reference):
    other, _ = reference
    for prompt in prompts:
        ids = torch.tensor([prompt])
        ours = model.logits(model(ids))
        theirs = other(ids).logits
        assert theirs.abs().max() > 10  # else the tolerance would say little
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@torch.inference_mode()
def test_greedy_paths_are_those_of_transformers(model, prompts, reference):
    other, _ = reference
    eos_ids = sorted(model.config.eos_ids)
    for prompt, (path,) in zip(prompts, generate(
            model, prompts, n=1, max_new_tokens=40, temperature=0)):
        ids = torch.tensor([prompt])
        theirs = other.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
            temperature=None, top_k=None, top_p=None, repetition_penalty=1.0,
            eos_token_id=eos_ids, pad_token_id=eos_ids[0])
        assert path.ids == theirs[0, len(prompt):].tolist()


@torch.inference_mode()
def test_a_batch_is_its_rows_one_by_one(model, prompts):
    cache, hidden = prefill(model, prompts)
    assert cache.counts.tolist() == [len(prompt) for prompt in prompts]
    for prompt, state in zip(prompts, hidden):
        alone = model(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(state, alone, rtol=0, atol=1e-3 * float(alone.abs().max()))


def test_with_keep_n_the_paths_are_those_of_an_uninterrupted_run(model, prompts):
    """Invariant 4 at real size: the check between leaves no trace. (Nearly tied tokens may fall
    otherwise where a batch's shape differs: here it does not.)"""
    stop = Stop(model, rank=2, targets=["q_proj", "v_proj"])
    (whole,) = generate(model, prompts[:1], n=3, max_new_tokens=24)
    kept = launch_check_resume(
        model, stop, prompts[0], n=3, keep=3, prefix=8, max_new_tokens=24)
    assert [path.ids for path in kept] == [path.ids for path in whole]


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="no STOP ships for this checkpoint")
@torch.inference_mode()
def test_the_shipped_stop_scores_prefixes(model, prompts):
    """From the cache, and in one masked pass over prompt, prefix and [STOP]."""
    stop = Stop.load(SHIPPED, model)
    (paths,) = generate(model, prompts[1:2], n=4, max_new_tokens=stop.trained_for()[0])
    prefixes = [prompts[1] + path.ids for path in paths]
    scores = stop.score(model, prefixes)
    assert ((0 < scores) & (scores < 1)).all()
    for prefix, score in zip(prefixes, scores):
        x = torch.cat((model.model.embed_tokens(torch.tensor([prefix])),
                       stop.tokens.expand(1, stop.m, -1)), 1)
        is_stop = (torch.arange(x.shape[1]) >= len(prefix))[None]
        state = model(x, adapter=stop.lora.at(is_stop))[:, -1]
        torch.testing.assert_close(
            stop.chance(stop.head(state))[0], score, rtol=0, atol=1e-4)
