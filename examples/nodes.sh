#!/bin/bash
# A recipe on several nodes by plain ssh, as many processes a node as NPROC says:
#
#   HOSTS="alpha beta" NPROC=8 examples/nodes.sh my-recipe.yaml
#
# Every node has the same folder (a shared file system) and the same environment. The first host leads. A node that fails
# ends the others.
set -euo pipefail

read -ra hosts <<< "${HOSTS:?name the nodes, e.g. HOSTS=\"alpha beta\"}"
port=${MASTER_PORT:-29500}
arguments=$(printf '%q ' "$@")
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
for rank in "${!hosts[@]}"; do
  ssh "${hosts[$rank]}" "cd $(printf '%q' "$PWD") && exec torchrun --nnodes=${#hosts[@]} --node-rank=$rank \
    --nproc-per-node=${NPROC:-1} --master-addr=${hosts[0]} --master-port=$port -m rlmm.cli run $arguments" &
done
for _ in "${hosts[@]}"; do
  wait -n
done
