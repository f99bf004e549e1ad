import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from nanogpt_lit.data.datamodule import Batch, TokenDataModule, TokenWindows
from nanogpt_lit.data.prepare import PrepareConfig, prepare
from nanogpt_lit.data.sampler import BatchOrder, StreamPosition
from nanogpt_lit.data.shards import TokenShards

T, B = 8, 3
STREAM = np.random.default_rng(0).integers(0, 257, size=1000)


@pytest.fixture
def ready(tmp_path) -> Path:
    """nanoGPT's two files, which need no preparation."""
    folder = tmp_path / "ready"
    folder.mkdir()
    STREAM.astype("<u2").tofile(folder / "train.bin")
    STREAM[::-1][:210].astype("<u2").tofile(folder / "val.bin")
    return folder


def data_of(ready: Path, **changes) -> TokenDataModule:
    settings = {"tokenizer": "byte", "block_size": T, "batch_size": B, "shards_dir": str(ready.parent / "shards")}
    data = TokenDataModule(**({"source": str(ready)} | settings | changes))
    data.prepare_data()
    data.setup("fit")
    return data


def naive_batches(first: int, n: int, rank: int = 0, world: int = 1, seed: int = 1337) -> list[Batch]:
    """The batches, from the order of samples and a slice per window."""
    order = BatchOrder(len(STREAM), T, B, seed, StreamPosition())
    batches = []
    for k in range(first, first + n):
        samples = [(k * world + rank) * B + b for b in range(B)]
        starts = [int(order.window_starts(np.array([sample]))[0]) for sample in samples]
        tokens = torch.tensor([STREAM[s : s + T].tolist() for s in starts])
        targets = torch.tensor([STREAM[s + 1 : s + 1 + T].tolist() for s in starts])
        batches.append((tokens, targets))
    return batches


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


def drawn(data: TokenDataModule, n: int) -> list[Batch]:
    return list(islice(data.train_dataloader(), n))


# Batches without a Trainer -------------------------------------------------------------------------------------------


def test_batches_equal_a_naive_loop(ready):
    batches = drawn(data_of(ready), 100)  # more than two epochs of 41 batches
    assert equal(batches, naive_batches(0, 100))
    for tensor in batches[0]:
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((B, T), torch.int64, True)


def test_a_loop_of_ones_own_states_rank_world_and_first_batch(ready):
    data = data_of(ready)
    data.position = StreamPosition(rank=1, world=2, batches_done=lambda: 7)
    assert equal(drawn(data, 10), naive_batches(7, 10, rank=1, world=2))


def test_a_loader_that_is_started_again_goes_on_behind_the_batches_that_were_trained_on(ready):
    done = 0
    data = data_of(ready)
    data.position = StreamPosition(batches_done=lambda: done)
    loader = data.train_dataloader()
    for _ in range(3):  # three short epochs of a loop that keeps its loader
        assert equal(list(islice(loader, 5)), naive_batches(done, 5))
        done += 5


def test_iterating_leaves_the_global_random_state_alone(ready):
    data = data_of(ready)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn(data, 5)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_spawned_process_receives_is_small_and_serves_the_same(ready):
    dataset = data_of(ready).train_dataloader().dataset
    before = dataset.__getitems__([0, 500])
    sent = pickle.dumps(dataset)
    assert len(sent) < 2000
    received = pickle.loads(sent)
    assert isinstance(received, TokenWindows)
    assert equal([received.__getitems__([0, 500])], [before])


def test_validation_reads_every_window_once_and_test_reads_the_same(ready):
    data = data_of(ready, seed=1)
    val = list(data.val_dataloader())
    assert len(val) == len(data.val_dataloader()) == 9  # (210 - 1) // 8 = 26 windows, the last batch has 2 of 3
    stream = STREAM[::-1][:210]
    windows = {tuple(row.tolist()) for tokens, _ in val for row in tokens}
    assert windows == {tuple(stream[s : s + T].tolist()) for s in range(0, 209 - T + 1, T)}
    assert equal(val, list(data.test_dataloader()))
    assert equal(val, list(data_of(ready, seed=2).val_dataloader()))


# Under the Trainer ---------------------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Trains one number and keeps every batch it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Batch] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch[0][:, 0].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(data: TokenDataModule, folder: Path, max_steps: int, ckpt_path: Path | None = None, **changes) -> Recorder:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": "callbacks" in changes,
        "use_distributed_sampler": False,
        "accumulate_grad_batches": 2,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    recorder = Recorder()
    Trainer(**(settings | changes), max_steps=max_steps).fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("epochs_of", [1.0, 4, 6])
def test_a_run_stopped_at_step_3_and_resumed_sees_the_batches_of_an_uninterrupted_one(ready, tmp_path, epochs_of):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first = fit(data_of(ready), tmp_path, 3, callbacks=[save], limit_train_batches=epochs_of)
    assert equal(first.seen, naive_batches(0, 6))
    resumed = fit(
        data_of(ready),
        tmp_path,
        20,
        ckpt_path=tmp_path / "step=3.ckpt",
        limit_train_batches=epochs_of,
    )
    assert equal(resumed.seen, naive_batches(6, 34))


@pytest.mark.filterwarnings("ignore")
def test_several_epochs_of_lightnings_continue_instead_of_replaying(ready, tmp_path):
    recorder = fit(data_of(ready), tmp_path, 15, limit_train_batches=10)
    assert equal(recorder.seen, naive_batches(0, 30))


