"""data.documents: conversations. The reference is transformers' text of each conversation, learned alone."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chat_templates import TEMPLATES, messages
from small_networks import new_tokenizer, saved, trained
from small_runs import LOOPS as COMMANDS
from small_runs import accelerate, different, fit, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_chat_template import chat_of, theirs
from three_loops import assert_loops_agree

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import load_network
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.cli.beginning import option_of
from nanogpt_lit.data.conversations import CHATML_TOKENS, Chat, able_to_chat
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.sampler import NumberedOrder, StreamPosition
from nanogpt_lit.data.shards import val_tokens_per_byte
from nanogpt_lit.data.tokenizer_files import with_chat_template
from nanogpt_lit.data.windows import pack
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.gpt.llama import Llama, LlamaConfig
from nanogpt_lit.gpt.loss import IGNORE_INDEX
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.loops.reference import train
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.runs import Case

T = 96


def talks(n=60, longest=4):
    """Conversations of 1 to `longest` questions, each with an answer."""
    draw = random.Random(1)
    for k in range(n):
        numbers = [draw.randrange(100) for _ in range(draw.randrange(1, longest + 1))]
        said = [part for number in numbers for part in (f"{number} + 1?", str(number + 1) + "!" * draw.randrange(6))]
        yield messages(*said, system=("Add.", None)[k % 2])


def rows_of(conversations):
    return "".join(json.dumps({"messages": conversation}) + "\n" for conversation in conversations)


@pytest.fixture(scope="module")
def talk_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    path.write_text(rows_of(talks()))
    return path


def module_of(source, shards_dir, tokenizer="byte", **options):
    options = {"val_fraction": 0.2, "block_size": T, "batch_size": 2, **options}
    data = TokenDataModule(str(source), tokenizer, shards_dir=str(shards_dir), documents="conversations", **options)
    data.prepare_data()
    data.setup()
    return data


def batches_of(data):
    """All windows of both splits, (B, T) each."""
    parts = [
        data._windows[split].__getitems__(list(range(data._windows[split].n_windows))) for split in ("train", "val")
    ]
    return [torch.cat(both) for both in zip(*parts, strict=True)]


def alone(chat, conversations):
    """(tokens, targets) of each conversation by transformers' rendering; the answers are looked for in its text."""
    tokenizer = theirs(chat)
    for conversation in conversations:
        text, at = tokenizer.apply_chat_template(conversation, tokenize=False), 0
        pieces = []
        for message in conversation:
            if message["role"] == "assistant":
                answer = f"<|im_start|>assistant\n{message['content']}<|im_end|>"
                start = text.index(answer, at) + len("<|im_start|>assistant\n")
                end = text.index("<|im_end|>", start) + len("<|im_end|>")
                pieces += [(text[at:start], False), (text[start:end], True)]
                at = end
        ids, is_answer = [], []
        for piece, learned in pieces:
            ids += tokenizer(piece)["input_ids"]
            is_answer += [learned] * (len(ids) - len(is_answer))
        assert ids == tokenizer(text[:at])["input_ids"]
        ids, is_answer = torch.tensor(ids), torch.tensor(is_answer)
        yield ids[None, :-1], torch.where(is_answer, ids, IGNORE_INDEX)[None, 1:]


def alone_loss(gpt, data):
    """The mean loss of the answers in the validation split, each window's conversations read one by one."""
    losses = []
    for tokens, targets in itertools.chain.from_iterable(zip(*batch, strict=True) for batch in data.val_dataloader()):
        ends = [-1, *(tokens == data.document_end).nonzero().flatten().tolist(), len(tokens)]
        for begin, end in itertools.pairwise(ends):
            wanted = targets[begin + 1 : end]
            if (is_answer := wanted != IGNORE_INDEX).any():
                with torch.no_grad():
                    logits = gpt(tokens[None, begin + 1 : end])[0]
                losses.append(F.cross_entropy(logits[is_answer], wanted[is_answer], reduction="none"))
    return float(torch.cat(losses).mean())


# The loss


