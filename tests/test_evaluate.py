"""Losses, bits per byte and accuracies of checkpoints, against transformers, hand-made scorers and lm-eval."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from small_runs import BOTTLES, fit, small_run

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert, load_network
from nanogpt_lit.checkpoint.exchange import new_run
from nanogpt_lit.checkpoint.run_file import save_run
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.tokenizer import ByteTokenizer, CharTokenizer, gpt2_tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.evaluate.likelihood import Scorer
from nanogpt_lit.evaluate.tasks import hellaswag, read_questions
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig

ROWS = [
    {"ctx_a": "A man is", "ctx_b": "walking [step] his dog.", "activity_label": "Dogs", "label": 1,
     "endings": ["He flies.", "He walks on, and on.", "She [header] sings.", "it rains"]},
    {"ctx": "Two and two", "label": "3", "endings": ["is three", "is", "are five of them", "are four"]},
]  # fmt: skip


def scorer_of(tokenizer, block_size=16, seed=0):
    """A network far from uniform: differences are larger than float32's noise."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3)
    return Scorer(gpt.eval(), tokenizer)


def naive_log_likelihood(scorer, tokens, first_scored):
    """One forward pass a token, on the context that block_size leaves."""
    total, greedy = 0.0, True
    for k in range(first_scored, len(tokens)):
        before = torch.tensor([tokens[max(0, len(tokens) - 1 - scorer.block_size) : k]])
        logits = scorer.gpt(before)[0, -1].double()
        total += float(F.log_softmax(logits, dim=0)[tokens[k]])
        greedy &= int(logits.argmax()) == tokens[k]
    return total, greedy


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), gpt2_tokenizer()], ids=["byte", "gpt2"])
def test_continuations_equal_one_forward_pass_a_token(tokenizer):
    scorer = scorer_of(tokenizer, block_size=12)
    pairs = [
        ("Hello", " world"),
        ("", "abc"),
        ("a much longer context than fits", " here"),
        ("spaces  ", "end"),
        ("x", "y"),
    ]
    for (context, continuation), found in zip(pairs, scorer.continuations(pairs), strict=True):
        context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
        before, both = tokenizer.encode(context).tolist(), tokenizer.encode(context + continuation).tolist()
        scored = len(both) - len(before)
        both = both if before else [tokenizer.eot, *both]
        likelihood, greedy = naive_log_likelihood(scorer, both, len(both) - scored)
        assert found.log_likelihood == pytest.approx(likelihood, abs=1e-4)  # float32 logits
        assert found.is_greedy == greedy


@torch.no_grad()
def test_the_networks_own_text_is_greedy_and_another_is_not():
    scorer = scorer_of(ByteTokenizer(), block_size=8)
    tokens = [65]
    while len(tokens) < 6:
        tokens.append(int(scorer.gpt(torch.tensor([tokens]))[0, -1, :128].argmax()))
    likeliest = scorer.gpt(torch.tensor([tokens]))[0].argmax(dim=1)
    is_greedy = bool((likeliest[:-1] == torch.tensor(tokens[1:])).all())
    text = bytes(tokens).decode("latin-1")
    (found,) = scorer.continuations([(text[0], text[1:])])
    assert found.is_greedy == is_greedy
    other = chr((tokens[1] + 1) % 128)
    (found,) = scorer.continuations([(text[0], other)])
    assert not found.is_greedy


