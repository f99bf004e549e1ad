"""Networks that answer as one, against probabilities that are averaged by hand, in float64."""

from itertools import islice

import pytest
import torch

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import load_mean
from nanogpt_lit.checkpoint.exchange import new_run
from nanogpt_lit.checkpoint.run_file import save_run
from nanogpt_lit.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt_lit.evaluate.likelihood import Scorer
from nanogpt_lit.gpt.average import Average
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.networks import build

BYTES = ByteTokenizer()
V, BLOCK = BYTES.vocab_size, 12
SHAPES = [
    GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16),
    LlamaConfig(block_size=20, vocab_size=V, n_layer=1, n_head=4, n_kv_head=2, n_embd=24, tied_head=False),
]


def network(config, seed=0):
    """Far from uniform: the likeliest token wins by more than float32's noise."""
    torch.manual_seed(seed)
    gpt = build(config).eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.4)
    return gpt


@pytest.fixture(scope="module")
def gpts():
    return [network(config, seed) for seed, config in enumerate(SHAPES)]


@torch.no_grad()
def by_hand(gpts, tokens):
    """log of the mean of the probabilities, (B, T, V)"""
    total = 0
    for gpt in gpts:
        powers = gpt(tokens).double().exp()
        total = total + powers / powers.sum(dim=-1, keepdim=True)
    return (total / len(gpts)).log()


def test_logits_are_the_logarithm_of_the_mean_probability_of_networks_of_other_shapes(gpts):
    tokens = torch.randint(V, (3, BLOCK))
    average = Average(gpts)
    assert average.config.block_size == BLOCK
    with torch.no_grad():
        found = average(tokens)
    # float32's softmax against float64's, on logits of up to 10
    torch.testing.assert_close(found.double(), by_hand(gpts, tokens), rtol=0, atol=1e-5)


def test_the_loss_is_that_of_the_mean_probability(gpts):
    tokens = torch.randint(0, V, (2, BLOCK), generator=torch.Generator().manual_seed(0))
    p = sum(gpt(tokens).double().softmax(-1) for gpt in gpts) / len(gpts)
    expected = -p.gather(-1, tokens.roll(-1, 1)[..., None]).log().mean()
    # float32 against float64: 6e-8 for each of some ten roundings.
    torch.testing.assert_close(Average(gpts).loss(tokens, tokens.roll(-1, 1)).double(), expected, rtol=1e-6, atol=0)


def test_text_is_drawn_from_the_mean_far_beyond_the_block_with_and_without_the_cache(gpts):
    average, prompt = Average(gpts), torch.randint(V, (2, 5))
    context, expected = prompt, []
    for _ in range(2 * BLOCK):
        expected.append(by_hand(gpts, context)[:, -1].argmax(dim=-1))
        context = torch.cat([context, expected[-1][:, None]], dim=1)
        if context.size(1) > BLOCK:
            context = context[:, -(BLOCK // 2) :]
    for use_cache in (True, False):
        found = list(generate(average, prompt, 2 * BLOCK, temperature=0, use_cache=use_cache))
        assert torch.equal(torch.stack(found), torch.stack(expected))
    drawn = [list(generate(average, prompt, 20, generator=torch.Generator().manual_seed(1), use_cache=cached))
             for cached in (True, False)]  # fmt: skip
    assert torch.equal(*map(torch.stack, drawn))


def test_modes_of_all_networks_come_back_after_a_text(gpts):
    average = Average(gpts).train()
    assert len(list(islice(generate(average, torch.zeros(1, 1, dtype=torch.int64), 3), 2))) == 2
    assert all(module.training for module in average.modules())
    average.eval()


def test_a_network_twice_is_that_network():
    gpt = network(SHAPES[1])
    text = [BYTES.encode_stream([("It rained, and then it rained again.", True)])]
    alone, twice = (Scorer(of, BYTES).text_loss(text) for of in (gpt, Average([gpt, gpt])))
    assert twice.targets == alone.targets
    assert twice.loss == pytest.approx(alone.loss, abs=1e-6)  # log(2 p / 2) in float32


# Checkpoints.


@pytest.fixture
def checkpoint(tmp_path):
    def saved(name, gpt, tokenizer=BYTES):
        path = tmp_path / f"{name}.safetensors"
        save_run(path, new_run(path, gpt.state_dict(), gpt.config, tokenizer))
        return path

    return saved


def test_generate_takes_several_checkpoints(gpts, checkpoint, capsys):
    paths = [str(checkpoint(str(n), gpt)) for n, gpt in enumerate(gpts)]
    arguments = ["--prompt=So", "--max-new-tokens=9", "--temperature=0", "--device=cpu"]
    assert main(["generate", "--ckpt", *paths, *arguments]) == 0
    prompt = torch.tensor([[BYTES.eot, *b"So"]])
    tokens = [int(token) for token in generate(Average(gpts), prompt, 9, temperature=0, vocab_size=V)]
    if BYTES.eot in tokens:
        tokens = tokens[: tokens.index(BYTES.eot)]
    assert capsys.readouterr().out.rstrip("\n") == ("So" + bytes(tokens).decode(errors="replace")).rstrip("\n")


def test_models_of_other_tokens_are_refused_in_a_sentence(gpts, checkpoint, capsys):
    ours = checkpoint("bytes", gpts[0])
    characters = CharTokenizer("abc")
    others = {
        "of the tokenizer char": checkpoint("char", network(GPTConfig(8, 4, 1, 1, 8)), characters),
        "has 320 tokens of the tokenizer byte": checkpoint("padded", network(GPTConfig(8, 320, 1, 1, 8))),
        "differ in data.documents": checkpoint("apart", network(GPTConfig(8, V, 1, 1, 8, document_start=BYTES.eot))),
    }
    for sentence, other in others.items():
        assert main(["eval", "--mean", "--data", __file__, "--device=cpu", "--ckpt", str(ours), str(other)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert sentence in line
        assert str(other) in line


def test_one_checkpoint_is_loaded_as_it_is(gpts, checkpoint):
    gpt, _ = load_mean([checkpoint("one", gpts[0])])
    assert type(gpt) is type(gpts[0])
