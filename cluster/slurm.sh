#!/usr/bin/env bash
#SBATCH --job-name=exl2ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --output=exl2ray-%j.log
#
# A conversion on the nodes of a SLURM allocation: a Ray cluster for the length of the job, the driver on its first node.
#
#   sbatch cluster/slurm.sh convert -i /shared/models/M -o /shared/jobs/M -cf /shared/out/M-{bpw} -b 4.0
#   sbatch --nodes=4 --time=2:00:00 cluster/slurm.sh measure -i /shared/models/M -o /shared/jobs/M
#
# All paths must be on a file system that every node mounts. Flags of sbatch on the command line win over those above.
# After preemption or a lost node SLURM starts the script again (--requeue), and the conversion goes on where it was;
# after the time limit, submit the same command again. Do not give -nr here: a requeued job would start over.
#
# Environment:
#   EXL2RAY_ACTIVATE  a file to source on the way in, such as /shared/envs/exl2ray/bin/activate
#   EXL2RAY_HEAD_IP   address of the first node, where the one that `hostname -I` names first is not the fast network's
#   EXL2RAY_PORT      port of the Ray cluster, 6379 if absent

set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch [SBATCH FLAGS] $0 convert -i MODEL -o WORKDIR ..." >&2
    exit 2
fi

if [[ -n ${EXL2RAY_ACTIVATE:-} ]]; then
    set +u # activation scripts read variables that are not set
    # shellcheck disable=SC1090
    source "$EXL2RAY_ACTIVATE"
    set -u
fi

# Ray recognises its head node by a numeric address on one of the node's interfaces. Names will not do: on many clusters
# a node's own name means 127.0.1.1 to it.
hostnames=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${hostnames%%$'\n'*}
head_ip=${EXL2RAY_HEAD_IP:-$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname -I | awk '{print $1; exit}')}
if [[ -z $head_ip ]]; then
    echo "$head_node has no address but the loopback's: name one with EXL2RAY_HEAD_IP" >&2
    exit 1
fi
address=$head_ip:${EXL2RAY_PORT:-6379}
echo "Ray head: $head_node ($address), $SLURM_JOB_NUM_NODES nodes"

# For Ray's own wait for the nodes, too: without it, it takes the address that the last Ray of anyone left in /tmp/ray.
export RAY_ADDRESS=$address
# Whoever reaches a Ray cluster's ports can run code as its user: the nodes of this job share a secret of their own. Said
# explicitly because Ray's nodes and clients otherwise disagree as soon as there is a token in ~/.ray.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
# Nodes with a cold software file system need longer than the 30 s that Ray gives them.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# A lost node is for the driver to deal with, not a reason to end the step: --no-kill, --kill-on-bad-exit=0, --wait=0. The
# first task is the head. The others write to files of their own: they notice the end by losing the head, within a minute
# and with a page of complaints.
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --no-kill --kill-on-bad-exit=0 --wait=0 \
    bash -c '((SLURM_PROCID == 0)) || exec > "exl2ray-$SLURM_JOB_ID-node$SLURM_PROCID.log" 2>&1; exec "$@"' node \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --temp-dir="/tmp/ray-$SLURM_JOB_ID" \
    -- exl2ray "$@"
