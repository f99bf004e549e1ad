"""The one thing that every loop drives: tokens and targets in, the loss out, and the optimizer that goes with it."""

from dataclasses import asdict, replace
from typing import Any, Literal

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.networks import build, check_same_network, config_of, described, section_of
from nanogpt_lit.loops.compatibility import check_together, keys_of
from nanogpt_lit.memory.elastic import ElasticConfig
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques, optimizer_class
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.optim.schedule import ScheduleConfig, WarmupDecay


class LitNanoGPT(LightningModule):
    """NanoGPT as a LightningModule.

    `forward(tokens, targets) -> mean loss` and `configure_optimizers()` are the whole contract with a loop. Neither
    reads the Trainer, so that accelerate or plain PyTorch can drive the same object.

    Args:
        gpt: The shape of a GPT-2.
        optim: The optimizer.
        schedule: The learning rate over the run.
        memory: Ways to need less memory. Checkpoints are the same with and without.
        elastic: What to do when memory ends while it trains.
        compile: Compile the network and its loss with torch.compile: slower to start, the first time above all, and
            faster per step where it pays. Needs a C++ compiler, or Triton on a GPU. Checkpoints are the same.
        tf32: Let a GPU's products of float32 matrices round what they multiply to 10 bits, as GPUs since Ampere do
            several times as fast; 16-mixed and bf16-mixed gain nothing by it.
        network: gpt2, or llama for the Llama family; the section of the other one is not read.
        llama: The shape of a network of the Llama family.
    """

    def __init__(
        self,
        gpt: GPTConfig = GPTConfig(),  # noqa: B008 - frozen
        optim: AdamWConfig = AdamWConfig(),  # noqa: B008
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        compile: bool = False,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008
        elastic: ElasticConfig = ElasticConfig(),  # noqa: B008
        tf32: bool = False,
        network: Literal["gpt2", "llama"] = "gpt2",
        llama: LlamaConfig = LlamaConfig(),  # noqa: B008
    ) -> None:
        super().__init__()
        # load_from_checkpoint() hands back what is saved here: plain dicts, which torch.load accepts with weights_only.
        model: dict[str, Any] = {"network": network, "gpt": gpt, "llama": llama}
        shape = config_of(model) if isinstance(model[section_of(model)], dict) else model[section_of(model)]
        optim = AdamWConfig(**optim) if isinstance(optim, dict) else optim
        schedule = ScheduleConfig(**schedule) if isinstance(schedule, dict) else schedule
        memory = MemoryConfig(**memory) if isinstance(memory, dict) else memory
        elastic = ElasticConfig(**elastic) if isinstance(elastic, dict) else elastic
        configs: dict[str, Any] = {"optim": optim, "schedule": schedule, "memory": memory, "elastic": elastic}
        kept = {name: asdict(config) for name, config in configs.items()} | {"compile": compile, "tf32": tf32}
        self.save_hyperparameters(described(shape) | kept)
        check_together(keys_of("model", self.hparams))
        self.tf32 = tf32
        self.optim_config = optim
        self.schedule_config = schedule
        self._wanted_total_steps = schedule.total_steps
        self.memory_config = memory
        self.elastic_config = elastic
        self.gpt = build(shape)
        apply_techniques(self.gpt, memory)
        self.loss = self.gpt.compiled_loss() if compile else self.gpt.loss
        self.fallback: dict[str, Any] = {}
        """The fallbacks that a run came to need when its memory ended; see memory/elastic.py."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, a scalar in float32. tokens, targets: (B, T) int64.

        Not logits: accelerate copies every output of forward to float32, which for 4 x 1024 logits of GPT-2 is 0.8 GB.
        """
        return self.loss(tokens, targets)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(*batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self(*batch), batch_size=batch[0].size(0), sync_dist=True)
        # A metric of this name becomes the x axis: optimizer steps, in place of Lightning's own count.
        self.log("step", float(self.global_step), reduce_fx="max", batch_size=1, sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self(*batch), batch_size=batch[0].size(0), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optimizer = build_optimizer(self.named_parameters(), self.optim_config, optimizer_class(self.memory_config))
        schedule = WarmupDecay(optimizer, self.schedule_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def decay_over(self, steps: int) -> None:
        """Have the learning rate decay over the steps of a Trainer, if the schedule was given no total_steps."""
        if self._wanted_total_steps is None:
            self.schedule_config = replace(self.schedule_config, total_steps=steps)
            self.hparams["schedule"]["total_steps"] = steps
        elif self._wanted_total_steps != steps:
            rank_zero_warn(
                f"ScheduleConfig has total_steps={self._wanted_total_steps} and the Trainer max_steps={steps}: the "
                "learning rate is made for a run of another length. Without total_steps it decays over this one."
            )

    def configure_model(self) -> None:
        """Shards the network over the processes where Lightning's ModelParallelStrategy offers a device mesh."""
        if self.device_mesh is not None:
            from nanogpt_lit.loops.sharded import shard  # late, for few runs are sharded

            shard(self, self.device_mesh)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_network(checkpoint["hyper_parameters"], self.hparams)
