#!/usr/bin/env bash
# Trains examples/many_devices.py on four nodes: sbatch examples/slurm.sh
#
# One process for each GPU. Inside srun JAX detects Slurm by itself, so nothing else need be said.
#SBATCH --job-name=many-devices
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# JAX connects to the first node directly; a proxy in between makes it wait in vain.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# A process that dies ends the others, and srun the rest. Two minutes before the end Slurm sends SIGTERM: the run is
# saved then and ends with 143, and starts again to go on from there.
status=0
srun --kill-on-bad-exit=1 python examples/many_devices.py --distributed --mesh data=-1,fsdp=8 || status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
