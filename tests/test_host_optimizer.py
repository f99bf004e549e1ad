"""AdamW with its moments in host memory: torch's own bits, torch's own state, and little of it on the card."""

from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch.optim import AdamW

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops.contract import LoopSettings, Parts
from nanogpt_lit.loops.resume import capture, restore
from nanogpt_lit.memory import host_optimizer
from nanogpt_lit.memory.host_optimizer import HostAdamW
from nanogpt_lit.memory.step import StepShape, trace_steps
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.memory.trace import CUBLAS_WORKSPACE
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import compare
from nanogpt_lit.parity.runs import LOOPS, Case, quiet
from nanogpt_lit.parity.settled import OVERFLOWS

STEPS = 6
IMPLEMENTATIONS = ("for-loop", "foreach", "fused")
ON_HOST = {"memory": MemoryConfig(optimizer_state="host")}
SHAPES = [(71, 71), (77,), (2500,), (3 * 1024,), (1,), (100, 13)]


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    """A parameter is cut into several slices, and a step takes more buckets than there are slots."""
    quiet()
    torch.set_num_threads(1)
    monkeypatch.setattr(host_optimizer, "BUCKET_ELEMENTS", 1024)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host_optimizer")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall.\n" for n in range(60)))
    data = TokenDataModule(
        str(text), "byte", val_fraction=0.1, shards_dir=str(folder / "shards"), block_size=8, batch_size=2
    )
    data.prepare_data()
    data.setup()
    return data


def case(precision="32-true", clip=0.05, implementation="fused", **rest):
    return Case(
        LoopSettings(STEPS, 3, clip, precision, val_check_interval=7, limit_val_batches=2, seed=7),
        GPTConfig(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=8, dropout=0.1),
        AdamWConfig(lr=0.01, implementation=implementation),
        ScheduleConfig(warmup_steps=2, total_steps=STEPS),
        **rest,
    )


GRID = {
    "float32": case(),
    "float32, nothing clipped, for-loop": case(clip=None, implementation="for-loop"),
    "bfloat16, foreach": case("bf16-mixed", implementation="foreach"),
    "float16, steps skipped": case("16-mixed", scaler=OVERFLOWS),
    "float16, steps skipped, foreach, nothing clipped": case("16-mixed", None, "foreach", scaler=OVERFLOWS),
}


@pytest.mark.parametrize("name", GRID)
def test_every_loop_gives_the_bits_of_the_plain_optimizer(name, data):
    plain = LOOPS["reference"](GRID[name], data).entries
    assert sum("exp_avg" in entry.quantity for entry in plain) > 20  # moments are compared too
    for loop, run in LOOPS.items():
        assert compare(plain, run(replace(GRID[name], module_options=ON_HOST), data).entries) is None, loop


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def optimizer_of(adamw, params, implementation):
    return build_optimizer(
        [(str(k), p) for k, p in enumerate(params)], AdamWConfig(lr=0.01, implementation=implementation), adamw
    )


