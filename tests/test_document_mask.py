"""data.documents: separate. The reference is each document alone, one forward and backward pass for each."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from small_runs import LOOPS as COMMANDS
from small_runs import accelerate, different, fit, small_run
from three_loops import assert_loops_agree
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.tokenizer import ByteTokenizer
from nanogpt_lit.evaluate.likelihood import Scorer
from nanogpt_lit.gpt.attention import Documents
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import compare
from nanogpt_lit.parity.runs import LOOPS, Case

START = 11
CONFIG = GPTConfig(block_size=24, vocab_size=12, n_layer=2, n_head=2, n_embd=16, document_start=START)
TECHNIQUES = {
    "plain": MemoryConfig(),
    "recast": MemoryConfig(recast_weights=True),
    "selective": MemoryConfig(recompute="selective"),
    "full": MemoryConfig(recompute="full"),
    "inputs on the host": MemoryConfig(recompute="full", block_inputs="host"),
    "weights on the host": MemoryConfig(weights="host"),
    "weights streamed, selective": MemoryConfig(weights="streamed", recompute="selective"),
}


def new_gpt(config=CONFIG, memory=None):
    torch.manual_seed(1)
    gpt = GPT(config)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3)
    if memory is not None:
        apply_techniques(gpt, memory)
    return gpt


def window():
    """Sequences that begin inside a document and at its start, with one of a single token and one without an end."""
    tokens = torch.randint(0, START, (3, 25), generator=torch.Generator().manual_seed(2))
    for row, starts in enumerate(([5, 6, 17], [0, 9], [])):
        tokens[row, starts] = START
    return tokens[:, :-1], tokens[:, 1:]


def documents_of(tokens, targets):
    """(tokens, targets) of each document alone, as if it were the only text of its sequence."""
    for row, wanted in zip(tokens, targets, strict=True):
        starts = [0, *(n for n in range(1, len(row)) if row[n] == START), len(row)]
        for begin, end in itertools.pairwise(starts):
            yield row[None, begin:end], wanted[None, begin:end]


def alone(gpt, tokens, targets):
    """The mean loss, its gradients left in the network."""
    losses = [
        F.cross_entropy(gpt(document).flatten(0, 1), wanted.flatten(), reduction="sum")
        for document, wanted in documents_of(tokens, targets)
    ]
    loss = sum(losses) / targets.numel()
    loss.backward()
    return loss


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_head": False, "bias": False}],
    ids=str,
)
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_loss_and_gradients_are_those_of_separate_documents(changes, chunk_tokens):
    config = replace(CONFIG, **changes)
    reference, packed = new_gpt(config), new_gpt(config, MemoryConfig(loss_chunk_tokens=chunk_tokens))
    tokens, targets = window()
    expected = alone(reference, tokens, targets)
    loss = packed.loss(tokens, targets)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-6
    for (name, parameter), other in zip(reference.named_parameters(), packed.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=0, atol=1e-6), name


def test_joined_documents_are_another_loss_and_a_sequence_of_one_document_the_same():
    joined, separate = new_gpt(replace(CONFIG, document_start=None)), new_gpt()
    tokens, targets = window()
    assert abs((joined.loss(tokens, targets) - separate.loss(tokens, targets)).item()) > 0.01
    alike = joined.loss(tokens[2:], targets[2:]), separate.loss(tokens[2:], targets[2:])
    assert torch.allclose(*alike, rtol=0, atol=1e-6)  # the kernel adds up in another order with a mask


def test_the_mask_by_hand():
    documents = Documents.of(torch.tensor([[1, START, 2, 3, START]]), START, torch.float32)
    assert documents.positions.tolist() == [[0, 0, 1, 2, 0]]
    seen = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert (documents.mask[0, 0] == 0).int().tolist() == seen
    assert set(documents.mask.flatten().tolist()) == {0.0, -torch.inf}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_memory_technique_has_the_bits_of_the_plain_network(name, dropout, dtype):
    """But for what one with weights on the host adds up in another order: the gradient of the token embedding."""
    results = []
    for memory in (MemoryConfig(), TECHNIQUES[name]):
        gpt = new_gpt(replace(CONFIG, dropout=dropout), memory)
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            loss = gpt.loss(*window())
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in gpt.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["plain", "selective", "full"])
def test_it_compiles_without_graph_breaks_to_the_same_bits(name):
    eager, compiled = new_gpt(memory=TECHNIQUES[name]), new_gpt(memory=TECHNIQUES[name])
    expected = eager.loss(*window())
    loss = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")(*window())
    for one in (expected, loss):
        one.backward()
    assert torch.equal(loss, expected)
    assert all(
        torch.equal(one.grad, other.grad) for one, other in zip(eager.parameters(), compiled.parameters(), strict=True)
    )


def kept(config, memory):
    """Bytes between forward and backward."""
    with FakeTensorMode():
        gpt = GPT(config)
        apply_techniques(gpt, memory)
        tokens = torch.zeros(2, config.block_size, dtype=torch.int64)
        with LiveBytes() as live, torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            loss = gpt.loss(tokens, tokens)
        assert loss.requires_grad
        return live.now


@pytest.mark.parametrize("name", ["plain", "selective", "full"])
def test_the_mask_is_held_once_for_all_layers(name):
    """2 bytes for each pair of tokens of a sequence; positions are of each sequence, and not of all."""
    T = 256  # long enough for attention in bfloat16
    config = replace(CONFIG, block_size=T, n_layer=4)
    memory = TECHNIQUES[name]
    more = kept(config, memory) - kept(replace(config, document_start=None), memory)
    assert 2 * T * T * 2 <= more <= 2 * T * T * 2 + 2 * T * 8 * 2


def test_generation_reads_one_document_and_its_cache_knows_no_mask():
    separate, joined = new_gpt(), new_gpt(replace(CONFIG, document_start=None))
    tokens, _ = window()
    for use_cache in (True, False):
        texts = [
            torch.stack(list(generate(gpt, tokens[:, :9], 40, temperature=0, use_cache=use_cache)))
            for gpt in (separate, joined)
        ]
        assert torch.equal(*texts)


def test_evaluation_of_a_text_reads_its_documents_apart():
    tokenizer = ByteTokenizer()
    config = replace(CONFIG, vocab_size=257, document_start=tokenizer.eot)
    scorer, other = (Scorer(new_gpt(c).eval(), tokenizer) for c in (config, replace(config, document_start=None)))
    stream = [tokenizer.encode_stream([("one text", True), ("and another", True)])]
    assert scorer.text_loss(stream).nats != pytest.approx(other.text_loss(stream).nats, abs=1e-3)
    parts = [scorer.text_loss([tokenizer.encode_stream([(text, True)])]).nats for text in ("one text", "and another")]
    with torch.no_grad():  # what neither document alone has: that the first one ends
        tokens = torch.from_numpy(tokenizer.encode_stream([("one text", True)]).astype("int64"))[None]
        ends = -scorer.gpt(tokens)[0, -1].log_softmax(-1)[tokenizer.eot]
    assert scorer.text_loss(stream).nats == pytest.approx(sum(parts) + float(ends), abs=1e-4)
    # Questions of several rows are filled up at their end, which is no document of theirs.
    pairs = [("a", "b"), ("a longer one", " than that")]
    for found, expected in zip(scorer.continuations(pairs), other.continuations(pairs), strict=True):
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-5)


# In a run


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "rows"
    folder.mkdir()
    rows = "".join(f'{{"text": "{n} bottles of beer."}}\n' for n in range(200))
    (folder / "rows.jsonl").write_text(rows)
    return folder


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_three_loops_give_the_same_bits(short_documents, tmp_path, precision):
    """With dropout, accumulation and validation."""
    data = TokenDataModule(
        str(short_documents), "byte", val_fraction=0.1, shards_dir=str(tmp_path / "shards"), block_size=48,
        batch_size=2, documents="separate",
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    gpt = GPTConfig(48, 257, n_layer=2, n_head=2, n_embd=8, dropout=0.1, document_start=data.document_start)
    settings = LoopSettings(4, 2, 0.05, precision, val_check_interval=4, limit_val_batches=2, seed=7)
    case = Case(settings, gpt, AdamWConfig(lr=0.01), ScheduleConfig(warmup_steps=2, total_steps=4))
    expected = assert_loops_agree(case, data)
    joined = LOOPS["reference"](replace(case, gpt=replace(gpt, document_start=None)), data).entries
    assert compare(expected, joined) is not None


def test_a_run_keeps_documents_apart_by_one_line_of_yaml_resumes_so_and_is_evaluated_so(
    short_documents, tmp_path, capsys
):
    options = small_run(
        short_documents, tmp_path, "--data.block_size=48", "--data.documents=separate",
        "--trainer.limit_val_batches=1.0", f"--data.shards_dir={tmp_path / 'shards'}",
    )  # fmt: skip
    for loop in (fit, accelerate):
        assert loop(*options) == 0
    ends = [tmp_path / name / "checkpoints/last.safetensors" for name in COMMANDS.values()]
    assert not different(*ends)
    run = load_run(ends[0])
    assert run.hyper_parameters["gpt"]["document_start"] == 256
    halfway = [*options, "--trainer.max_steps=4", "--model.schedule.warmup_steps=2"]
    assert fit(*halfway) == 0
    assert fit(*options, f"--ckpt_path={tmp_path / 'version_1/checkpoints/last.safetensors'}") == 0
    capsys.readouterr()
    assert main(["eval", "--ckpt", str(ends[0]), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert found["loss"] == pytest.approx(run.validations["latest"][1], abs=1e-5)
    assert fit(*options, "--data.documents=joined", f"--ckpt_path={ends[0]}", "--trainer.max_steps=9") == 0


def test_the_plan_counts_the_mask(short_documents, tmp_path, capsys):
    B, T = 4, 512
    options = small_run(
        short_documents, tmp_path, f"--data.block_size={T}", f"--data.batch_size={B}", "--trainer.precision=16-mixed",
        "--model.gpt.n_embd=16",
    )  # fmt: skip
    allocated_mib = {}
    for documents in ("joined", "separate"):
        command = ["plan", "--vram=4GiB", "--os=linux", "--json", *options, f"--data.documents={documents}"]
        assert main(command) == 0
        allocated_mib[documents] = json.loads(capsys.readouterr().out)["planned_allocated_mib"]
    more = allocated_mib["separate"] - allocated_mib["joined"]
    # In float16; the peak is beside the logits, where nothing else of it is left but the positions of all sequences.
    assert B * T * T * 2 / 2**20 <= more <= B * T * T * 2 / 2**20 + 0.2
