"""Two real processes, in one of which memory ends: both take the same steps, and nobody waits for ever."""

import gc
from dataclasses import replace

import pytest
import torch
from faults import BUCKET_MIB, GPT, SETTINGS, B, Fault, make_loader, make_module, run
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from nanogpt_lit.elastic.elastic import ElasticConfig
from nanogpt_lit.gpt.loss import cross_entropy
from nanogpt_lit.loops import reference
from nanogpt_lit.parity.processes import run_together

PROCESSES, STEPS, ACCUMULATE = 2, 2, 2
LOOPS = ("lightning", "accelerate", "reference")
FAULTS = {
    f"{phase} {at}": (phase, at) for phase in ("forward", "backward") for at in (0, 1, 3)
}  # the backwards of 1 and 3 exchange gradients


class SmallBuckets(DistributedDataParallel):
    def __init__(self, module):
        super().__init__(module, bucket_cap_mb=BUCKET_MIB)


def share_of(loader, rank):
    """Every second batch: as accelerate deals them out."""
    batches = list(loader)[rank::PROCESSES]
    dataset = TensorDataset(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
    return DataLoader(dataset, batch_size=B, generator=torch.Generator())


def train(loop, module):
    """Losses of this process and the weights in the end; two steps of two micro-batches, one validation."""
    rank = torch.distributed.get_rank()
    settings = replace(SETTINGS, max_steps=STEPS, val_check_interval=STEPS * ACCUMULATE)
    loaders = [make_loader(PROCESSES * STEPS * ACCUMULATE, 1), make_loader(PROCESSES, 2)]
    if loop != "accelerate":  # which deals them out itself
        loaders = [share_of(loader, rank) for loader in loaders]
    diary = run(loop, module, settings, *loaders, processes=PROCESSES)
    return {
        "losses": diary.losses,
        "validations": diary.validations,
        "weights": [p.detach().clone() for p in module.parameters()],
        "finding": module.elastic.finding,
    }


def outcomes():
    """Of each loop and case, in this process. Only the second one runs out of memory."""
    torch.set_num_threads(1)
    gc.freeze()
    reference.DistributedDataParallel = SmallBuckets
    fails_here = torch.distributed.get_rank() == 1
    gpt = replace(GPT, dropout=0.1)  # so that the random state counts
    found = {}
    for loop in LOOPS:
        found[loop, "off"] = train(loop, make_module(gpt, elastic=ElasticConfig(enabled=False)))
        found[loop, "on"] = train(loop, make_module(gpt))
        module = make_module(gpt)
        module.elastic.restore({"sequences": 2})
        found[loop, "in pieces"] = train(loop, module)
        for name, (phase, at) in FAULTS.items():
            module, fault = make_module(gpt), Fault(phase, at)
            if fails_here:
                fault.into(module)
            found[loop, name] = {**train(loop, module), "failures": fault.failures}
        found[loop, "without dropout"] = train(loop, make_module())
        module = make_module()
        if fails_here:
            Fault("backward", 1, fits=1).into(module)
        found[loop, "fails without dropout"] = train(loop, module)
        module = make_module(gpt)
        fault = Fault("backward", 1, fits=0, until=lambda gpt: gpt.cross_entropy is not cross_entropy)
        if fails_here:
            fault.into(module)
        found[loop, "climbs"] = train(loop, module)
        module = make_module(gpt)
        if fails_here:
            Fault("validation").into(module)
        found[loop, "validation"] = train(loop, module)
        module = make_module(gpt)
        if fails_here:
            Fault("backward", 1, fits=0).into(module)
        with pytest.raises(ValueError, match=r"memory ended in another|do not fit") as caught:
            train(loop, module)
        found[loop, "lost"] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def both():
    return run_together(PROCESSES, outcomes)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


@pytest.mark.parametrize("loop", LOOPS)
def test_as_long_as_memory_lasts_nothing_is_different(both, loop):
    for found in both:
        assert same(found[loop, "on"], found[loop, "off"])
        assert found[loop, "on"]["losses"] == found[loop, "off"]["losses"]
        assert found[loop, "on"]["finding"] == {}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_that_fails_in_one_process_is_done_again_in_both(both, loop, name):
    first, second = both
    assert [found[loop, name]["failures"] for found in both] == [0, 1]
    assert first[loop, name]["finding"] == second[loop, name]["finding"] == {"sequences": 2}
    assert same(first[loop, name], second[loop, name])
    if FAULTS[name][1] < ACCUMULATE:  # the first step: then all was in the same pieces as here
        assert same(first[loop, name], first[loop, "in pieces"])
        assert not same(first[loop, name], first[loop, "on"])
    else:
        assert not same(first[loop, name], first[loop, "in pieces"])


@pytest.mark.parametrize("loop", LOOPS)
def test_the_curve_is_the_same(both, loop):
    for found in both:
        fails, undisturbed = found[loop, "fails without dropout"], found[loop, "without dropout"]
        assert fails["finding"] == {"sequences": 1}
        for curve in ("losses", "validations"):
            assert fails[curve] == pytest.approx(undisturbed[curve], abs=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_both_climb(both, loop):
    first, second = (found[loop, "climbs"] for found in both)
    assert first["finding"] == second["finding"] == {"sequences": 1, "memory": {"loss_chunk_tokens": 256}}
    assert same(first, second)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_validation_that_fails_in_one_process_has_the_same_mean(both, loop):
    first, second = (found[loop, "validation"] for found in both)
    assert second["finding"] == {"validation_sequences": 2}
    assert first["validations"] == second["validations"]
    assert first["validations"] == pytest.approx(both[0][loop, "on"]["validations"], abs=1e-6)


@pytest.mark.parametrize("loop", LOOPS)
def test_where_nothing_is_left_in_one_process_both_end(both, loop):
    first, second = (found[loop, "lost"] for found in both)
    assert "memory ended in another process" in first
    assert "activations and gradients of one sequence" in second


@pytest.mark.parametrize("name", [f"{phase} {at}" for phase in ("forward", "backward") for at in (0, 1)])
def test_the_loops_agree_to_the_bit(both, name):
    for found in both:
        assert same(found["lightning", name], found["accelerate", name])
        assert same(found["lightning", name], found["reference", name])
