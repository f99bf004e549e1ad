import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.gpt.loss import IGNORE_INDEX

SMALL = GPTConfig(block_size=24, vocab_size=97, n_layer=3, n_head=4, n_embd=32)


def randomised(config: GPTConfig) -> GPT:
    """A GPT whose biases and norms are random too, so that a forgotten or swapped one shows."""
    torch.manual_seed(0)
    gpt = GPT(config)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.normal_(mean=1.0 if ".ln_" in name and name.endswith("weight") else 0.0, std=0.1)
    return gpt


def hugging_face_twin(gpt: GPT) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the same weights; its Conv1D keeps the matrices of the blocks transposed."""
    config = gpt.config
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function={"tanh": "gelu_new", "erf": "gelu"}[config.gelu],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",  # spelled out with matmul and softmax, independent of the fused attention
        )
    )
    weights = {name: as_conv1d(name, parameter) for name, parameter in gpt.state_dict().items()}
    twin.load_state_dict(weights, strict=True)
    return twin


def as_conv1d(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t() if ".h." in name and tensor.dim() == 2 else tensor


def random_tokens(config: GPTConfig, B: int, T: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_logits_loss_and_every_gradient_equal_transformers_gpt2(gelu):
    gpt = randomised(replace(SMALL, gelu=gelu))
    twin = hugging_face_twin(gpt)
    window = random_tokens(gpt.config, B=3, T=21)
    tokens, targets = window[:, :-1], window[:, 1:].clone()
    targets[1, 5:9] = IGNORE_INDEX
    labels = torch.cat([tokens[:, :1], targets], dim=1)  # transformers shifts the labels itself

    ours = gpt.loss(tokens, targets)
    ours.backward()
    output = twin(window, labels=labels)
    output.loss.backward()

    # float32 has 24 bits: one operation is good to 6e-8. Both add up to a few hundred products per number, in
    # different orders, through 3 blocks; that leaves a few 1e-6 of numbers of order 1. 1e-5 is between that and any
    # real difference (tanh for erf is 3e-4 here).
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(gpt(tokens), output.logits[:, :-1], **tolerance)
    torch.testing.assert_close(ours, output.loss, **tolerance)
    theirs = dict(twin.named_parameters())
    assert [name for name, _ in gpt.named_parameters()] == list(theirs)
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(
            as_conv1d(name, parameter.grad),
            theirs[name].grad,
            **tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_network_equals_transformers_gpt2_in_float64():
    # What float32 noise could hide, such as another epsilon in a layer norm, does not hide in float64. The loss is
    # left out: both compute it in float32.
    gpt = randomised(SMALL).double()
    twin = hugging_face_twin(gpt).double()
    tokens = random_tokens(gpt.config, B=2, T=24)
    direction = torch.randn(2, 24, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = gpt(tokens), twin(tokens).logits
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for (name, parameter), (_, twin_parameter) in zip(gpt.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(as_conv1d(name, parameter.grad), twin_parameter.grad, rtol=1e-11, atol=1e-11)


def test_default_config_is_gpt2_small_with_124_439_808_parameters():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=50257))
        reference = GPT2LMHeadModel(GPT2Config())
    shapes = {name: as_conv1d(name, tensor).shape for name, tensor in gpt.state_dict().items()}
    for name, tensor in reference.state_dict().items():
        assert shapes.pop(name) == tensor.shape
    assert not shapes
    assert gpt.parameter_count(non_embedding=False) == 124_439_808
    # nanoGPT prints this one: without the 1024 x 768 position embeddings.
    assert gpt.parameter_count(non_embedding=True) == 124_439_808 - 1024 * 768


def test_flops_per_token_are_palms_formula():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=50257))
        untied = GPT(GPTConfig(vocab_size=50257, tied_head=False))
    N, L, H, D, T = 123_653_376, 12, 12, 64, 1024
    assert gpt.flops_per_token(T) == 6 * N + 12 * L * H * D * T
    # A second matrix that is only looked up costs memory and no FLOPs.
    assert untied.parameter_count(non_embedding=False) == 124_439_808 + 50257 * 768
    assert untied.flops_per_token(T) == gpt.flops_per_token(T)


def test_untrained_loss_is_about_ln_v():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=1000, n_layer=4, n_head=4, n_embd=64))
    window = random_tokens(gpt.config, B=16, T=65)
    loss = gpt.loss(window[:, :-1], window[:, 1:])
    # A logit is a normed state (length sqrt(C)) times a row of N(0, 0.02): variance 0.0004 C = 0.026, which adds half
    # of that to ln V. The mean over 1024 targets has a standard error of sqrt(0.026 / 1024) = 0.005.
    assert loss.item() == pytest.approx(math.log(1000) + 0.013, abs=0.02)


def test_initialisation_is_gpt2s_with_scaled_residual_projections():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=128, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            # The smallest has 16,384 numbers: its standard deviation is known to 1 / sqrt(2 * 16384) = 0.6 %.
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.03 * std, name


def test_a_token_does_not_change_what_comes_before_it():
    gpt = randomised(SMALL)
    tokens = random_tokens(SMALL, B=2, T=24)
    logits = gpt(tokens)
    for t in (0, 1, 13, 23):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % SMALL.vocab_size
        other = gpt(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.equal(other[:, t], logits[:, t])


def test_tied_head_is_the_token_embedding_and_an_untied_one_is_not():
    tied, untied = GPT(SMALL), GPT(replace(SMALL, tied_head=False))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight.data_ptr() != untied.transformer.wte.weight.data_ptr()
    assert set(untied.state_dict()) == set(tied.state_dict())
    assert not torch.equal(untied.lm_head.weight, untied.transformer.wte.weight)


def test_bias_false_leaves_no_bias_anywhere():
    gpt = GPT(replace(SMALL, bias=False))
    assert not [name for name, _ in gpt.named_parameters() if name.endswith("bias")]
    tokens = random_tokens(SMALL, B=1, T=5)
    assert gpt.loss(tokens, tokens).isfinite()


def test_dropout_acts_in_training_and_rests_in_evaluation():
    tokens = random_tokens(SMALL, B=2, T=24)
    dropping, plain = randomised(replace(SMALL, dropout=0.2)), randomised(SMALL)
    assert not torch.equal(dropping(tokens), dropping(tokens))
    assert torch.equal(dropping.eval()(tokens), plain(tokens))


@pytest.mark.parametrize("part", ["embedding", "attention", "residual"])
def test_each_of_the_three_dropouts_drops(part):
    gpt = randomised(replace(SMALL, dropout=0.5))
    for module in gpt.modules():
        module.training = False
    attention, mlp = gpt.transformer.h[0].attn, gpt.transformer.h[0].mlp
    chosen = {
        "embedding": [gpt.transformer.drop],
        "attention": [attention],  # its own flag drops attention weights; the Dropout inside it has another
        "residual": [attention.resid_dropout, mlp.dropout],
    }[part]
    tokens = random_tokens(SMALL, B=2, T=24)
    for module in chosen:
        module.training = True
        assert not torch.equal(gpt(tokens), gpt(tokens))
        module.training = False
    assert torch.equal(gpt(tokens), gpt(tokens))


def test_loss_is_float32_under_bfloat16_autocast():
    gpt = randomised(SMALL)
    window = random_tokens(SMALL, B=2, T=25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gpt(window[:, :-1]).dtype == torch.bfloat16
        loss = gpt.loss(window[:, :-1], window[:, 1:])
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits, 0.4 %; the mean over 48 targets averages most of it away.
    torch.testing.assert_close(loss, gpt.loss(window[:, :-1], window[:, 1:]), rtol=4e-3, atol=0)


def test_loss_compiles_without_graph_breaks_to_the_same_loss_and_gradients():
    eager, compiled = randomised(SMALL), randomised(SMALL)
    window = random_tokens(SMALL, B=2, T=25)
    expected = eager.loss(window[:, :-1], window[:, 1:])
    expected.backward()
    loss = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")(window[:, :-1], window[:, 1:])
    loss.backward()
    assert torch.equal(loss, expected)
    for (name, parameter), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 100, "n_head": 6}, r"model\.gpt\.n_embd=100 .* n_head=6 .* n_head=5 gives 20 channels per head"),
        ({"n_layer": 0}, r"model\.gpt\.n_layer=0 must be at least 1; GPT-2 uses 12"),
        ({"vocab_size": -1}, r"model\.gpt\.vocab_size=-1 must be at least 1; GPT-2 uses 50257"),
        ({"n_head": 0}, r"model\.gpt\.n_head=0 "),
        ({"block_size": 0}, r"model\.gpt\.block_size=0 "),
        ({"dropout": 1.0}, r"model\.gpt\.dropout=1\.0 is not in \[0, 1\)"),
        ({"dropout": math.nan}, r"model\.gpt\.dropout=nan "),
        ({"gelu": "relu"}, r"model\.gpt\.gelu='relu' .* 'tanh' .* 'erf'"),
    ],
)
def test_impossible_config_is_refused_by_key_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


def test_network_needs_a_vocabulary():
    with pytest.raises(ValueError, match=r"model\.gpt\.vocab_size=None"):
        GPT(GPTConfig())


def test_sequence_longer_than_the_block_is_refused():
    gpt = GPT(SMALL)
    gpt(random_tokens(SMALL, B=1, T=24))
    with pytest.raises(ValueError, match=r"25 tokens is longer than model\.gpt\.block_size=24"):
        gpt(random_tokens(SMALL, B=1, T=25))
