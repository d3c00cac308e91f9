#!/usr/bin/env bash
# Train under msrun, the launcher of the mindspore package, which may live in an environment of
# its own: MSRUN=/path/to/msrun. It starts `python` from PATH: activate the trainer's environment.
# Arguments are those of `python -m pangu.train`.
#
#   one node:    launch/msrun.sh experiment=quickstart
#   more nodes:  the same command on each, with
#                NNODES=4 NODE_RANK=0 (… 3) MASTER_ADDR=<address of node 0> MASTER_PORT=8118
#   PROCESSES    processes per node, one per device (default: 8)
#   LOG_DIR      output of each process, as worker_N.log (default: logs)
set -euo pipefail

PROCESSES=${PROCESSES:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
# msrun meets on this port and torch on the next one: both must be free on node 0.
MASTER_PORT=${MASTER_PORT:-8118}
# msrun does not tell a process how many others share its node.
export LOCAL_WORLD_SIZE=$PROCESSES

# What NPUs want; without effect elsewhere. `python -m pangu.doctor` explains each.
# `source …/set_env.sh` of CANN comes before this script.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200} # seconds; CANN's 120 is short for many ranks
export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
# With several network cards, name the one between the nodes:
# export HCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

[ "$NODE_RANK" != 0 ] || python -m launch.port "$MASTER_PORT" "$((MASTER_PORT + 1))"

# Without --node_rank msrun sets no RANK_ID, and without --join it returns at once.
exec "${MSRUN:-msrun}" --worker_num $((PROCESSES * NNODES)) --local_worker_num "$PROCESSES" \
	--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
	--log_dir "${LOG_DIR:-logs}" --join True python -m pangu.train "$@"
