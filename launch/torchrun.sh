#!/usr/bin/env bash
# Train under torchrun. Arguments are those of `python -m pangu.train`.
#
#   one node:    launch/torchrun.sh experiment=quickstart
#   more nodes:  the same command on each, with
#                NNODES=4 NODE_RANK=0 (… 3) MASTER_ADDR=<address of node 0> MASTER_PORT=29500
#   PROCESSES    processes per node, one per device (default: 8)
#   MAX_RESTARTS  how often a run that has failed is started again, from its newest checkpoint
#                (default: 0). A rank that dies or hangs, a node that comes back and starts this
#                script again, and a link that was cut are waited for. A configuration that is
#                refused is started again too: check it with python -m pangu.doctor before.
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

torchrun=(torchrun --nnodes "$NNODES" --nproc-per-node "$PROCESSES")
if [ "${MAX_RESTARTS:-0}" = 0 ]; then
	exec "${torchrun[@]}" --node-rank "$NODE_RANK" \
		--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m pangu.train "$@"
fi

# Nodes leave and come back: this rendezvous notices, on every node; the static one does not.
torchrun+=(--max-restarts "$MAX_RESTARTS" --rdzv-backend c10d --rdzv-id "${RUN_ID:-pangu}")
torchrun+=(--rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
torchrun+=(--rdzv-conf "is_host=$((NODE_RANK == 0)),read_timeout=30")
# The store that torchrun shares with its ranks outlives a start, and a node that comes back does
# not learn where it is. Without it rank 0 opens one for every start.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Torchrun itself ends where the node of the rendezvous (0) is gone, or cannot be reached.
stopped=
trap 'stopped=yes; kill -TERM "$child" 2>/dev/null || true' INT TERM HUP
for ((start = 0; start <= MAX_RESTARTS; start++)); do
	"${torchrun[@]}" -m pangu.train "$@" &
	child=$!
	code=0
	wait "$child" || code=$?
	# A signal ends the wait, not the child.
	while kill -0 "$child" 2>/dev/null; do
		code=0
		wait "$child" || code=$?
	done
	[ "$code" != 0 ] && [ -z "$stopped" ] || exit "$code"
	echo "torchrun ended with $code on node $NODE_RANK: once more" >&2
	sleep 2
done
exit "$code"
