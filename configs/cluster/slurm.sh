#!/bin/bash
# A run on 2 nodes of 4 GPUs by SLURM: sbatch slurm.sh, in a folder that all nodes see.
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4         # one process for each GPU: equal to trainer.devices
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120           # two minutes before that the run saves, and has itself queued again
#SBATCH --requeue                   # after a node has failed, too
#SBATCH --open-mode=append
#SBATCH --output=gpt-%j.log

srun --kill-on-bad-exit=1 python -m nanogpt_lit fit --config gpt.yaml \
    --trainer.num_nodes 2 --trainer.devices 4 --trainer.strategy ddp \
    --trainer.default_root_dir "runs/gpt-$SLURM_JOB_ID"
