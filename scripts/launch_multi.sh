#!/usr/bin/env bash
# Train on several machines over ssh, one process for each GPU of each; ends all when one fails.
#
#   scripts/launch_multi.sh --hosts hosts.txt --config recipes/base.yaml data.root=/fsx/shards --resume auto
#   scripts/launch_multi.sh --hosts hosts.txt --devices 8 --config recipes/base.yaml --dry_run
#
# hosts.txt has a line for each machine, as ssh takes it: a name, an address, or user@name; # begins
# a comment. The first is where the processes meet, on --port (default 29500), so the others have to
# reach it under that name. On each machine the project and its .venv have to be at the same path as
# here, and so the recipe, the data (or its S3 URL) and, best, the run's folder: a shared file system.
# ssh must ask for nothing (keys, known hosts). On each it starts
#
#   scripts/launch_single.sh --nodes M --node_rank R --rendezvous FIRST:PORT ...
#
# Takes what train.py takes, and
#   --devices N         processes on each machine; default one for each GPU that is here
#   --env NAME=VALUE    set there, too; may be repeated (no secrets: all users there can read them)
#   --dry_run           print every command, run none
#
# SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask all processes to save and end; so does the end of this
# program, whatever ends it. Exit status: as launch_single.sh; 75 where any machine said so.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/launch_words.sh
. "$home/scripts/launch_words.sh"

dry_run=no
file=
port=29500
environment=()
train=()
while [ $# -gt 0 ]; do
  case $1 in
    --hosts=* | --port=* | --env=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --hosts | --port | --env)
      [ $# -gt 1 ] && [ -n "$2" ] || fail "$1 needs a value; see --help" 2
      case $1 in --hosts) file=$2 ;; --port) port=$2 ;; *) environment+=("$2") ;; esac
      shift
      ;;
    --nodes | --nodes=* | --node_rank* | --rendezvous*)
      fail "$1: the machines are those of the hosts file" 2
      ;;
    --dry_run | --dry-run) dry_run=yes ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) train+=("$1") ;;
  esac
  shift
done
[ -n "$file" ] || fail "which machines? Give a hosts file: --hosts hosts.txt; see --help" 2
[ -r "$file" ] && [ ! -d "$file" ] || fail "there is no hosts file $file" 2
[ ${#train[@]} -gt 0 ] || fail "what shall be trained? Give a recipe: --config recipes/base.yaml; see --help" 2
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] && ((port < 65536)) || fail "--port must be in 1..65535, got $port" 2
for pair in "${environment[@]}"; do
  [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env needs NAME=VALUE, got $(quote "$pair")" 2
done

hosts=()
number=0
while IFS= read -r line || [ -n "$line" ]; do
  number=$((number + 1))
  line=${line%%#*}
  read -r host rest <<<"${line%$'\r'}" || true
  [ -n "$host" ] || continue
  # What ssh would take for an option, or a shell for more than a word, is no name of a machine.
  [[ -z $rest && $host =~ ^[A-Za-z0-9_][A-Za-z0-9@._:%-]*$ ]] ||
    fail "$file, line $number: $(quote "$line") is no machine; write one name, address or user@name" 2
  [[ " ${hosts[*]} " != *" $host "* ]] || fail "$file, line $number: $host stands there twice" 2
  hosts+=("$host")
done <"$file"
[ ${#hosts[@]} -gt 0 ] || fail "$file names no machine" 2
nodes=${#hosts[@]}

find_python
plan=$("$python" "$home/scripts/launch_plan.py" "${train[@]}" --nodes "$nodes") || exit # it has said why
{ read -r devices && IFS= read -r run; } <<<"$plan"

# What the machine of a number runs, as a word for its shell.
on_machine() { # number
  local command=("$home/scripts/launch_single.sh" --nodes "$nodes" --node_rank "$1"
    --rendezvous "${hosts[0]##*@}:$port" --planned "$devices" "$run"
    --stop_at_eof "${train[@]}")
  [ -z "${PYTHON:-}" ] || command=("PYTHON=$PYTHON" "${command[@]}")
  if ((${#environment[@]})) || [ -n "${PYTHON:-}" ]; then
    command=(env "${environment[@]}" "${command[@]}")
  fi
  printf 'cd %s && exec %s' "$(quote "$PWD")" "$(line_of "${command[@]}")"
}
# A machine that is gone is noticed within a minute.
ssh=(ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)

if [ "$dry_run" = yes ]; then
  for ((i = 0; i < nodes; i++)); do
    line_of "${ssh[@]}" "${hosts[i]}" "$(on_machine "$i")"
    printf '\n  there: %s\n' "$("$home/scripts/launch_single.sh" --nodes "$nodes" --node_rank "$i" \
      --rendezvous "${hosts[0]##*@}:$port" --planned "$devices" "$run" --dry_run "${train[@]}")"
  done
  exit
fi

folder=$(mktemp -d "${TMPDIR:-/tmp}/launch_multi.XXXXXX")
trap 'rm -rf "$folder"' EXIT
asked=
trap 'asked=${asked:-SIGTERM}' TERM
trap 'asked=${asked:-SIGUSR1}' USR1
trap 'asked=${asked:-SIGHUP}' HUP
trap 'asked=${asked:-Ctrl-C}' INT

# Each ssh reads a pipe whose writing end this program holds: what closes it, be it the program's
# death, asks the machines to stop, which a signal to ssh would not.
mkfifo "$folder/stop"
exec {hold}<>"$folder/stop"

prefix() { # lines with the machine's name, so that one knows who complains
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '%s: %s\n' "$1" "$line"; done
}
pids=()
for ((i = 0; i < nodes; i++)); do
  (
    trap '' TERM USR1 HUP INT # ssh ends when the machine does
    exec <"$folder/stop" {hold}>&-
    exec "${ssh[@]}" "${hosts[i]}" "$(on_machine "$i")" \
      > >(prefix "${hosts[i]}") 2> >(prefix "${hosts[i]}" >&2)
  ) &
  pids+=($!)
done

deadline=
stop() { # closes the pipe, once
  [ -z "$deadline" ] || return 0
  say "$1; asking all machines to save and end"
  exec {hold}>&-
  deadline=$((SECONDS + ${LAUNCH_STOP_SECONDS:-60} + 30))
}

failed=0 # status of the machine that failed first
preempted=no
left=$nodes
while ((left)); do
  [ -z "$asked" ] || stop "$asked"
  sleep 1 & # not at once `wait`: a signal in between would not be looked at
  wait $! || true
  for i in "${!pids[@]}"; do
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    status=0
    wait "${pids[i]}" || status=$?
    unset "pids[i]"
    left=$((left - 1))
    case $status in
      0) continue ;;
      75) preempted=yes ;;
      255) say "${hosts[i]} could not be reached, or the connection broke" ;;
      *) say "${hosts[i]} failed with status $status" ;;
    esac
    [ "$failed" != 0 ] || failed=$status
    ((left == 0)) || stop "${hosts[i]} has ended with status $status"
  done
  if [ -n "$deadline" ] && ((SECONDS >= deadline)); then
    for i in "${!pids[@]}"; do
      say "${hosts[i]} has not ended; giving up on it: look there for train.py"
      kill -KILL "${pids[i]}" 2>/dev/null || true
    done
  fi
done
[ "$preempted" = no ] || failed=75
if [ -n "$asked" ] && [ "$failed" != 0 ]; then failed=75; fi # asked before there was a step to save
[ "$failed" != 75 ] || say "preempted; the same command with --resume auto goes on"
exit "$failed"