def test_the_loss_of_a_text_is_that_of_its_windows_and_counts_bytes_of_text_alone():
    tokenizer = CharTokenizer("aäb")
    scorer = scorer_of(tokenizer, block_size=4)
    stream = [tokenizer.encode_stream([("aäb", True)]), tokenizer.encode_stream([("bb", False), ("ä", True)])]
    tokens = torch.tensor(np.concatenate(stream).astype(np.int64))  # <eot> a ä b b b <eot> ä
    assert len(tokens) == 8
    with torch.no_grad():
        losses = [
            F.cross_entropy(scorer.gpt(tokens[None, start:end])[0], tokens[start + 1 : end + 1], reduction="none")
            for start, end in ((0, 4), (4, 7))
        ]
    losses = torch.cat(losses).double()
    found = scorer.text_loss(stream)
    assert found.targets == 7
    assert found.loss == pytest.approx(float(losses.mean()), abs=1e-5)
    is_text = tokens[1:] != tokenizer.eot
    assert found.text_bytes == 1 + 2 + 1 + 1 + 1 + 2
    assert found.bits_per_byte == pytest.approx(float(losses[is_text].sum()) / math.log(2) / 8, abs=1e-5)


def test_bits_per_byte_of_a_uniform_network_is_the_tokenizers_width():
    scorer = scorer_of(ByteTokenizer())
    with torch.no_grad():
        scorer.gpt.lm_head.weight.zero_()
    found = scorer.text_loss([ByteTokenizer().encode_stream([("any text ə", True)])])
    assert found.bits_per_byte == pytest.approx(math.log2(257))


def test_pieces_of_a_stream_do_not_matter():
    scorer = scorer_of(ByteTokenizer())
    whole = ByteTokenizer().encode_stream([(BOTTLES, True)])
    at_once, in_pieces = scorer.text_loss([whole]), scorer.text_loss(np.array_split(whole, 37))
    assert at_once == in_pieces


def test_a_text_without_a_target_and_a_continuation_beyond_the_block_are_refused():
    scorer = scorer_of(ByteTokenizer(), block_size=4)
    with pytest.raises(UserError, match="fewer than two tokens"):
        scorer.text_loss([np.array([256])])
    with pytest.raises(UserError, match="continuation of 5 tokens is longer than the network's block_size=4"):
        scorer.continuations([("a", "bcdef")])


# HellaSwag


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


def test_questions_are_read_as_the_harness_writes_them(questions):
    first, second = read_questions(questions)
    assert (first.context, first.label) == ("Dogs: A man is Walking his dog.", 1)
    assert first.endings == ["He flies.", "He walks on, and on.", "She sings.", "it rains"]
    assert (second.context, second.label) == ("Two and two", 3)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_accuracies_equal_those_of_a_scorer_written_out(questions, seed):
    scorer = scorer_of(ByteTokenizer(), block_size=64, seed=seed)
    right = right_norm = 0
    for question in read_questions(questions):
        scores = []
        for ending in question.endings:
            tokens = scorer.tokenizer.encode(f"{question.context} {ending}").tolist()
            scores.append(naive_log_likelihood(scorer, tokens, len(scorer.tokenizer.encode(question.context)))[0])
        right += int(np.argmax(scores)) == question.label
        normed = [score / len(ending) for score, ending in zip(scores, question.endings, strict=True)]
        right_norm += int(np.argmax(normed)) == question.label
    found = hellaswag(scorer, questions)
    assert (found.questions, found.accuracy, found.accuracy_norm) == (2, right / 2, right_norm / 2)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 1: not a HellaSwag question"),
        ('{"ctx": "a", "endings": ["b"]}', "line 1: not a HellaSwag question"),
        ('{"ctx": "a", "endings": ["b"], "label": 1}', "label=1 names none of 1 endings"),
        ("[" * 100_000, "line 1: not a HellaSwag question"),
        ("", "holds no question"),
    ],
)
def test_a_file_that_is_no_hellaswag_is_refused_in_a_sentence(line, sentence, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=sentence):
        hellaswag(scorer_of(ByteTokenizer()), path)


# The command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text(BOTTLES)
    assert fit(*small_run(text, folder / "root", "--trainer.limit_val_batches=1.0")) == 0
    return folder / "root" / "version_0"