def take_steps(optimizer, params, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slices_are_computed_as_the_whole_tensor_is(implementation, threads):
    torch.set_num_threads(threads)
    ours, theirs = parameters(), parameters()
    for adamw, params in ((HostAdamW, ours), (AdamW, theirs)):
        take_steps(optimizer_of(adamw, params, implementation), params, 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("first", "then"), [(AdamW, HostAdamW), (HostAdamW, AdamW), (HostAdamW, HostAdamW)])
def test_a_checkpoint_goes_from_one_to_the_other(first, then, implementation):
    params, straight = parameters(), parameters()
    before = optimizer_of(first, params, implementation)
    take_steps(before, params, 0, 3)
    after = optimizer_of(then, params, implementation)
    after.load_state_dict(before.state_dict())
    take_steps(after, params, 3, 6)

    reference = optimizer_of(AdamW, straight, implementation)
    take_steps(reference, straight, 0, 6)
    expected, found = reference.state_dict(), after.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for k, p in enumerate(params):
        assert torch.equal(p, straight[k])
        assert list(found["state"][k]) == list(expected["state"][k])
        for name, value in expected["state"][k].items():
            assert torch.equal(found["state"][k][name], value)


@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(optimizer_state="host")])
def test_a_run_is_taken_up_with_the_state_where_it_is_now_wanted(memory, tiny_gpt):
    def parts_of(memory):
        torch.manual_seed(0)
        module = LitNanoGPT(tiny_gpt, AdamWConfig(lr=0.05), ScheduleConfig(total_steps=9), memory=memory)
        configured = module.configure_optimizers()
        return Parts(module, configured["optimizer"], configured["lr_scheduler"]["scheduler"], None)

    def take(parts, first, last):
        for step in range(first, last):
            tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(step))
            parts.module(tokens[:, :-1], tokens[:, 1:]).backward()
            parts.optimizer.step()
            parts.schedule.step()
            parts.optimizer.zero_grad()

    other = MemoryConfig(optimizer_state="card" if memory.optimizer_state == "host" else "host")
    straight, before, after = parts_of(memory), parts_of(memory), parts_of(other)
    take(straight, 0, 6)
    take(before, 0, 3)
    state = capture(before, step=3, batches=3, accumulate_grad_batches=1, random=[{}], data={})
    restore(after, state)
    take(after, 3, 6)
    for (name, expected), found in zip(straight.module.named_parameters(), after.module.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_lightning_does_not_move_the_moments_to_the_card_when_it_loads_them():
    params = parameters()
    optimizer = optimizer_of(HostAdamW, params, "fused")
    take_steps(optimizer, params, 0, 1)
    state_dict = optimizer.state_dict()
    for adamw, stay in ((HostAdamW, True), (AdamW, False)):
        loaded = optimizer_of(adamw, params, "fused")
        loaded.load_state_dict(state_dict)
        _optimizer_to_device(loaded, torch.device("meta"))  # in place of a card
        devices = {value["exp_avg"].device.type for value in loaded.state_dict()["state"].values()}
        assert devices == {"cpu" if stay else "meta"}


def test_a_parameter_without_gradient_is_left_alone():
    params = parameters()
    optimizer = optimizer_of(HostAdamW, params, "fused")
    take_steps(optimizer, params[:2], 0, 1)
    assert list(optimizer.state_dict()["state"]) == [0, 2]  # the first matrix and the first vector


def test_the_plan_sees_the_moments_leave_the_card(monkeypatch):
    monkeypatch.setattr(host_optimizer, "BUCKET_ELEMENTS", 2**22)
    gpt = GPTConfig(block_size=64, vocab_size=50304, n_layer=2, n_head=4, n_embd=256)
    shape = StepShape(batch_size=1, block_size=64, vocab_size=50304, accumulate_grad_batches=2)
    on_card, on_host = (
        trace_steps(lambda memory=memory: LitNanoGPT(gpt, memory=memory), shape)
        for memory in (MemoryConfig(), ON_HOST["memory"])
    )
    count = LitNanoGPT(gpt).gpt.parameter_count(non_embedding=False)
    assert on_card.host_peak_bytes == 0
    assert on_host.host_peak_bytes == 8 * count
    assert on_card.peaks["forward"].bytes_by_category["optimizer"] >= 8 * count
    assert on_host.peaks["forward"].bytes_by_category["optimizer"] < 100 * 512  # one count per tensor
    # At the step: weights, gradients, and three buckets of 4 Mi parameters' moments.
    at_step = on_host.peaks["optimizer"].bytes - 2 * CUBLAS_WORKSPACE
    assert 8 * count < at_step <= 8 * count + 3 * 2**22 * 8 + 2**20


def test_a_place_for_the_state_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"model\.memory\.optimizer_state='disk' is not known; use card or host"):
        MemoryConfig(optimizer_state="disk")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_a_card_the_bits_are_the_same_and_the_moments_are_page_locked(implementation):
    runs = []
    for adamw in (AdamW, HostAdamW):
        params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters()]
        optimizer = optimizer_of(adamw, params, implementation)
        for step in range(5):
            generator = torch.Generator("cuda").manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step()
        runs.append((params, optimizer.state_dict()["state"]))
    (plain, plain_state), (ours, our_state) = runs
    for k, (a, b) in enumerate(zip(plain, ours, strict=True)):
        assert torch.equal(a, b)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert our_state[k][moment].is_pinned()
            assert torch.equal(plain_state[k][moment].cpu(), our_state[k][moment])