@pytest.mark.parametrize(
    "memory", [MemoryConfig(), MemoryConfig(loss_chunk_tokens=64, recompute="full")], ids=["", "m"]
)
@pytest.mark.parametrize("network", ["gpt2", "llama"])
def test_the_loss_and_its_gradients_are_those_of_each_conversation_alone(talk_file, tmp_path, network, memory):
    """In float64, but for the loss, its mean and a Llama's rotations, which float32 rounds to 6e-8 of each."""
    data = module_of(talk_file, tmp_path / "shards", block_size=256)
    tokens, targets = batches_of(data)
    assert len(tokens) < 45, "several share a window"
    shape = {"block_size": 256, "vocab_size": data.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 16}
    packed, single = (
        {
            "gpt2": lambda end: GPT(GPTConfig(**shape, document_end=end)),
            "llama": lambda end: Llama(LlamaConfig(**shape, document_end=end)),
        }[network](end).double()
        for end in (data.document_end, None)
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one, other in zip(packed.parameters(), single.parameters(), strict=True):
            other.copy_(one.normal_(std=0.3, generator=draw))
    apply_techniques(packed, memory)
    total, count = 0.0, 0
    for ids, wanted in alone(Chat(data.tokenizer), talks()):
        logits = single(ids)[0]
        total = total + F.cross_entropy(logits, wanted[0], reduction="sum", ignore_index=IGNORE_INDEX)
        count += int((wanted != IGNORE_INDEX).sum())
    assert count == int((targets != IGNORE_INDEX).sum())
    expected = total / count
    expected.backward()
    loss = packed.loss(tokens, targets)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    for (name, one), other in zip(packed.named_parameters(), single.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-7), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_three_loops_give_the_same_bits(talk_file, tmp_path, precision):
    data = module_of(talk_file, tmp_path / "shards")
    shape = GPTConfig(T, data.vocab_size, n_layer=1, n_head=2, n_embd=8, document_end=data.document_end)
    settings = LoopSettings(4, 2, 0.05, precision, val_check_interval=4, limit_val_batches=2, seed=7)
    case = Case(settings, shape, AdamWConfig(lr=0.01), ScheduleConfig(warmup_steps=2, total_steps=4))
    assert_loops_agree(case, data)


class Gradients(Observer):
    """Those of the first step."""

    found = None

    def on_train_start(self, training):
        self.module = training.module

    def on_before_step(self, grad_norm):
        self.found = self.found or [parameter.grad.clone() for parameter in self.module.parameters()]


def test_a_step_is_the_mean_of_its_micro_batches_each_the_mean_of_its_answers_tokens(talk_file, tmp_path):
    data = module_of(talk_file, tmp_path / "shards", batch_size=1)
    shape = GPTConfig(T, data.vocab_size, n_layer=1, n_head=2, n_embd=8, document_end=data.document_end)
    case = Case(LoopSettings(1, 3, seed=7), shape, AdamWConfig(), ScheduleConfig(warmup_steps=1, total_steps=1))
    batches = list(itertools.islice(data.train_dataloader(), 3))
    counts = [int((targets != IGNORE_INDEX).sum()) for _, targets in batches]
    assert len(set(counts)) > 1
    module = case.make_module()
    losses = [
        F.cross_entropy(
            module.gpt.lm_head(module.gpt.hidden(tokens, documents=module.gpt.documents(tokens)))[0], wanted[0]
        )
        for tokens, wanted in batches
    ]
    expected = torch.autograd.grad(sum(losses) / 3, list(module.parameters()))
    observer = Gradients()
    train(case.make_module(), batches, batches, case.settings, [observer])
    for one, other in zip(observer.found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-7)  # float32, added up in another order


def test_every_window_has_something_to_learn_whatever_its_size(talk_file, tmp_path):
    for block_size in (60, 96, 200):
        data = module_of(talk_file, tmp_path / "shards", block_size=block_size)
        _, targets = batches_of(data)
        assert ((targets != IGNORE_INDEX).sum(dim=1) > 0).all()


# The windows


def test_packing_leaves_nothing_out_and_little_room():
    draw = np.random.default_rng(1)
    for n, capacity in ((1, 7), (50, 7), (1000, 129)):
        lengths = draw.integers(2, capacity + 1, n)
        order, starts = pack(lengths, capacity)
        assert sorted(order.tolist()) == list(range(n))
        rooms = [lengths[order[a:b]].sum() for a, b in itertools.pairwise(starts)]
        assert min(rooms) > 0
        assert max(rooms) <= capacity
        # Best fit decreasing takes 11/9 of the fewest windows and one more at worst (Johnson, 1973).
        assert len(rooms) <= 11 / 9 * np.ceil(lengths.sum() / capacity) * 1.1 + 1
        assert all(np.array_equal(a, b) for a, b in zip((order, starts), pack(lengths, capacity), strict=True))


def test_an_epoch_has_every_window_once_and_goes_on_at_any_batch():
    order = NumberedOrder(10, 5, 1337, StreamPosition())
    batches = list(itertools.islice(order, 6))
    epochs = [sorted(batches[k] + batches[k + 1]) for k in (0, 2, 4)]
    assert epochs == [list(range(10))] * 3
    assert batches[:2] != batches[2:4]
    resumed = NumberedOrder(10, 5, 1337, StreamPosition(batches_done=lambda: 3))
    assert list(itertools.islice(resumed, 3)) == batches[3:]
    halves = [NumberedOrder(10, 5, 1337, StreamPosition(rank, 2)) for rank in (0, 1)]
    assert [list(itertools.islice(half, 3)) for half in halves] == [batches[0::2], batches[1::2]]


def test_a_conversation_is_cut_only_where_it_is_longer_than_a_window(tmp_path):
    source = tmp_path / "talks.jsonl"
    said = [messages("Hi" * n, "Hello" * n) for n in (1, 2, 3)] + [messages("Go on." * 50, "No.")]
    source.write_text(rows_of(said))
    data = module_of(source, tmp_path / "shards", block_size=64, val_fraction=0.3)
    _, targets = batches_of(data)
    answers = [data.tokenizer.decode(row[row != IGNORE_INDEX].tolist()) for row in targets]
    assert sorted("".join(answers).split("<|im_end|>")) == ["", "Hello", "HelloHello", "HelloHelloHello"]
    train, val = data.remarks()
    assert "1 are longer and are cut there, 1 of them before any answer, and are left out" in train + val
    with pytest.raises(UserError, match=r"data.block_size=8 ends before any answer begins; \d+ holds every one"):
        module_of(source, tmp_path / "shards", block_size=8)


def test_an_answer_that_nothing_precedes_is_learned_from_its_second_token_on(tmp_path):
    source = tmp_path / "talks.jsonl"
    source.write_text(rows_of([{"role": "assistant", "content": said}] for said in ("", "1", "12", "123")))
    tokenizer = with_chat_template(new_tokenizer("byte"), "{% for m in messages %}{{ m.content }}{% endfor %}")
    data = module_of(source, tmp_path / "shards", tokenizer=option_of(tokenizer, tmp_path), block_size=4)
    _, targets = batches_of(data)
    learned = [data.tokenizer.decode(row[row != IGNORE_INDEX].tolist()) for row in targets]
    assert sorted(learned) == ["2", "23"]


def test_what_stands_between_conversations_stands_in_none(tmp_path):
    """A template may end its answers with end-of-text, and a user may write it."""
    tokenizer = chat_of(TEMPLATES["alternating"]).tokenizer
    source = tmp_path / "talks.jsonl"
    source.write_text(rows_of(messages(f"Say {n}.", str(n), "Again.", str(n)) for n in range(20)))
    data = module_of(source, tmp_path / "shards", tokenizer=option_of(tokenizer, tmp_path), block_size=200)
    tokens, _ = batches_of(data)
    assert data.document_end != data.tokenizer.eot
    ends = tokens == data.document_end
    for row, row_ends in zip(tokens, ends, strict=True):
        for part in np.split(row.numpy(), np.flatnonzero(row_ends.numpy())):
            text = data.tokenizer.decode([n for n in part.tolist() if n != data.document_end])
            assert not text or text.count("[INST]") == 2


# The source


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"prompt": "2 + 2?", "response": "4"}, "2 + 2?"),
        ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?"),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, "2 + 2?"),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "Add.\n\n2, 2"),
    ],
)
def test_a_question_and_its_answer_are_a_conversation(tmp_path, row, question):
    source = tmp_path / "rows.jsonl"
    source.write_text((json.dumps(row) + "\n\n") * 5 + rows_of([messages("Bye", "Bye \ud83d")]))
    data = module_of(source, tmp_path / "shards", block_size=400)
    text = "".join(data.tokenizer.decode(row.tolist()) for row in batches_of(data)[0])
    assert text.count(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n4") == 5


def test_what_is_held_out_is_chosen_by_what_is_said_and_not_by_a_long_common_message(tmp_path):
    source = tmp_path / "talks.jsonl"
    source.write_text(rows_of(messages(f"{n} + 1?", str(n + 1), system="Add. " * 1000) for n in range(40)))
    data = module_of(source, tmp_path / "shards", block_size=5100, val_fraction=0.3)
    train, val = (data._windows[split].n_sequences for split in ("train", "val"))
    assert train + val == 40
    assert 4 <= val <= 20


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "no"}', 'line 3 holds no conversation: its keys are text; {"messages"'),
        ('{"messages": []}', "line 3: messages is no list of messages"),
        ('{"messages": "Hi"}', "line 3: messages is no list of messages"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "line 3 has a message without a role and a content"),
        ('{"prompt": "Hi", "response": 4}', "line 3 has a message without a role and a content that are text"),
        ('["Hi"]', 'line 3 is not a JSON object such as {"messages"'),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, capsys, line, said):
    source = tmp_path / "talks.jsonl"
    source.write_text(rows_of(talks(2)) + line + "\n")
    for loop in (fit, accelerate):
        assert loop(*small_run(source, tmp_path, "--data.documents=conversations")) == 2
        assert said in capsys.readouterr().err


