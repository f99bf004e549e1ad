"""Steps that run out of memory, under each of the three loops, against runs that do not and against a loop by hand."""

import copy
import gc
import math
from dataclasses import replace

import pytest
import torch
import yaml
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
    T,
    make_loader,
    make_module,
    near,
    run,
    same_weights,
)
from small_networks import modern
from torch.utils.data import DataLoader, TensorDataset

from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.loss import IGNORE_INDEX, cross_entropy
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import seed_dropout
from nanogpt_lit.memory import host_optimizer
from nanogpt_lit.memory.elastic import ElasticConfig, ElasticLoss, start_elastic, stop_elastic
from nanogpt_lit.memory.host_optimizer import HostAdamW
from nanogpt_lit.memory.ladder import advice, at_least, levels
from nanogpt_lit.memory.micro_batch import catch_oom
from nanogpt_lit.memory.oom import limit_device_memory, oom_explained
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.optim import muon
from nanogpt_lit.run.observers import always
from nanogpt_lit.run.resume import capture

LOOPS = ("lightning", "accelerate", "reference")
CHUNK = B * T // 4
CHUNKED = MemoryConfig(loss_chunk_tokens=CHUNK)
"""What a step falls back to first: a module that has it halves its micro-batches at once."""


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


every_loop = pytest.mark.parametrize("loop", LOOPS)


@every_loop
def test_as_long_as_memory_lasts_nothing_is_different(loop):
    gpt = replace(GPT, dropout=0.1)
    elastic, plain = make_module(gpt), make_module(gpt, elastic=ElasticConfig(enabled=False))
    assert vars(run(loop, elastic)) == vars(run(loop, plain))
    assert same_weights(elastic, plain)
    assert elastic.fallback == {}


