"""Numbers that no run can use, wherever they stand in a configuration."""

import math

import pytest
import torch
from small_runs import LOOPS, small_run

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.generate import sample
from nanogpt_lit.loops.lightning import TextSamples
from nanogpt_lit.untrusted.config_values import RANGES, TRAINS_NOTHING, check_numbers


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("key", RANGES)
def test_a_number_outside_its_range_is_refused_by_its_key_and_the_ends_of_the_range_are_taken(key):
    least, most = RANGES[key]
    for end, outside, said in ((least, least - 1, "must be at least"), (most, most + 1, "must be at most")):
        if math.isinf(end):
            continue
        if end or key not in TRAINS_NOTHING:
            check_numbers(nested(key, end))
        with pytest.raises(UserError, match=f"{key}={outside} {said}"):
            check_numbers(nested(key, outside))


def test_what_is_no_number_is_left_to_others():
    check_numbers(nested("trainer.val_check_interval", None))
    check_numbers(nested("trainer.deterministic", True))
    check_numbers({"trainer": {"callbacks": [{"class_path": "x.EarlyStopping", "init_args": {"limit": math.inf}}]}})


def test_a_number_beyond_64_bits_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"data\.batch_size=9{20} is more than 64 bits hold"):
        check_numbers(nested("data.batch_size", int("9" * 20)))


@pytest.mark.parametrize("logits", [[math.nan, 0.0], [math.inf, 0.0], [0.0, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_network_without_numbers_has_no_next_token(logits, temperature):
    with pytest.raises(UserError, match="the network's outputs are not finite"):
        sample(torch.tensor([logits]), temperature, None, None, torch.Generator())


@pytest.mark.parametrize("option", [{"tokens": 0}, {"temperature": math.nan}, {"temperature": -1.0}, {"seed": -1}])
def test_samples_that_cannot_be_written_are_refused_before_training(option):
    with pytest.raises(UserError, match=f"TextSamples: {next(iter(option))}="):
        TextSamples(**option)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_prompt_that_the_tokenizer_cannot_encode_is_refused_before_training(loop, text, tmp_path, capsys):
    prompt = ["--data.tokenizer=char", "--trainer.callbacks.prompt=\N{EURO SIGN}"]
    assert loop(*small_run(text, tmp_path, *prompt)) == 2
    assert "(U+20AC) is not among the" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("events*"))