def test_what_does_not_go_with_conversations_is_one_sentence(talk_file, text, tmp_path, capsys):
    options = small_run(talk_file, tmp_path, "--data.documents=conversations", "--data.block_size=96")
    assert fit(*options, "--data.tokenizer=char") == 2
    assert "data.tokenizer=char cannot have" in capsys.readouterr().err
    assert fit(*options, f"--data.source={text}") == 2
    assert "with data.documents=conversations it is a .jsonl file" in capsys.readouterr().err
    source = tmp_path / "one.jsonl"
    source.write_text(rows_of(talks(1)))
    assert fit(*options, f"--data.source={source}", f"--data.shards_dir={tmp_path / 'one'}") == 2
    assert "holds one conversation, and another is needed" in capsys.readouterr().err
    source.write_text(rows_of([messages("Hi"), messages("Who is there?")]))
    assert fit(*options, f"--data.source={source}", f"--data.shards_dir={tmp_path / 'one'}") == 2
    assert "nothing is left for" in capsys.readouterr().err
    module_of(talk_file, tmp_path / "made")
    plain = [option for option in options if "documents" not in option]
    assert fit(*plain, f"--data.source={tmp_path / 'made'}") == 2
    assert "data.documents=joined does not go with" in capsys.readouterr().err


def test_shards_are_made_anew_for_another_template_and_for_turns_that_are_damaged(talk_file, tmp_path, capsys):
    folder = tmp_path / "shards"
    first = module_of(talk_file, folder)
    again = module_of(talk_file, folder)
    assert capsys.readouterr().out.count("preparing") == 1
    assert again.text == first.text
    assert val_tokens_per_byte(folder, first.tokenizer) is None
    turns = folder / "val_turns.npy"
    whole = turns.read_bytes()
    for damaged in (whole[:-4], np.load(turns)[:, :2].tobytes(), b""):
        turns.write_bytes(damaged)
        assert module_of(talk_file, folder).text == first.text
        assert capsys.readouterr().out.count("preparing") == 1
    assert turns.read_bytes() == whole
    manifest = folder / "manifest.json"
    for garbled in ({"document_end": 1 << 20}, {"document_end": None}, {"splits": {"val": {"turns": 1}}}):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | garbled))
        assert module_of(talk_file, folder).text == first.text
        assert capsys.readouterr().out.count("preparing") == 1
    tokenizer = chat_of(TEMPLATES["default system"], "byte").tokenizer
    before = first.text
    assert module_of(talk_file, folder, tokenizer=option_of(tokenizer, tmp_path)).text != before


