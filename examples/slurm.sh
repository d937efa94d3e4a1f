#!/usr/bin/env bash
# Trains examples/transformer.py on four nodes: sbatch examples/slurm.sh
#
# One process for each GPU. Inside srun JAX detects Slurm by itself, so nothing else need be said.
#SBATCH --job-name=transformer
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --requeue
set -euo pipefail

# JAX connects to the first node directly; a proxy in between makes it wait in vain.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# A process that dies ends the others, and srun the rest; then the job starts again.
srun --kill-on-bad-exit=1 python examples/transformer.py --distributed --mesh data=-1,tensor=8 ||
    scontrol requeue "$SLURM_JOB_ID"