@every_loop
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_memory_may_end_at_any_micro_batch_and_the_curve_is_the_same(loop, phase, capsys):
    undisturbed = run(loop, make_module())
    for at in range(MICRO_BATCHES):
        fault = Fault(phase, at)
        module = fault.into(make_module())
        assert near(run(loop, module), undisturbed), at
        assert fault.failures == 2
        assert module.fallback == {"loss_chunk_tokens": CHUNK, "sequences": 2}
        lines = capsys.readouterr().err.strip().splitlines()
        for line, step in zip(lines, (f"with model.memory.loss_chunk_tokens={CHUNK};", "2 at a time"), strict=True):
            assert line.startswith(f"out of memory in {phase} (CUDA out of memory. Tried to allocate 2.00 GiB): ")
            assert step in line


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(
    ("loop", "network"),
    [*((loop, GPT) for loop in LOOPS), ("reference", modern(GPT, n_kv_head=1))],
    ids=[*LOOPS, "llama"],
)
def test_a_step_done_again_has_the_bits_of_one_that_was_in_pieces_from_its_start(loop, phase, network):
    gpt = replace(network, dropout=0.1)  # so that the random state counts
    for at in (0, 3):
        module = Fault(phase, at, fits=1).into(make_module(gpt, memory=CHUNKED))
        run(loop, module, replace(SETTINGS, val_check_interval=None))
        halved = by_hand(make_module(gpt, memory=CHUNKED), lambda step, at=at: 1 if step >= at // ACCUMULATE else B)
        assert same_weights(module, halved), at
    assert not same_weights(module, by_hand(make_module(gpt, memory=CHUNKED), lambda step: B))


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_first_step_has_the_bits_of_what_the_yaml_could_have_said(phase):
    settings = replace(SETTINGS, precision="bf16-mixed")
    fault = Fault(phase, fits=0, until=lambda gpt: gpt.cross_entropy is not cross_entropy)
    module, configured = fault.into(make_module()), make_module(memory=replace(CHUNKED, recast_weights=True))
    found, expected = run("reference", module, settings), run("reference", configured, settings)
    assert (found.norms, found.validations) == (expected.norms, expected.validations)
    assert module.fallback == {"loss_chunk_tokens": CHUNK, "recast_weights": True}
    assert same_weights(module, configured)
    assert [type(part) for part in module.modules()] == [type(part) for part in configured.modules()]


def test_a_compiled_network_is_not_changed_where_it_would_be_compiled_again(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    module = Fault("backward").into(make_module(compile=True))
    run("reference", module)
    assert module.fallback == {"sequences": 2}


def test_the_loops_agree_to_the_bit_on_steps_that_were_done_again_under_a_loss_scale():
    settings = replace(SETTINGS, precision="16-mixed")
    modules = [Fault("backward", 3, fits=1).into(make_module()) for _ in LOOPS]
    diaries = [run(loop, module, settings) for loop, module in zip(LOOPS, modules, strict=True)]
    assert vars(diaries[0]) == vars(diaries[1]) == vars(diaries[2])
    assert same_weights(modules[0], modules[1])
    assert same_weights(modules[0], modules[2])


def test_a_step_that_the_scaler_skips_leaves_nothing_to_the_next_one_in_pieces():
    # The step of such an optimizer is not called then, and Lightning frees the gradients only after the next forward.
    settings = replace(SETTINGS, precision="16-mixed")
    modules = []
    for loop in LOOPS:
        module = make_module(optim={"implementation": "for-loop"})
        module.fallback = {"sequences": 2}
        diary = run(loop, module, settings, init_scale=2.0**24, backoff_factor=2.0**-8)
        modules.append(module)
        assert [math.isfinite(norm) for norm in diary.norms] == [False, True, True]
    assert same_weights(modules[0], modules[1])
    assert same_weights(modules[0], modules[2])


def test_pieces_count_by_their_targets_and_one_without_any_counts_nothing():
    train = make_loader(MICRO_BATCHES, 1, ignored=True)
    module = make_module()
    module.fallback = {"sequences": 2}
    diary = run("reference", module, train=train)
    assert same_weights(module, by_hand(make_module(), lambda step: 2, train=train))
    assert near(diary, run("reference", make_module(), train=train))


@every_loop
def test_validation_is_computed_in_pieces_of_its_own(loop):
    undisturbed = run(loop, make_module(memory=CHUNKED))
    for at in range(4):  # two of two micro-batches each
        module = Fault("validation", at, fits=1).into(make_module(memory=CHUNKED))
        assert near(run(loop, module), undisturbed), at
        assert module.fallback == {"validation_sequences": 1}


PLACES = {
    "the optimizer's state on the device": {},
    "on the host": {"memory": {"optimizer_state": "host"}},
    "weights on the host": {"memory": {"weights": "host"}},
    "weights streamed": {"memory": {"weights": "streamed", "recompute": "full", "block_inputs": "host"}},
    "Muon": {"optim": {"matrices": "muon"}},
    "Muon beside a state on the host": {"optim": {"matrices": "muon"}, "memory": {"optimizer_state": "host"}},
    "AdamW in 8 bits": {"optim": {"state_bits": 8}},
}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def made(place, fault=None):
    """fault: of the optimizer's second step"""
    if "state_bits" in place.get("optim", {}):
        pytest.importorskip("bitsandbytes")
    module = make_module(optim=place.get("optim"), memory=MemoryConfig(**place.get("memory", {})))
    configure, steps = module.configure_optimizers, []

    def configure_faulty():
        configured = configure()

        def fail(optimizer, *_):
            steps.append(optimizer)
            if fault is not None and len(steps) == 2:
                raise fault

        configured["optimizer"].register_step_pre_hook(fail)
        return configured

    module.configure_optimizers = configure_faulty
    return module


@every_place
@pytest.mark.parametrize("phase", ["forward", "backward", "validation"])
def test_wherever_memory_lies_what_did_not_fit_is_done_again(place, phase):
    undisturbed = run("reference", made(place))
    module = Fault(phase, 1, fits=1).into(made(place))
    assert near(run("reference", module), undisturbed)
    sequences = "validation_sequences" if phase == "validation" else "sequences"
    assert module.fallback == {"loss_chunk_tokens": CHUNK, sequences: 1}


@every_place
def test_wherever_memory_lies_one_that_ends_in_the_optimizer_ends_the_run_with_what_needs_less(place):
    module = made(place, torch.OutOfMemoryError(SHORTAGE))
    with pytest.raises(UserError) as caught, oom_explained(module, casts_weights=False):
        run("reference", module)
    assert str(caught.value).startswith(
        "memory ended in the optimizer (CUDA out of memory. Tried to allocate 2.00 GiB)"
    )
    check_advice(module, str(caught.value), only={"optimizer_state", "weights"})


def check_advice(module, sentence, only=None):
    """Its lines name what is not in force, and what a module takes; or there are none."""
    _, *lines = sentence.split("\n\n", 1)
    own = module.memory_config
    if not lines:
        assert own.weights == "streamed" or module.optim_config.state_bits == 8
        assert "set a smaller data.block_size" in sentence
        return
    less = MemoryConfig(**{**vars(own), **yaml.safe_load(lines[0])["model"]["memory"]})
    changed = {name for name, value in vars(less).items() if value != getattr(own, name)}
    assert changed, "advises what is so already"
    assert at_least(less, own)
    assert levels(less) != levels(own)
    assert only is None or changed <= only
    make_module(optim={name: getattr(module.optim_config, name) for name in ("matrices", "state_bits")}, memory=less)


@every_loop
def test_memory_that_ends_in_the_optimizer_ends_the_run_in_every_loop(loop):
    module = made({}, torch.OutOfMemoryError(SHORTAGE))
    with pytest.raises(UserError, match="memory ended in the optimizer"), oom_explained(module, casts_weights=False):
        run(loop, module)


@every_place
@pytest.mark.parametrize("phase", ["forward", "backward", "validation"])
def test_where_one_sequence_does_not_fit_the_run_ends_with_what_needs_less(place, phase):
    module = Fault(phase, fits=0).into(made(place))
    with pytest.raises(UserError) as caught:
        run("reference", module)
    assert str(caught.value).startswith(f"memory ended in {phase} of one sequence of {T} tokens (CUDA out of memory. ")
    check_advice(module, str(caught.value))


def test_an_update_in_muon_is_not_told_what_is_so_already(monkeypatch):
    module = made(PLACES["Muon"])

    def fail(*_):
        raise torch.OutOfMemoryError(SHORTAGE)

    monkeypatch.setattr(muon, "orthogonalised", fail)
    with pytest.raises(UserError) as caught, oom_explained(module, casts_weights=False):
        run("reference", module)
    assert "implementation" not in str(caught.value)
    check_advice(module, str(caught.value), only={"optimizer_state", "weights"})


@pytest.mark.parametrize("name", ["zeros", "empty"])
def test_an_optimizer_with_its_state_on_the_host_that_failed_may_be_asked_again(name, monkeypatch):
    """Where it fails: among the moments that it makes, and for the room that they visit."""
    make = getattr(torch, name)
    parameters = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
    for p in parameters:
        p.grad = torch.ones(8, 8)
    calls_of_a_step = {"zeros": 6, "empty": 1}[name]
    for failing in range(calls_of_a_step):
        calls = []

        def fail_once(*arguments, calls=calls, failing=failing, **options):
            calls.append(arguments)
            if len(calls) == failing + 1:
                raise torch.OutOfMemoryError(SHORTAGE)
            return make(*arguments, **options)

        optimizer = HostAdamW(parameters, fused=True)
        with monkeypatch.context() as patch:
            patch.setattr(host_optimizer.torch, name, fail_once)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
            optimizer.step()
        assert [state["step"].item() for state in optimizer.state_dict()["state"].values()] == [1, 1]


def test_a_network_that_is_sharded_is_advised_what_its_strategy_takes():
    module = make_module(memory=MemoryConfig(loss_chunk_tokens=8, recast_weights=True, recompute="selective"))
    assert "recompute_every: 2" not in advice(module, True, "forward", SHORTAGE)
    assert "optimizer_state: host" in advice(module, True, "forward", SHORTAGE)
    module._device_mesh = "of ModelParallelStrategy"
    assert "recompute_every: 2" in advice(module, True, "forward", SHORTAGE)
    assert "set a smaller data.block_size" in advice(module, True, "the optimizer", SHORTAGE)


def test_a_cpu_without_memory_is_not_told_to_use_that_of_the_host():
    said = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    module = make_module()
    assert "set a smaller data.block_size" in advice(module, False, "the optimizer", said)
    assert "loss_chunk_tokens: 256" in advice(module, False, "forward", said)
    module = make_module(memory=MemoryConfig(weights="host"))
    assert "of model.memory.weights=host" in advice(module, False, "backward", said)


def test_several_processes_end_where_memory_ends(tmp_path):
    """One that did a step again would leave the others waiting for its gradients."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        module = Fault("backward").into(make_module())
        with pytest.raises(UserError, match=r"memory ended in backward \("), oom_explained(module, casts_weights=False):
            run("reference", module)
        assert module.fallback == {}
    finally:
        torch.distributed.destroy_process_group()


@every_loop
@pytest.mark.parametrize("phase", ["forward", "backward", "validation"])
@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("shapes do not match")], ids=["value", "runtime"])
def test_an_error_that_is_not_about_memory_passes_untouched(loop, phase, error):
    module = Fault(phase, error=error).into(make_module())
    with pytest.raises(type(error)) as caught, oom_explained(module, casts_weights=False):
        run(loop, module)
    assert caught.value is error
    assert module.fallback == {}


@pytest.mark.parametrize(
    ("error", "is_oom"),
    [
        (torch.OutOfMemoryError(SHORTAGE), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_only_what_an_allocator_says_is_an_out_of_memory(error, is_oom):
    def fail():
        raise error

    if is_oom:
        assert catch_oom(fail)[1].startswith(str(error)[:20])
    else:
        with pytest.raises(type(error)):
            catch_oom(fail)


def test_a_real_allocator_that_fails_is_understood():
    assert "DefaultCPUAllocator" in catch_oom(torch.empty, 2**60)[1]


def test_switched_off_the_allocators_error_ends_the_run():
    module = Fault("backward").into(make_module(elastic=ElasticConfig(enabled=False)))
    with pytest.raises(torch.OutOfMemoryError):
        run("reference", module)


def start(module):
    start_elastic(module, accumulate_grad_batches=1, scaler=None, device=torch.device("cpu"), say=print)


@every_loop
def test_after_the_run_the_module_calls_its_networks_loss(loop):
    module = make_module()
    run(loop, module)
    assert module.loss == module.gpt.loss
    start(module)
    assert isinstance(module.loss, ElasticLoss)
    copied = copy.deepcopy(module)  # as for an average of the weights
    assert copied.loss == copied.gpt.loss
    stop_elastic(module)
    assert module.loss == module.gpt.loss


class Kept(Diary):
    """Keeps the last state of a run as a checkpoint would."""

    def on_train_start(self, training):
        self.training = training

    def state(self):
        return capture(self.training, data={})


def test_what_was_found_is_in_the_checkpoint_and_every_loop_goes_on_with_it(tmp_path):
    path, kept = tmp_path / "last.safetensors", Kept()
    module = Fault("backward", 3).into(make_module())
    reference.train(module, make_loader(MICRO_BATCHES, 1), make_loader(2, 2), SETTINGS, [*always(), kept])
    save_run(path, kept.state())
    found = {"loss_chunk_tokens": CHUNK, "sequences": 2}
    assert load_run(path).elastic == module.fallback == found

    longer = replace(SETTINGS, max_steps=STEPS + 1)
    # Where a loader goes on is its own affair, and this one has no memory.
    (batch,) = make_loader(1, 1)
    always_the_same = DataLoader(
        TensorDataset(*(tensor.repeat(2 * MICRO_BATCHES, 1) for tensor in batch)), B, generator=torch.Generator()
    )
    resumed = {loop: make_module() for loop in LOOPS}
    for loop, other in resumed.items():
        run(loop, other, longer, train=always_the_same, start=path)
        assert other.fallback == found
        assert other.gpt.cross_entropy is not cross_entropy
        assert same_weights(other, resumed["lightning"])
    assert not same_weights(other, module)


def test_what_was_found_goes_on_where_the_yaml_has_the_techniques_by_now():
    module = make_module(memory=MemoryConfig(loss_chunk_tokens=9))
    module.fallback = {"loss_chunk_tokens": CHUNK, "sequences": 2}
    start(module)
    assert module.fallback == {"sequences": 2}
    assert module.gpt.cross_entropy.keywords == {"chunk_tokens": 9}


DAMAGED = ({"sequences": -1}, {"sequences": True}, {"loss_chunk_tokens": 0}, {"loss_chunk_tokens": "a"}, {"b": "c"})


@pytest.mark.parametrize("damaged", DAMAGED, ids=str)
def test_a_damaged_fallback_is_refused(damaged):
    module = make_module()
    module.fallback = damaged
    with pytest.raises(UserError, match="is nothing that a run can fall back to"):
        start(module)


@pytest.fixture
def gpu_of_4_gib(monkeypatch):
    """3 GiB of it free; sets a limit before, and gives the limits that are set."""
    limits = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3072 * 2**20, 4096 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 512 * 2**20)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))

    def limited_before(fraction):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
        return limits

    return limited_before


@pytest.mark.parametrize(
    ("budget_mib", "system", "before", "limits"),
    [
        (1024, "linux", 0.9, [0.25, 0.9]),
        (None, "linux", 0.9, []),
        (None, "win32", 0.9, [(3072 + 512) / 4096, 0.9]),
        (1024, "win32", 0.9, [0.25, 0.9]),
        (None, "win32", 0.2, [0.2, 0.2]),  # a tighter limit that is there already stays
        (2048, "win32", 0.2, [0.2, 0.2]),
    ],
)
def test_a_budget_and_windows_make_the_allocator_fail_in_time(gpu_of_4_gib, budget_mib, system, before, limits):
    found = gpu_of_4_gib(before)
    back = limit_device_memory(torch.device("cuda"), budget_mib, system)
    assert found == limits[:1]
    back()
    assert found == limits


def test_a_budget_beyond_the_card_is_refused(gpu_of_4_gib):
    gpu_of_4_gib(1.0)
    with pytest.raises(ValueError, match="budget_mib=5000 is more than the 4096 MiB"):
        limit_device_memory(torch.device("cuda"), 5000)


@every_loop
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_step_that_is_done_again_and_has_no_finite_gradients_is_left_out_once(loop, phase):
    def make(sequences=None):
        module = make_module(memory=CHUNKED)
        if sequences is not None:
            module.fallback = {"sequences": sequences}
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
    assert module.fallback == {"sequences": 2}
    for diary in diaries:
        assert [math.isfinite(norm) for norm in diary.norms] == [True, False, True]
    assert [schedule.skipped_steps for schedule in schedules] == [1, 1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), expected.parameters(), strict=True))
    assert all(p.isfinite().all() for p in module.parameters())