@pytest.mark.filterwarnings("ignore")
def test_limited_validation_reads_the_same_windows_every_time(ready, tmp_path):
    recorder = fit(
        data_of(ready),
        tmp_path,
        4,
        limit_val_batches=2,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    assert len(recorder.validated) == 4
    assert recorder.validated[:2] == recorder.validated[2:]


@pytest.mark.filterwarnings("ignore")
def test_a_run_interrupted_inside_a_batch_trains_on_that_batch_again(ready, tmp_path):
    class Interrupted(Recorder):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if len(self.seen) == 4:
                raise RuntimeError("power")
            return super().training_step(batch, batch_idx)

    data = data_of(ready)
    save = ModelCheckpoint(tmp_path, filename="cut", save_on_exception=True)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=5,
        accumulate_grad_batches=2,
        callbacks=[save],
        logger=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    with pytest.raises(RuntimeError, match="power"):
        trainer.fit(Interrupted(), datamodule=data)
    resumed = fit(data_of(ready), tmp_path, 4, ckpt_path=tmp_path / "cut.ckpt")
    assert equal(resumed.seen, naive_batches(4, 4))


def test_lightnings_own_sampler_is_refused_in_a_sentence(ready):
    with pytest.raises(ValueError, match=r"trainer.use_distributed_sampler=true .* set it to false"):
        torch.utils.data.DistributedSampler(data_of(ready).train_dataloader().dataset, num_replicas=2, rank=0)


# What a checkpoint keeps ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_tokenizer_is_refused(ready):
    state = data_of(ready, tokenizer="gpt2").state_dict()
    with pytest.raises(ValueError, match=r"trained with another tokenizer than byte .* data.tokenizer"):
        data_of(ready).load_state_dict(state)


def test_resuming_with_another_order_of_samples_says_so(ready):
    state = data_of(ready).state_dict()
    data_of(ready).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"data.seed was 1337 and is 7"):
        data_of(ready, seed=7).load_state_dict(state)


def test_the_state_is_plain_and_safe_to_load(ready, tmp_path):
    torch.save(data_of(ready).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {k: state[k] for k in ("block_size", "batches", "seed")} == {"block_size": T, "batches": 0, "seed": 1337}
    assert "byte" in state["tokenizer"]["tokenizer.json"]


# From text -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(20):
        (folder / f"{n}.txt").write_text(f"Document {n}. " * 30)
    return folder


def test_text_is_prepared_once_and_again_with_a_reason_when_something_changed(text, capsys):
    settings = {"source": str(text), "val_fraction": 0.2}
    data = data_of(text, **settings)
    assert data.vocab_size == 257
    assert "preparing" in capsys.readouterr().out
    assert data.tokenizer.decode(data.train_dataloader().dataset.shards.read(1, 11)) == "Document 1."
    assert equal(drawn(data_of(text, **settings), 5), drawn(data, 5))
    assert capsys.readouterr().out == ""
    assert data_of(text, **settings, tokenizer="char").tokenizer.name == "char"
    assert "another tokenizer: byte, now char; preparing" in capsys.readouterr().out


def test_a_folder_of_our_shards_is_a_source_with_its_own_tokenizer(text, tmp_path):
    prepare(PrepareConfig(str(text), "char", val_fraction=0.2), tmp_path / "made", show_progress=False)
    data = data_of(text, source=str(tmp_path / "made"), tokenizer="gpt2")
    assert data.tokenizer.name == "char"
    assert data.tokenizer.decode(data.train_dataloader().dataset.shards.read(1, 11)) == "Document 1."
    assert not (tmp_path / "shards").exists()
    (tmp_path / "made" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the one its shards were made with"):
        data_of(text, source=str(tmp_path / "made"))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("block_size", 0), ("batch_size", 0), ("val_fraction", 1.5)])
def test_values_that_cannot_work_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"data\.{key}={value}"):
        TokenDataModule(**{key: value})


def test_a_block_longer_than_the_shards_is_refused_when_the_data_is_prepared(ready):
    with pytest.raises(ValueError, match=r"data.block_size=210 is a block longer .* 'val' has 210"):
        data_of(ready, block_size=210)


def test_foreign_shards_beyond_the_tokenizer_are_refused_when_the_data_is_prepared(ready):
    tokens = STREAM.copy()
    tokens[700] = 300
    tokens.astype("<u2").tofile(ready / "train.bin")
    with pytest.raises(ValueError, match=r"train.bin needs a vocabulary of 301, its tokenizer has 257"):
        data_of(ready)
    assert data_of(ready, tokenizer="gpt2").vocab_size == 50257
    assert sorted(p.name for p in ready.iterdir()) == ["train.bin", "val.bin"]


@pytest.mark.parametrize("tokenizer", ["char", "bpe:500"])
def test_foreign_shards_need_a_tokenizer_that_is_not_made_from_text(ready, tokenizer):
    with pytest.raises(ValueError, match=rf"data.tokenizer={tokenizer} is made from text"):
        data_of(ready, tokenizer=tokenizer)


def test_a_model_with_a_smaller_vocabulary_is_refused(ready):
    data = data_of(ready)
    data.check_vocabulary(257, "model.llama.vocab_size")
    data.check_vocabulary(320, "model.llama.vocab_size")
    with pytest.raises(ValueError, match=r"model.llama.vocab_size=256 is smaller than the 257"):
        data.check_vocabulary(256, "model.llama.vocab_size")


def test_an_id_that_appears_during_training_is_reported_not_trained_on(ready):
    data = data_of(ready)
    with (ready / "train.bin").open("r+b") as file:
        file.seek(2 * 500)
        file.write(b"\xff\xff")
    assert isinstance(data.train_dataloader().dataset.shards, TokenShards)
    with pytest.raises(ValueError, match=r"train.bin holds token id 65535 at position 500"):
        drawn(data, 100)
