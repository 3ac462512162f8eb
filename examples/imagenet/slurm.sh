#!/bin/bash
# Pre-training on several nodes of a SLURM cluster:
#
#   sbatch --nodes 2 --gpus-per-node 8 examples/imagenet/slurm.sh --folder /shared/runs/imagenet --root /shared/imagenet
#
# What follows the script's name goes to pretrain.py; the folders have to be on a file system that every node sees.
# Before the time limit the run saves and the job goes back into the queue, until the run is finished. After the loss
# of a node or of a process it goes on from its last checkpoint by itself.

#SBATCH --job-name=cgh
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cgh-%j.out

set -euo pipefail

# SLURM runs a copy of this script, so the project is where the job was submitted.
project=${CGH_PROJECT:-$SLURM_SUBMIT_DIR}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Five minutes before the limit SLURM signals this shell, which hands it on to the processes of the job's steps.
interrupted=
trap 'interrupted=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# The trap keeps torchrun, which would die of the signal, out of it; the processes that it starts set their own.
# shellcheck disable=SC2016  # $@ and SLURM's variables are those of each node
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec torchrun "$@"' torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" \
    --max-restarts=3 \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint="$first_node:29500" \
    "$project/examples/imagenet/pretrain.py" "$@" &
step=$!

# A trapped signal ends a wait early, so wait until the step itself has ended.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

if [[ -n $interrupted && $status -eq 0 ]]; then
    echo "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
