"""Networks that learn from others: their loss against probabilities worked out in float64, in every loop, resumed, with
other settings, and refused where it cannot be."""

from dataclasses import replace

import pytest
import torch
from faults import GPT, Fault, make_module, near, run, same_weights
from small_runs import LOOPS, curves, different, small_run

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import load_mean
from nanogpt_lit.checkpoint.exchange import new_run
from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt_lit.gpt.average import Average
from nanogpt_lit.gpt.distillation import TaughtLoss
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.loss import IGNORE_INDEX
from nanogpt_lit.gpt.networks import build
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques

BYTES = ByteTokenizer()
V, BLOCK = BYTES.vocab_size, 16
SHAPE = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=1, n_head=2, n_embd=8)
TEACHERS = [
    GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16, dropout=0.5),
    LlamaConfig(block_size=20, vocab_size=V, n_layer=1, n_head=4, n_kv_head=2, n_embd=24, tied_head=False),
]


def network(config, seed):
    torch.manual_seed(seed)
    gpt = build(config)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3)
    return gpt


@pytest.fixture(scope="module")
def teachers():
    return [network(config, seed) for seed, config in enumerate(TEACHERS)]


@pytest.fixture(scope="module")
def batch():
    tokens = torch.randint(0, V, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    targets[0, :5] = IGNORE_INDEX
    return tokens, targets


@torch.no_grad()
def mean_probabilities(teachers, tokens):
    return sum(gpt.eval()(tokens).double().softmax(dim=-1) for gpt in teachers) / len(teachers)


def by_hand(gpt, teachers, tokens, targets):
    """The mean over targets that count of - sum of p log q, in float64."""
    log_q = gpt(tokens).double().log_softmax(dim=-1)
    each = -(mean_probabilities(teachers, tokens) * log_q).sum(dim=-1)
    return each[targets != IGNORE_INDEX].mean()


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_the_loss_and_its_gradients_are_those_of_the_teachers_mean_probabilities(teachers, batch, chunk_tokens):
    student, other = (network(SHAPE, 5) for _ in range(2))
    apply_techniques(student, MemoryConfig(loss_chunk_tokens=chunk_tokens))
    loss = TaughtLoss(student, Average(teachers).train())(*batch)  # of which no dropout is drawn
    expected = by_hand(other, teachers, *batch)
    # float32 against float64: 6e-8 for each of some ten roundings; gradients are sums of 43 tokens.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for found, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for gpt in teachers for parameter in gpt.parameters())


def test_it_is_least_where_the_network_gives_the_probabilities_of_its_teacher(batch):
    gpt = network(SHAPE, 5)
    loss = TaughtLoss(gpt, Average([network(SHAPE, 5)]))(*batch)
    p = mean_probabilities([network(SHAPE, 5)], batch[0])
    entropy = -(p * p.log()).sum(dim=-1)[batch[1] != IGNORE_INDEX].mean()
    torch.testing.assert_close(loss.double(), entropy, rtol=1e-6, atol=0)
    loss.backward()
    assert all(parameter.grad.abs().max() < 1e-6 for parameter in gpt.parameters())  # rounding


def test_a_validation_measures_the_text(teachers, batch):
    gpt = network(SHAPE, 5).eval()
    assert torch.equal(TaughtLoss(gpt, Average(teachers))(*batch), gpt.loss(*batch))


def test_nothing_to_learn_is_nan_as_without_teachers(teachers, batch):
    gpt = network(SHAPE, 5)
    ignored = torch.full_like(batch[1], IGNORE_INDEX)
    assert TaughtLoss(gpt, Average(teachers))(batch[0], ignored).isnan()
    assert gpt.loss(batch[0], ignored).isnan()


def test_documents_are_read_apart_by_the_teachers_too(teachers, batch):
    tokens, targets = batch[0].clone(), batch[1]
    tokens[:, 0], tokens[:, 9] = BYTES.eot, BYTES.eot
    llama = teachers[1:]  # whose rotary positions say the same of a document wherever it stands
    student = network(replace(TEACHERS[1], block_size=BLOCK, document_start=BYTES.eot), 5)
    plain = network(replace(TEACHERS[1], block_size=BLOCK), 5)
    loss = TaughtLoss(student, Average(llama))(tokens, targets)
    parts = [(tokens[:, part], targets[:, part]) for part in (slice(0, 9), slice(9, None))]
    sums = [by_hand(plain, llama, *part) * (part[1] != IGNORE_INDEX).sum() for part in parts]
    # A mask adds up attention in another order than causal attention.
    torch.testing.assert_close(loss.double(), sum(sums) / (targets != IGNORE_INDEX).sum(), rtol=1e-5, atol=0)


# A loop.


def taught_module(**options):
    """The same each time, with a teacher that is no copy of it."""
    module = make_module(**options)
    module.loss = TaughtLoss(module.gpt, Average([network(GPT, 7)]))
    return module


def test_every_loop_trains_to_the_same_bits():
    modules = {loop: taught_module() for loop in ("lightning", "accelerate", "reference")}
    first, *others = (vars(run(loop, module)) for loop, module in modules.items())
    assert all(other == first for other in others)
    assert all(same_weights(module, modules["reference"]) for module in modules.values())
    untaught = make_module()
    run("reference", untaught)
    assert not same_weights(modules["reference"], untaught)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_step_that_runs_out_of_memory_is_done_again_with_the_same_loss(phase):
    undisturbed = run("reference", taught_module())
    for memory in (MemoryConfig(), MemoryConfig(loss_chunk_tokens=4)):  # the loss in chunks, or half the sequences
        module = Fault(phase, 1).into(taught_module(memory=memory))
        assert near(run("reference", module), undisturbed)
        assert module.fallback


# A run.


@pytest.fixture(scope="module")
def files(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    paths = [folder / f"{n}.safetensors" for n in range(len(teachers))]
    for path, gpt in zip(paths, teachers, strict=True):
        save_run(path, new_run(path, gpt.state_dict(), gpt.config, BYTES))
    return paths


def taught_run(text, root, files, *more):
    # A rate that does not know how long the run is.
    options = [f"--teachers=[{','.join(map(str, files))}]", "--model.schedule.min_lr_ratio=1"]
    return small_run(text, root, *options, *more)


@pytest.fixture(scope="module")
def taught(text, files, tmp_path_factory):
    root = tmp_path_factory.mktemp("taught")
    for loop in LOOPS:
        assert loop(*taught_run(text, root, files)) == 0
    return [root / name / "checkpoints" for name in LOOPS.values()]


def test_the_loops_train_to_the_same_bits_and_the_teachers_are_in_no_checkpoint(taught, text, tmp_path):
    assert not different(*(folder / "last.safetensors" for folder in taught))
    loop, name = next(iter(LOOPS.items()))
    assert loop(*small_run(text, tmp_path, "--model.schedule.min_lr_ratio=1")) == 0
    untaught = load_run(tmp_path / name / "checkpoints/last.safetensors")
    run = load_run(taught[0] / "last.safetensors")
    assert run.weights.keys() == untaught.weights.keys()
    assert any(not torch.equal(weight, untaught.weights[name]) for name, weight in run.weights.items())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_stopped_goes_on_to_the_same_bits(taught, text, files, tmp_path, loop):
    options = taught_run(text, tmp_path, files, "--resume=auto")
    assert loop(*options, "--trainer.max_steps=4") == 0
    assert loop(*options) == 0
    assert not different(tmp_path / LOOPS[loop] / "checkpoints/last.safetensors", taught[0] / "last.safetensors")


def test_a_run_without_its_teachers_any_more_can_be_read_and_says_which_it_lacks(taught, text, tmp_path, capsys):
    gpt, _ = load_mean([taught[0] / "best.safetensors"])
    assert gpt.config.n_embd == 8
    gone = tmp_path / "gone.safetensors"
    assert main(["fit", *taught_run(text, tmp_path, [gone])]) == 2
    assert str(gone) in capsys.readouterr().err
    assert not list(tmp_path.glob("version_*"))


def test_a_run_may_begin_with_a_model_and_learn_from_others(text, files, tmp_path):
    for loop, name in LOOPS.items():
        options = [f"--init_from={files[0]}", "--model.gpt.dropout=0", "--trainer.max_steps=2"]
        assert loop(*taught_run(text, tmp_path, files[1:], *options)) == 0
        assert load_run(tmp_path / name / "checkpoints/last.safetensors").hyper_parameters["gpt"]["n_embd"] == 16
    assert not different(*(tmp_path / name / "checkpoints/last.safetensors" for name in LOOPS.values()))


@pytest.mark.long
def test_compiled_it_learns_the_same(text, files, tmp_path):
    loop, name = next(iter(LOOPS.items()))
    for compiled in ("true", "false"):  # without dropout, which draws others there
        options = ["--model.gpt.dropout=0", f"--model.compile={compiled}", "--trainer.max_steps=4"]
        assert loop(*taught_run(text, tmp_path / compiled, files, *options)) == 0
    of_compiled, of_eager = (curves(tmp_path / compiled / name) for compiled in ("true", "false"))
    for tag in ("train/loss", "val/loss"):
        for step in (2, 4):
            assert of_compiled[tag, step] == pytest.approx(of_eager[tag, step], rel=1e-5)  # sums in another order


def test_what_cannot_be_is_told_in_a_sentence(text, files, tmp_path, capsys, teachers):
    characters = tmp_path / "characters.safetensors"
    save_run(characters, new_run(characters, network(GPTConfig(BLOCK, 4, 1, 1, 8), 0).state_dict(),
                                 GPTConfig(BLOCK, 4, 1, 1, 8), CharTokenizer("abc")))  # fmt: skip
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text("data: {}\n")
    refused = {
        "of the tokenizer char, and this run": ("fit", [characters], []),
        "is longer than the 16 tokens": ("fit", files, ["--data.block_size=18"]),
        "does not go with model.memory.weights=host": ("fit", files, ["--model.memory.weights=host"]),
        "does not go with trainer.strategy": ("fit", files, ["--trainer.strategy=ModelParallelStrategy"]),
        "cannot be planned": ("plan", files, []),
        "tune measures runs": ("tune", files, []),
        "cannot be known from smaller networks": ("forecast", files, []),
        "leave them out": ("parity", files, []),
    }
    for sentence, case in refused.items():
        command, models, more = case
        more = [*more, f"--config={nothing}"]
        assert main([command, *taught_run(text, tmp_path / command, models, *more)]) == 2, sentence
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert sentence in line
        assert "teachers" in line
        assert not list((tmp_path / command).glob("version_*"))
