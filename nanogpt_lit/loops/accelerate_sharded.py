"""accelerate's ways to share a network out over the processes, on CPUs too."""

import os
from typing import Any

from accelerate import Accelerator, PartialState  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
)

from nanogpt_lit.loops.contract import LoopSettings


class ShardingAccelerator(Accelerator):
    """Accelerator that shards on CPUs as well, where accelerate trains DDP in the place of FSDP and DeepSpeed without a
    word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.distributed_type != DistributedType.MULTI_CPU:
            return
        # What AcceleratorState does beside any other device. It reads the type anew from PartialState at each use.
        if (fsdp := options.get("fsdp_plugin")) is not None:
            if self.mixed_precision != "no":
                fsdp.set_mixed_precision(self.mixed_precision)
            self.state.fsdp_plugin = fsdp
            self.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        if (deepspeed := options.get("deepspeed_plugin")) is not None:
            deepspeed.select(_from_accelerator_state=True)
            self.state.deepspeed_plugins, self.deepspeed_engine_wrapped = deepspeed, None
            self.state.distributed_type = PartialState().distributed_type = DistributedType.DEEPSPEED


def deepspeed(settings: LoopSettings, config: dict[str, Any]) -> DeepSpeedPlugin:
    """accelerate's DeepSpeed. config: of DeepSpeed, but for what the settings say"""
    # What accelerate launch has said is held against the YAML already; accelerate would refuse it beside a config.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    of_settings = {
        "gradient_accumulation_steps": settings.accumulate_grad_batches,
        "gradient_clipping": settings.gradient_clip_val or 0.0,
    }
    # By force, accelerate would put another in the place of the optimizer that is to be offloaded.
    given = {"zero_force_ds_cpu_optimizer": False}
    return DeepSpeedPlugin(hf_ds_config=config | of_settings | given, zero3_init_flag=False)


def fsdp2() -> FullyShardedDataParallelPlugin:
    """accelerate's FSDP2. Every argument is given, or accelerate takes it from the environment."""
    from torch.distributed.fsdp import MixedPrecisionPolicy  # late, for not every build of torch has it

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        # The blocks are sharded already, and accelerate leaves those alone: by name it finds modules, not the methods
        # that are called in place of their forward.
        auto_wrap_policy="NO_WRAP",
        # accelerate would cast whole weights to 16 bits and add up gradients in them; autocast does neither.
        mixed_precision_policy=MixedPrecisionPolicy(),
        reshard_after_forward=True,
        cpu_offload=False,
        activation_checkpointing=False,
        activation_checkpointing_offload=False,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
