#!/usr/bin/env bash
# Start SLURM, two nodes of it on this machine, on loopback ports, with all its files in a temporary folder.
#
#   eval "$(scripts/slurm_up.sh)"     Debian or Ubuntu, as root; installs SLURM's packages
#   sbatch ...; squeue; sinfo         find it through SLURM_CONF
#   scripts/slurm_down.sh
#
# Prints SLURM_CONF and the folder as export lines. make test-cluster does all this.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac

fail() {
  echo "slurm_up: $1" >&2
  exit "${2:-1}"
}

[ "$(id -u)" = 0 ] || fail "SLURM's daemons start other users' processes: run this as root" 2
if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
  command -v apt-get >/dev/null || fail "SLURM's packages are Debian's; there is no apt-get here" 2
  echo "slurm_up: installing SLURM (half a minute)" >&2
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge; } >&2 </dev/null ||
    fail "apt-get could not install SLURM"
fi

folder=$(mktemp -d "${TMPDIR:-/tmp}/shardstream-slurm.XXXXXX")
touch "$folder/slurm_up" # by which slurm_down knows the folder as its own
trap '[ $? = 0 ] || "$(dirname "$0")/slurm_down.sh" "$folder"' EXIT
chmod 755 "$folder" # munge's clients have to reach its socket
mkdir "$folder/state"
read -r controller one two < <(
  python3 - <<'PY'
import socket
servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(server.getsockname()[1] for server in servers))
PY
)

# The daemons' proof of who is who: a key of this folder's own, and a socket beside it.
(umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
host=$(hostname -s)
cat >"$folder/slurm.conf" <<EOF
ClusterName=shardstream
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# How long a task may take to start; a job that is queued again waits as long. SLURM's own: 120.
AuthInfo=socket=$folder/munge.socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n.spool
SlurmctldPidFile=$folder/slurmctld.daemon
SlurmdPidFile=$folder/%n.daemon
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobRequeue=1
ReturnToService=2
# More cores than there are: what is tried here is SLURM's ways, not speed.
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$one CPUs=8
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$two CPUs=8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
export SLURM_CONF=$folder/slurm.conf

start() { # name, command...
  local name=$1
  shift
  setsid "$@" >"$folder/$name.log" 2>&1 </dev/null &
  echo $! >"$folder/$name.pid"
}
# Wait until a command succeeds, as long as the daemon of this name lives.
until_true() { # name, command...
  local name=$1
  shift
  for _ in $(seq 300); do
    kill -0 "$(cat "$folder/$name.pid")" 2>/dev/null || fail "$name ended: $(tail -n 2 "$folder/$name.log")"
    ! "$@" >/dev/null 2>&1 || return 0
    sleep 0.1
  done
  fail "$name does not answer: $(tail -n 2 "$folder/$name.log")"
}
start munged munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munge.daemon" --seed-file="$folder/munge.seed" --log-file="$folder/munge.daemon.log"
until_true munged munge --no-input --socket="$folder/munge.socket"
start slurmctld slurmctld -D -i -f "$folder/slurm.conf"
until_true slurmctld scontrol ping
for node in node1 node2; do start "$node" slurmd -D -N "$node" -f "$folder/slurm.conf"; done
both_idle() { [ "$(sinfo --noheader --states=idle --format=%D)" = 2 ]; }
until_true node2 both_idle
cat <<EOF
export SHARDSTREAM_SLURM=$(printf %q "$folder")
export SLURM_CONF=$(printf %q "$folder/slurm.conf")
EOF
