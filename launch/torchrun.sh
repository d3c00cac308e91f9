#!/usr/bin/env bash
# Train under torchrun. Arguments are those of `python -m pangu.train`.
#
#   one node:    launch/torchrun.sh experiment=quickstart
#   more nodes:  the same command on each, with
#                NNODES=4 NODE_RANK=0 (… 3) MASTER_ADDR=<address of node 0> MASTER_PORT=29500
#   PROCESSES    processes per node, one per device (default: 8)
set -euo pipefail

PROCESSES=${PROCESSES:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

# What NPUs want; without effect elsewhere. `python -m pangu.doctor` explains each.
# `source …/set_env.sh` of CANN comes before this script.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200} # seconds; CANN's 120 is short for many ranks
export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
# With several network cards, name the one between the nodes:
# export HCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

# Node 0 listens; in use, the port is a sentence here and pages of traceback later.
[ "$NODE_RANK" != 0 ] || python -m launch.port "$MASTER_PORT"

exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$PROCESSES" \
	--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m pangu.train "$@"
