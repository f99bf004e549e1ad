"""The one file of a checkpoint: all of a run is in it, any reader finds the weights, other files are refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trainings import training_of

from nanogpt_lit.checkpoint.convert import load_network
from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.checkpoint.tensor_file import write_tensors
from nanogpt_lit.data.tokenizer import CharTokenizer
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import leaves, same
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.run.resume import capture, restore
from nanogpt_lit.runtime.process_settings import random_state, set_random_state

TOKENIZER = CharTokenizer("héllo wörld")


def new_parts(**changes):
    torch.manual_seed(0)
    config = GPTConfig(
        **{"block_size": 8, "vocab_size": TOKENIZER.vocab_size, "n_layer": 1, "n_head": 2, "n_embd": 8, **changes}
    )
    module = LitNanoGPT(config, schedule=ScheduleConfig(total_steps=9))
    training = training_of(module, torch.amp.GradScaler("cpu"), accumulate_grad_batches=3)
    training.step, training.batches = 1, 3
    return training


@pytest.fixture
def state():
    parts = new_parts()
    tokens = torch.arange(8)[None]
    parts.module(tokens, tokens).backward()
    parts.optimizer.step()
    parts.schedule.step()
    metrics = StepMetrics(lambda *_: None, 1)
    metrics.tokens, metrics.validations.latest = 24, (1, float("inf"))
    return capture(parts, {"tokenizer": TOKENIZER.files(), "seed": 3, "batches": 0}, metrics)


@pytest.fixture
def path(state, tmp_path):
    save_run(tmp_path / "last.safetensors", state)
    return tmp_path / "last.safetensors"


def test_all_of_a_run_comes_back_to_the_bit(state, path):
    there, back = (dict(leaves("", vars(s))) for s in (state, load_run(path)))
    assert there.keys() == back.keys()
    assert not [name for name, value in there.items() if not same(value, back[name])]
    assert back["tokens"] == 24
    assert len(back["random 0 cpu"]) > 1000


def test_restored_parts_have_every_state_and_share_no_memory_with_what_was_read(state, path):
    parts, read = new_parts(), load_run(path)
    with torch.no_grad():
        for parameter in parts.module.parameters():
            parameter.zero_()
    restore(parts, read)
    assert parts.module.gpt.lm_head.weight is parts.module.gpt.transformer.wte.weight  # still one matrix
    again = capture(parts, state.data)
    for name in ("weights", "optimizer", "schedule", "scaler"):
        assert all(same(a, b) for (_, a), (_, b) in zip(
            leaves("", getattr(again, name)), leaves("", getattr(state, name)), strict=True
        ))  # fmt: skip
    assert not read.weights  # nothing is held twice


def test_any_safetensors_reader_finds_the_weights_by_their_names_and_each_once(state, path):
    tensors = load_file(path)
    module = new_parts().module
    names = set(module.state_dict())
    weights = {name: tensor for name, tensor in tensors.items() if name in names}
    assert names - set(weights) == {"gpt.lm_head.weight"}
    missing = module.load_state_dict(weights, strict=False).missing_keys
    assert missing == ["gpt.lm_head.weight"]  # the same matrix as gpt.transformer.wte.weight, by another name
    assert all(torch.equal(tensor, state.weights[name]) for name, tensor in module.state_dict().items())
    assert "optimizer.state.0.exp_avg" in tensors
    assert tensors["random.0.cpu"].dtype == tensors["data.tokenizer.tokenizer.json"].dtype == torch.uint8


def test_the_rest_is_json_for_anybody_to_read(path):
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["nanogpt_lit"], parse_constant=pytest.fail)
    assert described["step"] == 1
    assert described["hyper_parameters"]["gpt"]["n_embd"] == 8
    assert described["shared_weights"] == {"gpt.lm_head.weight": "gpt.transformer.wte.weight"}
    assert "torch" in described["written_by"]


def test_an_untied_head_is_stored_and_comes_back(tmp_path):
    parts = new_parts(tied_head=False)
    state = capture(parts, data={})
    save_run(tmp_path / "x.safetensors", state)
    assert torch.equal(
        load_run(tmp_path / "x.safetensors").weights["gpt.lm_head.weight"], parts.module.gpt.lm_head.weight
    )


def test_last_leaves_the_one_before_and_others_do_not(state, tmp_path):
    for name in ("last", "best"):
        for step in (1, 2, 3):
            save_run(tmp_path / f"{name}.safetensors", replace(state, step=step))
    steps = {path.stem: load_run(path).step for path in tmp_path.iterdir()}
    assert steps == {"last": 3, "previous": 2, "best": 3}


def test_the_network_and_its_tokenizer_are_read_without_the_rest(state, path):
    gpt, tokenizer = load_network(path)
    assert not gpt.training
    assert tokenizer.decode(tokenizer.encode("wörld")) == "wörld"
    tokens = torch.arange(6)[None]
    module = new_parts().module
    module.load_state_dict(state.weights)
    assert torch.equal(gpt(tokens), module.eval().gpt(tokens))


def test_a_network_of_an_earlier_version_that_this_one_lacks_is_refused_by_name(state, path):
    former = {**state.hyper_parameters, "gpt": {**state.hyper_parameters["gpt"], "norm": "rms"}}
    save_run(path, replace(state, hyper_parameters=former))
    with pytest.raises(ValueError, match=r"safetensors: the checkpoint's network has model\.gpt\.norm=rms"):
        load_network(path)


def test_another_network_is_refused_as_the_module_says_it(path):
    with pytest.raises(ValueError, match=r"model.gpt.n_embd is 8 there and 16 here"):
        restore(new_parts(n_embd=16), load_run(path))


def written(path, tensors, description):
    with path.open("wb") as file:
        write_tensors(file, tensors, {"nanogpt_lit": json.dumps(description)})


def test_what_is_no_checkpoint_is_refused_in_one_sentence_that_names_it(path, tmp_path):
    cases = {}
    cases["missing"] = "missing.safetensors does not exist; there are .*last.safetensors"
    (tmp_path / "folder").mkdir()
    cases["folder"] = "folder is a folder; .*convert"
    save_file({"a": torch.zeros(2)}, tmp_path / "others.safetensors")
    cases["others"] = "others.safetensors is not a checkpoint of nanogpt_lit.*convert"
    torch.save({"state_dict": {}}, tmp_path / "pickle.safetensors")
    cases["pickle"] = "pickle.safetensors is not a checkpoint of nanogpt_lit.*convert"
    written(tmp_path / "newer.safetensors", {}, {"format": 2, "written_by": "nanogpt_lit 9"})
    cases["newer"] = "newer.safetensors has format 2 and this nanogpt_lit reads 1; it was written by nanogpt_lit 9"
    written(tmp_path / "hollow.safetensors", {}, {"format": 1})
    cases["hollow"] = "hollow.safetensors is a checkpoint without all"
    deep = tmp_path / "deep.safetensors"
    with deep.open("wb") as file:
        write_tensors(file, {}, {"nanogpt_lit": "[" * 100_000})
    cases["deep"] = "deep.safetensors is a checkpoint without all"
    for name, sentence in cases.items():
        target = tmp_path / (name if name == "folder" else f"{name}.safetensors")
        foreign = name in ("folder", "others", "pickle")  # of which load_network says what they are
        for read in (load_run,) if foreign else (load_run, load_network):
            with pytest.raises(ValueError, match=sentence) as error:
                read(target)
            assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_random_numbers_of_the_card_go_on_where_they_were():
    card = torch.device("cuda")
    torch.manual_seed(1)
    state = random_state(card)
    expected = torch.rand(3, device=card), torch.rand(3)
    torch.manual_seed(2)
    set_random_state(state, card)
    assert torch.equal(torch.rand(3, device=card), expected[0])
    assert torch.equal(torch.rand(3), expected[1])