# In a run


@pytest.mark.parametrize("asked", [None, "5 + 1?"])
def test_samples_are_answers_to_a_question(talk_file, tmp_path, asked):
    options = small_run(talk_file, tmp_path, f"--data.block_size={T}", "--data.documents=conversations")
    options += [f"--data.shards_dir={tmp_path / 'shards'}", "--trainer.max_steps=2", "--model.schedule.warmup_steps=1"]
    assert fit(*options, *([] if asked is None else [f"--trainer.callbacks.prompt={asked}"])) == 0
    events = EventAccumulator(str(tmp_path / "version_0")).Reload()
    sample = events.Tensors("sample/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "<|im_start|>assistant" in sample
    assert asked is None or f"<|im_start|>user\n{asked}<|im_end|>" in sample.replace("    ", "")


def test_a_run_learns_answers_by_one_line_of_yaml_in_both_loops_and_goes_on_to_the_same_bits(
    talk_file, tmp_path, capsys, monkeypatch
):
    options = small_run(
        talk_file, tmp_path, f"--data.block_size={T}", "--data.documents=conversations",
        "--trainer.limit_val_batches=1.0", f"--data.shards_dir={tmp_path / 'shards'}",
    )  # fmt: skip
    assert main(["plan", "--vram=4GiB", "--os=linux", "--json", *options]) == 0
    planned = json.loads(capsys.readouterr().out)["parameters"]
    for loop in (fit, accelerate):
        assert loop(*options) == 0
        assert "generate --chat --ckpt" in capsys.readouterr().out
    ends = [tmp_path / name / "checkpoints/last.safetensors" for name in COMMANDS.values()]
    assert not different(*ends)
    run = load_run(ends[0])
    assert run.hyper_parameters["gpt"]["document_end"] == 256
    assert run.hyper_parameters["gpt"]["vocab_size"] == 257 + len(CHATML_TOKENS)
    assert load_network(ends[0])[0].parameter_count(non_embedding=False) == planned
    assert load_network(ends[0])[1].sha256 == able_to_chat(new_tokenizer("byte")).sha256
    capsys.readouterr()
    assert main(["eval", "--ckpt", str(ends[0]), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert found.keys() == {"tokens", "loss", "perplexity"}
    data = module_of(talk_file, tmp_path / "shards", val_fraction=0.1)
    assert found["tokens"] == sum(int((wanted != IGNORE_INDEX).sum()) for _, wanted in data.val_dataloader())
    assert found["loss"] == pytest.approx(alone_loss(load_network(ends[0])[0], data), abs=1e-5)
    # A crash in step 8, after two validations.
    elsewhere, forward, calls = [*options, f"--trainer.default_root_dir={tmp_path / 'b'}"], LitNanoGPT.forward, []

    def failing(self, tokens, targets):
        calls.append(1)
        if len(calls) == 14 + 3 * 2:
            raise RuntimeError("power")
        return forward(self, tokens, targets)

    with monkeypatch.context() as patch:
        patch.setattr(LitNanoGPT, "forward", failing)
        with pytest.raises(RuntimeError, match="power"):
            fit(*elsewhere)
    last = tmp_path / "b/version_0/checkpoints/last.safetensors"
    assert load_run(last).step < 8
    assert accelerate(*elsewhere, "--resume=auto") == 0
    assert not different(last, ends[0])


@pytest.mark.parametrize("own", [True, False])
def test_a_model_is_fine_tuned_by_its_own_template_or_grows_by_chatml(talk_file, tmp_path, capsys, own):
    tokenizer = chat_of(TEMPLATES["headers"]).tokenizer if own else new_tokenizer("bpe")
    before = trained(tokenizer, steps=2, n_layer=1, n_embd=12, block_size=128)
    start = saved(tmp_path / "start.safetensors", before, tokenizer)
    options = small_run(
        talk_file, tmp_path, f"--init_from={start}", "--data.block_size=96", "--data.documents=conversations",
        f"--data.shards_dir={tmp_path / 'shards'}", "--data.val_fraction=0.2",
    )  # fmt: skip
    assert fit(*options) == 0
    gpt, after = load_network(tmp_path / "version_0/checkpoints/last.safetensors")
    assert after.sha256 == able_to_chat(tokenizer).sha256
    assert gpt.config.vocab_size == tokenizer.vocab_size + 2 * (not own)
    capsys.readouterr()
    assert fit(*options, "--resume=auto", "--trainer.max_steps=10") == 0
    assert "preparing" not in capsys.readouterr().out
    assert main(["plan", "--vram=4GiB", "--os=linux", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == gpt.parameter_count(non_embedding=False)
