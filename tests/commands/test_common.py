"""What the command lines share: the line about a chat format whose turns do not end a path."""
import types

import pytest

from commands.common import unstopped_turn

CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IDS = {"<|im_end|>": 7, "<|eot_id|>": 8}


@pytest.mark.parametrize("frame, eos_ids, mark", [
    (CHATML, (7,), None), (CHATML, (3, 7), None), (CHATML, (3,), "<|im_end|>"),
    ("<|user|>{}<|eot_id|>", (), "<|eot_id|>"), ("{}", (3,), None),
    ("<|im_end|>{}", (3,), None), ("<｜User｜>{}<｜Assistant｜>", (3,), None)])
def test_a_turn_that_ends_no_path_is_named(frame, eos_ids, mark):
    tokenizer = types.SimpleNamespace(
        chat=frame.format, library=types.SimpleNamespace(token_to_id=IDS.get))
    assert unstopped_turn(tokenizer, eos_ids) == mark
