#!/usr/bin/env bash
# Stop the SLURM that scripts/slurm_up.sh started, end its jobs, and remove its files.
#
#   scripts/slurm_down.sh [FOLDER]     default: $SHARDSTREAM_SLURM, which slurm_up.sh exports
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
folder=${1:-${SHARDSTREAM_SLURM:?slurm_down: name the folder of the SLURM to stop}}
if [ ! -e "$folder/slurm_up" ]; then
  echo "slurm_down: $folder was not made by slurm_up.sh" >&2
  exit 2
fi
export SLURM_CONF=$folder/slurm.conf
# Jobs first: their processes would outlive the daemons.
if [ -e "$folder/node1.pid" ]; then
  jobs=$(timeout 10 squeue --noheader --format=%A 2>/dev/null) || jobs=
  for job in $jobs; do
    timeout 10 scancel --signal=KILL --full "$job" 2>/dev/null || true
    timeout 10 scancel "$job" 2>/dev/null || true
  done
  for _ in $(seq 100); do
    [ -n "$jobs" ] && [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break
    sleep 0.1
  done
fi
for name in node1 node2 slurmctld munged; do
  [ -e "$folder/$name.pid" ] || continue
  pid=$(cat "$folder/$name.pid")
  # Only if the number still is that daemon's: it may belong to another process by now.
  if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$folder"; then
    kill "$pid"
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  fi
done
rm -rf "$folder"
