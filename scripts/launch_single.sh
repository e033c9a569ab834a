#!/usr/bin/env bash
# Train on this machine, one process for each GPU, and save in time when asked to stop.
#
#   scripts/launch_single.sh --config recipes/base.yaml data.root=/data/shards --resume auto
#   scripts/launch_single.sh --config recipes/base.yaml --devices 4 --dry_run
#
# Takes what train.py takes. --devices N: so many processes, default one a GPU; --dry_run: print the
# command, run nothing. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask the processes to save and end, which
# they do at the same step; who has not ended 60 s later (LAUNCH_STOP_SECONDS) is killed. Ctrl-C
# twice kills at once.
#
# As one of several machines, which launch_multi.sh makes it:
#   --nodes M --node_rank R --rendezvous HOST:PORT   all M run the same command but for R
#   --stop_at_eof                                    the end of stdin asks to stop, too
#   --planned N FOLDER                               what launch_plan.py said, asked by launch_multi.sh
#
# Exit status: 0 done; 75 preempted: the same command with --resume auto goes on; 2 wrong use;
# 1 failed. torchrun ends with 1 whatever its processes end with; that they saved is seen from the
# file PREEMPTED in the run's folder.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/launch_words.sh
. "$home/scripts/launch_words.sh"

dry_run=no
stop_at_eof=no
nodes=1
node_rank=0
rendezvous=
plan=
train=()
while [ $# -gt 0 ]; do
  case $1 in
    --nodes=* | --node_rank=* | --rendezvous=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --nodes | --node_rank | --rendezvous)
      [ $# -gt 1 ] && [ -n "$2" ] || fail "$1 needs a value; see --help" 2
      case $1 in --nodes) nodes=$2 ;; --node_rank) node_rank=$2 ;; *) rendezvous=$2 ;; esac
      shift
      ;;
    --planned)
      [ $# -gt 2 ] || fail "--planned needs two values; see --help" 2
      plan=$2$'\n'$3
      shift 2
      ;;
    --dry_run | --dry-run) dry_run=yes ;;
    --stop_at_eof) stop_at_eof=yes ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) train+=("$1") ;;
  esac
  shift
done
[ ${#train[@]} -gt 0 ] || fail "what shall be trained? Give a recipe: --config recipes/base.yaml; see --help" 2
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes must be at least 1, got $nodes" 2
[[ $node_rank =~ ^(0|[1-9][0-9]*)$ ]] && ((node_rank < nodes)) ||
  fail "--node_rank must be in 0..$((nodes - 1)), got $node_rank" 2
if ((nodes > 1)) && ! [[ $rendezvous =~ ^.+:[1-9][0-9]*$ ]]; then
  fail "$nodes machines need --rendezvous HOST:PORT of the first one, got '$rendezvous'" 2
fi

find_python
[ -n "$plan" ] || plan=$("$python" "$home/scripts/launch_plan.py" "${train[@]}" --nodes "$nodes") || exit # it has said why
{ read -r devices && IFS= read -r run; } <<<"$plan"

command=("$python" -m torch.distributed.run --nnodes "$nodes" --nproc_per_node "$devices")
if ((nodes > 1)); then
  # Fixed ranks: after a restart each machine reads the shards that its cache holds.
  command+=(--node_rank "$node_rank" --master_addr "${rendezvous%:*}" --master_port "${rendezvous##*:}")
else
  command+=(--standalone)
fi
command+=(-- "$home/train.py" "${train[@]}" --nodes "$nodes" --devices "$devices" --run "$run")
if [ "$dry_run" = yes ]; then
  line_of "${command[@]}"
  echo
  exit
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what torchrun chooses, too, with a paragraph about it
rm -f "$run/PREEMPTED" # of the run before: it must not speak for this one

asked= # who asked to stop: a signal's name, or EOF
interrupts=0
trap 'asked=${asked:-SIGTERM}' TERM
trap 'asked=${asked:-SIGUSR1}' USR1
trap 'asked=${asked:-SIGHUP}' HUP
trap 'asked=${asked:-Ctrl-C}; interrupts=$((interrupts + 1))' INT
trap 'asked=${asked:-EOF}' USR2

exec 3<&0
set -m # a group of its own: Ctrl-C is ours to pass on
"${command[@]}" 3<&- </dev/null &
agent=$!
set +m
watcher=
if [ "$stop_at_eof" = yes ]; then
  { while read -r _; do :; done && kill -USR2 $$; } <&3 2>/dev/null &
  watcher=$!
fi
exec 3<&-

# torchrun's children, the training processes. They are told themselves: torchrun knows no SIGUSR1,
# and kills them 30 s after a SIGTERM, which may be too soon for a large checkpoint.
ranks() {
  local pid children=()
  read -r -a children 2>/dev/null <"/proc/$agent/task/$agent/children" || true
  for pid in "${children[@]}"; do
    if grep -qsz ^LOCAL_RANK= "/proc/$pid/environ"; then echo "$pid"; fi
  done
}

# Ask once, and wait; kill when it has taken too long.
stop() {
  local pid told
  if [ -z "${deadline:-}" ]; then
    deadline=$((SECONDS + ${LAUNCH_STOP_SECONDS:-60}))
    say "$asked: the training processes save and end"
    told=$(ranks)
    # One that does not train yet ends at once; so does torchrun, if it has not started any.
    if [ -n "$told" ]; then
      for pid in $told; do kill -USR1 "$pid" 2>/dev/null || true; done
    else
      kill -TERM "$agent" 2>/dev/null || true
    fi
  elif ((SECONDS >= deadline || interrupts > 1)); then
    say "the training processes have not ended; killing them"
    for pid in $(ranks); do kill -KILL -- "-$pid" 2>/dev/null || true; done # each leads a group
    kill -KILL -- "-$agent" 2>/dev/null || true
  fi
}

while kill -0 "$agent" 2>/dev/null; do
  [ -z "$asked" ] || stop
  sleep 1 & # not at once `wait $agent`: a signal in between would not be looked at
  wait $! || true
done
status=0
wait "$agent" || status=$?
[ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true

[ "$status" != 0 ] || exit 0
if [ -e "$run/PREEMPTED" ]; then
  say "preempted ($(<"$run/PREEMPTED")); the same command with --resume auto goes on"
  exit 75
fi
case $asked in
  '' | EOF) exit 1 ;; # EOF: another machine failed, or whoever started this one is gone
esac
say "stopped by $asked and not saved; the same command with --resume auto goes on from the last checkpoint"
exit 75
