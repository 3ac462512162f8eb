#!/bin/bash
# Pre-training on several nodes of a SLURM cluster:
#
#   sbatch --nodes 2 --gpus-per-node 8 examples/imagenet/slurm.sh --folder /shared/runs/imagenet --root /shared/imagenet
#
# What follows the script's name goes to pretrain.py; the folders have to be on a file system that every node sees.
# Before the time limit the run saves and the job goes back into the queue, until the run is finished. After the loss
# of a process it goes on from its last checkpoint by itself; after the loss of a node SLURM queues the job again.

#SBATCH --job-name=cgh
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cgh-%j.out

set -uo pipefail

# Return the status of a background process once it has ended: a trapped signal only interrupts a wait.
await() {
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
    wait "$1"
}

# One node's torchrun. It would die of USR1, which its children, the ranks, are to get.
node() {
    (trap '' USR1 && exec torchrun "$@") &
    agent=$!
    trap 'pkill -USR1 -P "$agent"' USR1
    trap 'kill -TERM "$agent"' TERM
    await "$agent"
}
export -f await node

# SLURM runs a copy of this script, so the project is where the job was submitted from.
project=${CGH_PROJECT:-$SLURM_SUBMIT_DIR}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'node "$@"' node \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-gpu}" \
    --max-restarts=3 \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint="$first_node:29500" \
    "$project/examples/imagenet/pretrain.py" "$@" &
step=$!

# Five minutes before the time limit SLURM signals this shell, which hands it on to the nodes.
interrupted=
trap 'interrupted=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

await "$step"
status=$?
if [[ -n $interrupted && $status -eq 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