def results_of(capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_without_data_the_runs_own_validation_loss_comes_out(run_folder, capsys):
    checkpoint = run_folder / "checkpoints" / "last.safetensors"
    found = results_of(capsys, "--ckpt", checkpoint)[str(checkpoint)]
    settings = yaml.safe_load((run_folder / "config.yaml").read_text())
    yaml_file = run_folder.parent / "again.yaml"
    yaml_file.write_text(yaml.safe_dump({key: settings[key] for key in ("trainer", "model", "data")}))
    assert main(["validate", f"--config={yaml_file}", f"--ckpt_path={checkpoint}"]) == 0
    validated = float(capsys.readouterr().out.split("validation loss ")[1].split(",")[0])
    assert found["loss"] == pytest.approx(validated, abs=6e-5)  # printed with four digits


def test_the_mean_of_checkpoints_is_measured_in_the_windows_of_fit(run_folder, tmp_path, capsys):
    folder = shutil.copytree(run_folder, tmp_path / run_folder.name) / "checkpoints"
    gpt, tokenizer = load_network(folder / "last.safetensors")
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    save_run(folder / "noisy.safetensors", new_run(folder, gpt.state_dict(), gpt.config, tokenizer))
    paths = [folder / name for name in ("last.safetensors", "noisy.safetensors")]
    found = results_of(capsys, "--ckpt", *paths, "--mean")
    assert list(found) == [*map(str, paths), "mean of 2"]

    settings = yaml.safe_load((folder.parent / "config.yaml").read_text())["data"]
    data = TokenDataModule(**settings | {"shards_dir": str(run_folder.parents[1] / "shards")})
    data.setup()
    nats = []
    for tokens, targets in data.val_dataloader():  # what fit validates on, here the whole of it
        with torch.no_grad():
            each = [load_network(path)[0](tokens).double().softmax(dim=-1) for path in paths]
        nats.append(-(sum(each) / 2).gather(2, targets[..., None]).log().flatten())
    assert found["mean of 2"]["tokens"] == len(torch.cat(nats))
    assert found["mean of 2"]["loss"] == pytest.approx(float(torch.cat(nats).mean()), abs=1e-5)  # float32's logits
    losses = [found[str(path)]["loss"] for path in paths]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_shards_made_anew_of_another_text_are_not_taken_for_the_runs(run_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_folder.parents[1], folder)
    for config in folder.rglob("config*.yaml"):
        config.write_text(config.read_text().replace(str(run_folder.parents[1]), str(folder)))
    checkpoint = folder / "root" / run_folder.name / "checkpoints" / "last.safetensors"
    assert results_of(capsys, "--ckpt", checkpoint)
    (tmp_path / "other.txt").write_text("Another text, of other words.\n" * 100)
    arguments = [f"--data.source={tmp_path / 'other.txt'}", f"--data.shards_dir={folder / 'shards'}"]
    assert main(["prepare", *arguments, "--data.tokenizer=byte", "--data.block_size=16"]) == 0
    assert main(["eval", "--ckpt", str(checkpoint)]) == 2
    assert f"{folder / 'shards'} now holds another text than {checkpoint}" in capsys.readouterr().err
    assert results_of(capsys, "--ckpt", checkpoint, "--data", folder / "shards")


def test_several_checkpoints_give_a_line_each_and_one_picture(run_folder, tmp_path, capsys):
    text = tmp_path / "other.txt"
    text.write_text(BOTTLES[:500])
    names = [str(run_folder / "checkpoints" / f"{name}.safetensors") for name in ("best", "last")]
    picture = tmp_path / "eval.png"
    assert main(["eval", "--ckpt", *names, "--data", str(text), "--picture", str(picture)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["checkpoint", "tokens", "loss", "perplexity", "bits", "per", "byte"]
    assert [line.split()[0] for line in lines] == names
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_of_others_is_measured_beside_ours(run_folder, tmp_path, capsys):
    text = tmp_path / "other.txt"
    text.write_text(BOTTLES[:500])
    ours = run_folder / "checkpoints" / "best.safetensors"
    convert(ours, tmp_path / "hf", to="hf")
    first, second = results_of(capsys, "--ckpt", ours, tmp_path / "hf", "--data", text).values()
    assert first == pytest.approx(second, rel=1e-6)


def test_hellaswag_alone_measures_no_loss(run_folder, tmp_path, capsys):
    questions = tmp_path / "short.jsonl"
    questions.write_text("\n".join(json.dumps({"ctx": "a", "endings": ["b", "cd"], "label": k}) for k in (0, 1)))
    checkpoint = run_folder / "checkpoints" / "last.safetensors"
    found = results_of(capsys, "--ckpt", checkpoint, "--hellaswag", questions, "--limit", 1)[str(checkpoint)]
    assert found.keys() == {"hellaswag questions", "hellaswag/acc", "hellaswag/acc_norm"}
    assert found["hellaswag questions"] == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--limit=0"], "--limit=0 must be at least 1"),
        (["--picture=x.gif"], "must end in .svg or .png"),
        (["--data=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(run_folder, arguments, sentence, capsys):
    checkpoint = run_folder / "checkpoints" / "last.safetensors"
    assert main(["eval", "--ckpt", str(checkpoint), *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line


def test_a_checkpoint_away_from_its_run_asks_for_a_text(run_folder, tmp_path, capsys):
    alone = tmp_path / "a" / "b" / "c.safetensors"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((run_folder / "checkpoints" / "last.safetensors").read_bytes())
    assert main(["eval", "--ckpt", str(alone)]) == 2
    assert "lies in no run whose shards are here; name a text" in capsys.readouterr().err


# lm-eval


TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_without_the_harness_its_extra_is_named(run_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--ckpt", str(run_folder / "checkpoints/last.safetensors"), "--tasks=x"]) == 2
    assert 'pip install "nanogpt_lit[eval]"' in capsys.readouterr().err


@pytest.mark.long
def test_a_local_task_of_the_harness_is_scored_as_by_hand(run_folder, tmp_path, capsys, monkeypatch):
    """Needs lm-eval: pip install -e ".[eval]"."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"question": f"{n} bottles of", "choices": ["beer", "wall", "it"], "answer": n % 3} for n in range(9)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(TASK.replace("FILE", str(data)))
    checkpoint = run_folder / "checkpoints" / "last.safetensors"
    found = results_of(capsys, "--ckpt", checkpoint, "--tasks", "capitals", "--include-path", tmp_path / "tasks")[
        str(checkpoint)
    ]
    gpt, tokenizer = load_network(checkpoint)
    scorer, right, right_norm = Scorer(gpt, tokenizer), 0, 0
    for row in rows:
        pairs = [(row["question"], f" {choice}") for choice in row["choices"]]
        scores = [each.log_likelihood for each in scorer.continuations(pairs)]
        right += int(np.argmax(scores)) == row["answer"]
        lengths = map(len, row["choices"])
        right_norm += int(np.argmax([s / n for s, n in zip(scores, lengths, strict=True)])) == row["answer"]
    assert found == {"capitals/acc": right / 9, "capitals/acc_norm": right_norm / 9}


@pytest.mark.long
def test_log_likelihoods_are_those_of_the_harness_s_own_model_on_our_folder_for_transformers(run_folder, tmp_path):
    """Its HFLM cuts, batches and scores by itself; needs lm-eval too."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    checkpoint = run_folder / "checkpoints" / "last.safetensors"
    convert(checkpoint, tmp_path / "hf", to="hf")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=3, max_length=16)
    pairs = [
        ("9 bottles of", " beer"),
        ("", "on the wall"),
        ("a context that is longer than the block of", " it"),
        ("x ", "y"),
    ]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    ours = Scorer(*load_network(checkpoint)).continuations(pairs)
    for found, (expected, greedy) in zip(ours, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert found.log_likelihood == pytest.approx(expected, abs=1e-5)
        assert found.is_greedy == greedy
