"""Each technique changes what is kept in memory, and no bit of what is computed."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes
from three_loops import assert_loops_agree, prepared_data
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt_lit.cli.settings import quiet_lightning
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import compare
from nanogpt_lit.parity.runs import LOOPS, OVERFLOWS, Case

EXACT = {
    "recast": MemoryConfig(recast_weights=True),
    "selective": MemoryConfig(recompute="selective"),
    "selective, recast": MemoryConfig(recompute="selective", recast_weights=True),
    "full": MemoryConfig(recompute="full"),
    "every second block, recast": MemoryConfig(recompute="full", recompute_every=2, recast_weights=True),
}
ALL = {**EXACT, "all": MemoryConfig(loss_chunk_tokens=6, recompute="selective", recast_weights=True)}

SMALL = GPTConfig(block_size=16, vocab_size=53, n_layer=3, n_head=2, n_embd=16)
STEPS = 4


@pytest.fixture(autouse=True)
def _one_thread():
    quiet_lightning()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_data(tmp_path_factory.mktemp("techniques"))


def case(memory, precision, dropout):
    return Case(
        LoopSettings(STEPS, 2, 0.05, precision, val_check_interval=5, limit_val_batches=2, seed=7),
        GPTConfig(block_size=8, vocab_size=257, n_layer=3, n_head=2, n_embd=8, dropout=dropout),
        AdamWConfig(lr=0.01),
        ScheduleConfig(warmup_steps=2, total_steps=STEPS),
        scaler=OVERFLOWS if precision == "16-mixed" else {},
        module_options={"memory": memory},
    )


# Losses, gradient norms, validation losses, loss scales; at the end weights, optimizer and random state.
@pytest.mark.parametrize(
    ("precision", "dropout"), [("32-true", 0.1), ("bf16-mixed", 0.1), ("16-mixed", 0.1), ("16-mixed", 0.0)]
)
def test_training_gives_the_bits_of_plain_training(precision, dropout, data):
    plain = LOOPS["reference"](case(MemoryConfig(), precision, dropout), data)
    for name, memory in EXACT.items():
        lean = LOOPS["reference"](case(memory, precision, dropout), data)
        assert compare(plain.entries, lean.entries) is None, name


@pytest.mark.parametrize("name", ["every second block, recast", "all"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_three_loops_give_the_same_bits_with_techniques(name, precision, data):
    assert_loops_agree(case(ALL[name], precision, 0.1), data)


def make(config, memory=None):
    torch.manual_seed(0)
    gpt = GPT(config)
    if memory is not None:
        apply_techniques(gpt, memory)
    return gpt


def window(config, B=2):
    tokens = torch.randint(config.vocab_size, (B, config.block_size + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def kept_per_block(memory, dtype, config):
    """Bytes that one block keeps for the backward pass: what a network of three keeps, less what one of two does."""

    def kept(n_layer):
        with FakeTensorMode():
            gpt = make(replace(config, n_layer=n_layer), memory)
            tokens = torch.zeros(1, config.block_size, dtype=torch.int64)
            with LiveBytes() as live, autocast(dtype):
                loss = gpt.loss(tokens, tokens)
            del tokens
            assert loss.requires_grad
            return live.now

    return kept(3) - kept(2)


@pytest.mark.parametrize(
    ("memory", "per_channel", "weights", "norms"),
    [
        # Input 4, its norm 2, queries, keys and values 6, attention 2; then 4, norm 2, inside of the MLP 8, its GELU 8.
        (MemoryConfig(), 36, 12, 2),
        (EXACT["recast"], 36, 0, 2),
        (EXACT["selective"], 22, 1, 0),
        (EXACT["selective, recast"], 22, 0, 0),
        (EXACT["full"], 4, 0, 0),
    ],
    ids=["plain", "recast", "selective", "selective, recast", "full"],
)
def test_a_block_keeps_the_bytes_that_were_computed_by_hand(memory, per_channel, weights, norms):
    T, C, H = 64, 48, 3
    config = GPTConfig(block_size=T, vocab_size=11, n_head=H, n_embd=C)
    expected = T * C * per_channel + weights * C * C * 2
    expected += norms * T * 2 * 4  # mean and inverse deviation of each token, float32
    if memory.recompute != "full":
        expected += T * H * 4  # attention's log-sum-exp
    assert kept_per_block(memory, torch.bfloat16, config) == expected


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_selective_recompute_repeats_layer_norms_and_gelu_and_no_matrix_product(dtype):
    operations = {}
    for recompute in ("none", "selective"):
        gpt = make(SMALL, MemoryConfig(recompute=recompute))
        with autocast(dtype):
            loss = gpt.loss(*window(SMALL))
        with Operations() as seen:
            loss.backward()
        operations[recompute] = seen.names
    expensive = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}
    plain, selective = ([n for n in names if n in expensive] for names in operations.values())
    assert plain == selective
    assert operations["none"].count("gelu") == operations["none"].count("native_layer_norm") == 0
    assert operations["selective"].count("gelu") == SMALL.n_layer
    assert operations["selective"].count("native_layer_norm") == 2 * SMALL.n_layer


def test_every_kth_block_is_recomputed_beginning_with_the_first():
    config = replace(SMALL, n_layer=5)
    gpt = make(config, MemoryConfig(recompute="full", recompute_every=2))
    calls = []
    for layer, block in enumerate(gpt.transformer.h):
        block.ln_1.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    loss = gpt.loss(*window(config))
    assert calls == [0, 1, 2, 3, 4]
    loss.backward()
    assert calls[5:] == [4, 2, 0]


@pytest.mark.parametrize("name", ALL)
def test_names_and_checkpoints_are_those_of_the_plain_network(name):
    plain, lean = make(SMALL), make(SMALL, ALL[name])
    assert [n for n, _ in lean.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in lean.named_modules()] == [n for n, _ in plain.named_modules()]
    assert list(lean.state_dict()) == list(plain.state_dict())
    lean.load_state_dict(plain.state_dict(), strict=True)
    copied = copy.deepcopy(lean)
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert torch.equal(copied.loss(*window(SMALL)), lean.loss(*window(SMALL)))


@pytest.mark.parametrize("name", ALL)
def test_evaluation_and_generation_are_those_of_the_plain_network(name):
    config = replace(SMALL, dropout=0.2)
    plain, lean = make(config).eval(), make(config, ALL[name]).eval()
    tokens, targets = window(config)
    with torch.no_grad(), autocast():
        assert torch.equal(lean(tokens), plain(tokens))
        # The loss in chunks is another sum; the others are the same.
        torch.testing.assert_close(lean.loss(tokens, targets), plain.loss(tokens, targets), rtol=1e-6, atol=0)
    texts = [
        torch.stack(list(generate(gpt, tokens[:, :5], 20, generator=torch.Generator().manual_seed(3))))
        for gpt in (plain, lean)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["every second block, recast", "all"])
def test_techniques_compile_without_graph_breaks_to_the_same_bits(name):
    eager, compiled = make(SMALL, ALL[name]), make(SMALL, ALL[name])
    compiled_loss = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")
    with autocast():
        expected, loss = eager.loss(*window(SMALL)), compiled_loss(*window(SMALL))
    expected.backward()
    loss.backward()
    assert torch.equal(loss, expected)
    for (name_, parameter), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name_


@pytest.mark.parametrize("name", ALL)
def test_techniques_run_on_fake_tensors(name):
    with FakeTensorMode():
        gpt = make(replace(SMALL, dropout=0.1), ALL[name])
        tokens = torch.zeros(2, 16, dtype=torch.int64)
        with autocast():
            loss = gpt.loss(tokens, tokens)
        loss.backward()
    assert all(parameter.grad is not None for parameter in gpt.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_chunk_tokens": 0}, "model.memory.loss_chunk_tokens=0 must be at least 1; 256"),
        ({"recompute": "some"}, "model.memory.recompute='some' is not known; use none, selective or full"),
        ({"recompute": "full", "recompute_every": 0}, "model.memory.recompute_every=0 must be at least 1"),
        ({"recompute_every": 2}, "model.memory.recompute_every=2 does nothing while recompute is none"),
    ],
)
def test_impossible_settings_are_refused_by_key_and_value(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MemoryConfig(**fields)


def test_the_module_keeps_its_techniques_in_what_it_saves():
    module = LitNanoGPT(SMALL, memory=ALL["all"])
    assert MemoryConfig(**module.hparams["memory"]) == ALL["all"]


def test_card_is_an_older_name_of_device():
    assert MemoryConfig(weights="card", optimizer_state="card", block_inputs="card") == MemoryConfig()
