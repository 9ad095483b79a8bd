#!/bin/bash
# A recipe on several nodes by plain ssh, as many processes a node as NPROC says:
#
#   HOSTS="alpha beta" NPROC=8 examples/nodes.sh my-recipe.yaml
#
# Every node has the same folder (a shared file system) and the same environment. The first host leads. A node that fails
# ends the others. When this script ends, by a signal or however, every node is asked to stop: it saves its step.
set -euo pipefail

read -ra hosts <<< "${HOSTS:?name the nodes, e.g. HOSTS=\"alpha beta\"}"
port=${MASTER_PORT:-29500}
arguments=$(printf '%q ' "$@")

# A pipe that this script alone holds open for writing: its end is the end of every ssh's input.
pipe=$(mktemp -d)
mkfifo "$pipe/held"
exec 3<> "$pipe/held" 4< "$pipe/held" 5> "$pipe/held" 3>&-
rm -r "$pipe"

finish() {
  trap '' EXIT HUP USR1
  trap 'kill $(jobs -p) 2> /dev/null || true' INT TERM # a second one: do not wait for them
  exec 5>&-
  wait
}
trap finish EXIT
for name in HUP:129 INT:130 TERM:143 USR1:138; do trap "exit ${name#*:}" "${name%:*}"; done

# On a node: torchrun, and beside it what sends it SIGTERM when the input ends.
start="me=\$\$; exec 4<&0; { read -r _ <&4; kill -TERM \$me; } > /dev/null 2>&1 & exec torchrun"
settings="--nnodes=${#hosts[@]} --nproc-per-node=${NPROC:-1} --master-addr=${hosts[0]} --master-port=$port \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=600"
for rank in "${!hosts[@]}"; do
  ssh "${hosts[$rank]}" "cd $(printf '%q' "$PWD") || exit; $start $settings --node-rank=$rank -m rlmm.cli run $arguments \
    < /dev/null 4<&-" <&4 4<&- 5>&- &
done
for _ in "${hosts[@]}"; do
  wait -n
done
