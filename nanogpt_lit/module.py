"""The one thing that every loop drives: tokens and targets in, the loss out, and the optimizer that goes with it."""

from dataclasses import asdict
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import AdamW

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.model import GPT, GPTConfig, config_of_checkpoint
from nanogpt_lit.loops.compatibility import FSDP2, check_together, keys_of
from nanogpt_lit.memory.elastic import ElasticConfig
from nanogpt_lit.memory.host_optimizer import HostAdamW, HostResidentAdamW
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.optim.schedule import ScheduleConfig, WarmupDecay


class LitNanoGPT(LightningModule):
    """NanoGPT as a LightningModule.

    `forward(tokens, targets) -> mean loss` and `configure_optimizers()` are the whole contract with a loop. Neither
    reads the Trainer, so that accelerate or plain PyTorch can drive the same object.

    Args:
        gpt: The network.
        optim: The optimizer.
        schedule: The learning rate over the run.
        memory: Ways to need less memory. Checkpoints are the same with and without.
        elastic: What to do when memory ends while it trains.
        compile: Compile the network and its loss with torch.compile: slower to start (less so the next time: torch
            keeps what it compiled), and faster per step where it pays. Needs a C++ compiler, or Triton on a GPU.
            Checkpoints are the same with and without.
        tf32: Let a GPU's products of float32 matrices round what they multiply to 10 bits, as cards since Ampere do
            several times as fast. The precision 16-mixed and bf16-mixed gain nothing by it.
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
    ) -> None:
        super().__init__()
        # load_from_checkpoint() hands back what is saved here: plain dicts, which torch.load accepts with weights_only.
        gpt = config_of_checkpoint(gpt) if isinstance(gpt, dict) else gpt
        optim = AdamWConfig(**optim) if isinstance(optim, dict) else optim
        schedule = ScheduleConfig(**schedule) if isinstance(schedule, dict) else schedule
        memory = MemoryConfig(**memory) if isinstance(memory, dict) else memory
        elastic = ElasticConfig(**elastic) if isinstance(elastic, dict) else elastic
        configs: dict[str, Any] = {"gpt": gpt, "optim": optim, "schedule": schedule, "memory": memory}
        configs["elastic"] = elastic
        plain = {"compile": compile, "tf32": tf32}
        self.save_hyperparameters({name: asdict(config) for name, config in configs.items()} | plain)
        check_together(keys_of("model", self.hparams))
        self.tf32 = tf32
        self.optim_config = optim
        self.schedule_config = schedule
        self.memory_config = memory
        self.elastic_config = elastic
        self.gpt = GPT(gpt)
        self.host_weights = apply_techniques(self.gpt, memory)
        self.loss = torch.compile(self.gpt.loss) if compile else self.gpt.loss
        self.fallback: dict[str, Any] = {}
        """What a run came to need when its memory ended; see elastic.py."""

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
        adamw = HostAdamW if self.memory_config.optimizer_state == "host" else AdamW
        if self.host_weights is not None:
            adamw = HostResidentAdamW
        optimizer = build_optimizer(self.named_parameters(), self.optim_config, adamw)
        if self.host_weights is not None:
            self.host_weights.follow(optimizer)
        schedule = WarmupDecay(optimizer, self.schedule_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        """Shards the network over the processes when Lightning's ModelParallelStrategy offers a device mesh.

        FSDP2: each process keeps its share of every weight, gradient and optimizer state; a block is whole only while
        it computes. Raises UserError for a mesh that divides single matrices.
        """
        if self.device_mesh is None:
            return
        # Not every build of torch has torch.distributed.
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if isinstance(self.gpt, FSDPModule):
            return  # Lightning asks before every fit, validate and test
        sizes = {"trainer.strategy.tensor_parallel_size": self.device_mesh["tensor_parallel"].size()}
        check_together({**keys_of("model", self.hparams), "trainer.strategy": FSDP2, **sizes})
        mesh = self.device_mesh["data_parallel"]
        for block in self.gpt.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.gpt, mesh=mesh)
        for method in ("loss", "hidden"):  # what is called in place of forward
            register_fsdp_forward_method(self.gpt, method)
        self.loss = torch.compile(self.gpt.loss) if self.hparams["compile"] else self.gpt.loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = asdict(config_of_checkpoint(checkpoint["hyper_parameters"]["gpt"]))
        differing = [
            f"{name} is {saved[name]} there and {value} here"
            for name, value in self.hparams["gpt"].items()
            if saved[name] != value and name not in ("dropout", "document_start")
        ]
        if differing:
            raise UserError(
                f"The checkpoint holds another network: model.gpt.{', '.join(differing)}; "
                "use the YAML that it was trained with."
            )
