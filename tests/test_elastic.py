"""Steps that run out of memory, under each of the three loops, against runs that do not and against a loop by hand."""

import copy
import gc
import math
from dataclasses import replace

import pytest
import torch
from faults import (
    ACCUMULATE,
    GPT,
    MICRO_BATCHES,
    SETTINGS,
    SHORTAGE,
    STEPS,
    B,
    Diary,
    Fault,
    make_loader,
    make_module,
    near,
    run,
    same_weights,
)
from torch.utils.data import DataLoader, TensorDataset

from nanogpt_lit.checkpoint.run_file import decoded, description_of, load_run, open_run, save_run
from nanogpt_lit.elastic.elastic import ElasticConfig
from nanogpt_lit.elastic.shortage import attempt, cap_card_memory
from nanogpt_lit.gpt.loss import IGNORE_INDEX, cross_entropy
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import seed_dropout
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.run.resume import capture, random_states


@pytest.fixture(autouse=True)
def _one_thread():
    """On so small a network two threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect():
    """Every failure collects garbage, and would look through all that the frameworks have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def by_hand(module, sequences_at, settings=SETTINGS, train=None):
    """A plain loop whose step k computes sequences_at(k) sequences at a time."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    seed_dropout(settings.seed)
    module.train()
    for k, (tokens, targets) in enumerate(train or make_loader(MICRO_BATCHES, 1)):
        counted = (targets != IGNORE_INDEX).sum()
        size = sequences_at(k // ACCUMULATE)
        for some, theirs in zip(tokens.split(size), targets.split(size), strict=True):
            share = (theirs != IGNORE_INDEX).sum() / counted
            if share > 0:
                loss = module.gpt.loss(some, theirs)
                ((loss if size == B else loss * share) / ACCUMULATE).backward()
        if (k + 1) % ACCUMULATE == 0:
            torch.nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]], settings.gradient_clip_val
            )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return module


every_loop = pytest.mark.parametrize("loop", ["lightning", "accelerate", "reference"])


@every_loop
def test_as_long_as_memory_lasts_nothing_is_different(loop):
    gpt = replace(GPT, dropout=0.1)
    elastic, plain = make_module(gpt), make_module(gpt, elastic=ElasticConfig(enabled=False))
    assert vars(run(loop, elastic)) == vars(run(loop, plain))
    assert same_weights(elastic, plain)
    assert elastic.elastic.finding == {}


@every_loop
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_memory_may_end_at_any_micro_batch_and_the_curve_is_the_same(loop, phase, capsys):
    undisturbed = run(loop, make_module())
    for at in range(MICRO_BATCHES):
        fault = Fault(phase, at)
        module = fault.into(make_module())
        assert near(run(loop, module), undisturbed), at
        assert fault.failures == 1
        assert module.elastic.finding == {"sequences": 2}
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"out of memory in {phase} (CUDA out of memory. Tried to allocate 2.00 GiB): ")
        assert "2 at a time" in line


@every_loop
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_step_done_again_has_the_bits_of_one_that_was_in_pieces_from_its_start(loop, phase):
    gpt = replace(GPT, dropout=0.1)  # so that the random state counts
    for at in (0, 3):
        module = Fault(phase, at, fits=1).into(make_module(gpt))
        run(loop, module, replace(SETTINGS, val_check_interval=None))
        expected = by_hand(make_module(gpt), lambda step, at=at: 1 if step >= at // ACCUMULATE else B)
        assert same_weights(module, expected), at
        assert not same_weights(module, by_hand(make_module(gpt), lambda step: B))


def test_the_loops_agree_to_the_bit_on_steps_that_were_done_again_under_a_loss_scale():
    settings = replace(SETTINGS, precision="16-mixed")
    modules = [Fault("backward", 3, fits=1).into(make_module()) for _ in range(3)]
    diaries = [
        run(loop, module, settings)
        for loop, module in zip(("lightning", "accelerate", "reference"), modules, strict=True)
    ]
    assert vars(diaries[0]) == vars(diaries[1]) == vars(diaries[2])
    assert same_weights(modules[0], modules[1])
    assert same_weights(modules[0], modules[2])


def test_a_step_that_the_scaler_skips_leaves_nothing_to_the_next_one_in_pieces():
    # The step of such an optimizer is not called then, and Lightning frees the gradients only after the next forward.
    settings = replace(SETTINGS, precision="16-mixed")
    modules = []
    for loop in ("lightning", "accelerate", "reference"):
        module = make_module(implementation="for-loop")
        module.elastic.restore({"sequences": 2})
        diary = run(loop, module, settings, init_scale=2.0**24, backoff_factor=2.0**-8)
        modules.append(module)
        assert [math.isfinite(norm) for norm in diary.norms] == [False, True, True]
    assert same_weights(modules[0], modules[1])
    assert same_weights(modules[0], modules[2])


def test_pieces_count_by_their_targets_and_one_without_any_counts_nothing():
    train = make_loader(MICRO_BATCHES, 1, ignored=True)
    module = make_module()
    module.elastic.restore({"sequences": 2})
    diary = run("reference", module, train=train)
    assert same_weights(module, by_hand(make_module(), lambda step: 2, train=train))
    assert near(diary, run("reference", make_module(), train=train))


@every_loop
def test_validation_is_computed_in_pieces_of_its_own(loop):
    undisturbed = run(loop, make_module())
    for at in range(4):  # two of two micro-batches each
        module = Fault("validation", at, fits=1).into(make_module())
        assert near(run(loop, module), undisturbed), at
        assert module.elastic.finding == {"validation_sequences": 1}


@every_loop
@pytest.mark.parametrize("at", range(STEPS))
def test_an_optimizer_that_fails_before_its_update_is_asked_again(loop, at, capsys):
    module, plain = make_module(), make_module()
    configure, steps = module.configure_optimizers, []

    def configure_faulty():
        configured = configure()

        def fail(optimizer, *_):
            steps.append(optimizer)
            if len(steps) == at + 1:
                first = optimizer.param_groups[0]["params"][0]
                if first not in optimizer.state:  # as AdamW would leave it when memory ends among its moments
                    optimizer.state[first]["step"] = torch.tensor(0.0)
                raise torch.OutOfMemoryError(SHORTAGE)

        configured["optimizer"].register_step_pre_hook(fail)
        return configured

    module.configure_optimizers = configure_faulty
    assert vars(run(loop, module)) == vars(run(loop, plain))
    assert same_weights(module, plain)
    assert "out of memory in the optimizer" in capsys.readouterr().err


def test_an_update_that_has_begun_is_not_done_twice():
    module = make_module()
    optimizer = module.configure_optimizers()["optimizer"]
    module.elastic.attach(optimizer, lambda loss: loss, print)
    batch = next(iter(make_loader(1, 1)))
    for _ in range(2):
        module(*batch).backward()
        optimizer.step()
    module(*batch).backward()
    module.elastic.detach()

    def half_a_step(*_):
        next(iter(optimizer.state.values()))["step"].add_(1)
        raise torch.OutOfMemoryError(SHORTAGE)

    optimizer.register_step_pre_hook(half_a_step)
    module.elastic.attach(optimizer, lambda loss: loss, print)
    with pytest.raises(ValueError, match="cannot be done again; go on from the last checkpoint"):
        optimizer.step()


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_nor_is_one_that_has_made_its_state_in_the_same_step(matrices, monkeypatch):
    torch.manual_seed(0)
    module = LitNanoGPT(GPT, AdamWConfig(matrices=matrices), ScheduleConfig(total_steps=STEPS))
    optimizer = module.configure_optimizers()["optimizer"]
    module.elastic.attach(optimizer, lambda loss: loss, print)
    module(*next(iter(make_loader(1, 1)))).backward()
    # Memory ends in the second group of two: the first has its update.
    second = optimizer.param_groups[1 if matrices == "adamw" else -1]["params"][0]
    zeros_like = torch.zeros_like

    def fail(tensor, *arguments, **options):
        if tensor is second or tensor is second.grad:
            raise torch.OutOfMemoryError(SHORTAGE)
        return zeros_like(tensor, *arguments, **options)

    monkeypatch.setattr(torch, "zeros_like", fail)
    with pytest.raises(ValueError, match="cannot be done again"):
        optimizer.step()


@every_loop
@pytest.mark.parametrize("phase", ["forward", "backward", "validation"])
@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("shapes do not match")], ids=["value", "runtime"])
def test_an_error_that_is_not_about_memory_passes_untouched(loop, phase, error):
    module = Fault(phase, error=error).into(make_module())
    with pytest.raises(type(error)) as caught:
        run(loop, module)
    assert caught.value is error
    assert module.elastic.finding == {}


@pytest.mark.parametrize(
    ("error", "is_shortage"),
    [
        (torch.OutOfMemoryError(SHORTAGE), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_only_what_an_allocator_says_is_a_shortage(error, is_shortage):
    def fail():
        raise error

    if is_shortage:
        assert attempt(fail)[1].startswith(str(error)[:20])
    else:
        with pytest.raises(type(error)):
            attempt(fail)


def test_a_real_allocator_that_fails_is_understood():
    assert "DefaultCPUAllocator" in attempt(torch.empty, 2**60)[1]


@every_loop
def test_where_one_sequence_does_not_fit_the_network_climbs_the_ladder(loop, capsys):
    top = MemoryConfig(loss_chunk_tokens=256, recompute="full")
    fault = Fault("backward", 2, fits=0, until=lambda gpt: type(gpt.transformer.h[1]).__name__ == "RecomputedBlock")
    module = fault.into(make_module())
    assert near(run(loop, module), run(loop, make_module()))
    assert module.elastic.finding == {"sequences": 1, "memory": {"loss_chunk_tokens": 256, "recompute": "full"}}
    lines = capsys.readouterr().err.strip().splitlines()
    assert ["from here on" in line for line in lines] == [True] * 6  # 2, 1, chunks, selective, every second, every one
    assert "model.memory.recompute=selective" in lines[3]

    # What it has climbed to is what the YAML could have said.
    parts = [type(part) for part in make_module(memory=top).modules()]
    assert [type(part) for part in module.modules()] == parts


@pytest.mark.parametrize("phase", ["forward", "backward", "validation"])
def test_where_nothing_is_left_one_sentence_names_what_does_not_fit(phase):
    module = Fault(phase, fits=0).into(make_module())
    with pytest.raises(ValueError, match=r"activations .*CUDA out of memory.*model\.memory\.weights=host[^\n]*\.$"):
        run("reference", module)


def test_an_optimizer_whose_state_never_fits_is_named():
    module = make_module()
    optimizer = module.configure_optimizers()["optimizer"]

    def fail(*_):
        raise torch.OutOfMemoryError(SHORTAGE)

    optimizer.register_step_pre_hook(fail)
    module.elastic.attach(optimizer, lambda loss: loss, print)
    module(*next(iter(make_loader(1, 1)))).backward()
    with pytest.raises(ValueError, match=r"optimizer's state, 0 MiB, .*set model\.memory\.optimizer_state=host"):
        optimizer.step()


def test_switched_off_the_allocators_error_ends_the_run():
    module = Fault("backward").into(make_module(elastic=ElasticConfig(enabled=False)))
    with pytest.raises(torch.OutOfMemoryError):
        run("reference", module)


def test_after_the_run_the_module_is_as_before():
    module = make_module()
    run("reference", module)
    tokens, targets = next(iter(make_loader(1, 1)))
    (gradient,) = torch.autograd.grad(module(tokens, targets), module.gpt.transformer.wpe.weight)
    assert gradient.abs().sum() > 0
    copy.deepcopy(module)


class Kept(Diary):
    """Keeps the last state of a run as a checkpoint would."""

    def on_train_start(self, parts):
        self.parts = parts

    def state(self):
        return capture(
            self.parts,
            step=STEPS,
            batches=MICRO_BATCHES,
            accumulate_grad_batches=ACCUMULATE,
            random=random_states(torch.device("cpu")),
            data={},
        )


def test_what_was_found_is_in_the_checkpoint_and_every_loop_goes_on_with_it(tmp_path):
    path, kept = tmp_path / "last.safetensors", Kept()
    module = Fault("backward", 3, fits=0, until=lambda gpt: gpt.cross_entropy is not cross_entropy).into(make_module())
    reference.train(module, make_loader(MICRO_BATCHES, 1), make_loader(2, 2), SETTINGS, kept)
    save_run(path, kept.state())
    found = {"sequences": 1, "memory": {"loss_chunk_tokens": 256}}
    assert load_run(path).elastic == module.elastic.finding == found

    longer = replace(SETTINGS, max_steps=STEPS + 1)
    # Where a loader goes on is its own affair, and this one has no memory.
    (batch,) = make_loader(1, 1)
    always_the_same = DataLoader(
        TensorDataset(*(tensor.repeat(2 * MICRO_BATCHES, 1) for tensor in batch)), B, generator=torch.Generator()
    )
    resumed = {loop: make_module() for loop in ("lightning", "accelerate", "reference")}
    for loop, other in resumed.items():
        run(loop, other, longer, train=always_the_same, start=path)
        assert other.elastic.finding == found
        assert same_weights(other, resumed["lightning"])
    assert not same_weights(other, module)


def test_a_checkpoint_from_before_there_was_this_means_that_everything_fits(tmp_path):
    path, kept = tmp_path / "last.safetensors", Kept()
    reference.train(make_module(), make_loader(MICRO_BATCHES, 1), make_loader(2, 2), SETTINGS, kept)
    save_run(path, kept.state())
    with open_run(path) as file:
        description, tensors = description_of(file), file.read(file.names)
    del description["elastic"]
    assert decoded(path, description, tensors).elastic == {}


def test_what_was_found_goes_on_where_the_yaml_has_the_techniques_by_now():
    found = {"sequences": 2, "memory": {"loss_chunk_tokens": 256, "recompute": "full"}}
    same, more = make_module(), make_module(memory=MemoryConfig(loss_chunk_tokens=128, recompute="full"))
    same.elastic.restore(found)
    more.elastic.restore(found)
    assert same.elastic.finding == found
    assert more.elastic.finding == {"sequences": 2}


def test_a_damaged_finding_is_refused():
    with pytest.raises(ValueError, match="sequences=-1"):
        make_module().elastic.restore({"sequences": -1})


@pytest.mark.parametrize(
    ("budget_mib", "system", "fraction"),
    [(1024, "linux", 0.25), (None, "linux", None), (None, "win32", (3072 + 512) / 4096), (1024, "win32", 0.25)],
)
def test_a_budget_and_windows_make_the_allocator_fail_in_time(monkeypatch, budget_mib, system, fraction):
    told = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3072 * 2**20, 4096 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 512 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.9)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    back = cap_card_memory(torch.device("cuda"), budget_mib, system)
    assert told == ([] if fraction is None else [fraction])
    back()
    assert told == ([] if fraction is None else [fraction, 0.9])


@pytest.mark.parametrize("budget_mib", [None, 2048])
def test_a_tighter_limit_that_is_there_already_stays(monkeypatch, budget_mib):
    told = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3072 * 2**20, 4096 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    cap_card_memory(torch.device("cuda"), budget_mib, "win32")
    assert told == [0.25]


def test_a_budget_beyond_the_card_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3072 * 2**20, 4096 * 2**20))
    with pytest.raises(ValueError, match="budget_mib=5000 is more than the 4096 MiB"):
        cap_card_memory(torch.device("cuda"), 5000)


@every_loop
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_step_that_is_done_again_and_has_no_finite_gradients_is_left_out_once(loop, phase):
    def make(sequences=None):
        module = make_module()
        if sequences is not None:
            module.elastic.restore({"sequences": sequences})
        loss = module.loss

        def broken(tokens, targets):
            value = loss(tokens, targets)
            is_broken = torch.is_grad_enabled() and (tokens.unsqueeze(1) == third[2:]).all(2).any()
            return value * torch.nan if is_broken else value

        module.loss = broken
        configure = module.configure_optimizers

        def configure_and_keep():
            configured = configure()
            schedules.append(configured["lr_scheduler"]["scheduler"])
            return configured

        module.configure_optimizers = configure_and_keep
        return module

    schedules = []
    third = list(make_loader(MICRO_BATCHES, 1))[2][0]  # its last two sequences, in the second of three steps
    expected, module = make(sequences=2), make()
    fault = Fault(phase, 2)
    diaries = run(loop, expected), run(loop, fault.into(module))
    assert fault.failures == 1
    assert module.elastic.finding == {"sequences": 2}
    for diary in diaries:
        assert [math.isfinite(norm) for norm in diary.norms] == [True, False, True]
    assert [schedule.skipped_steps for schedule in schedules] == [1, 1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), expected.parameters(), strict=True))
    assert all(p.isfinite().all() for p in module.parameters())
