#!/usr/bin/env bash
# Mount an FSx for Lustre file system as AWS documents it, and look whether it is fit for shards.
#
#   scripts/mount_fsx.sh [--dry_run] [--shards FOLDER] DNS_NAME MOUNT_NAME DIR
#   scripts/mount_fsx.sh --dry_run fs-0123456789abcdef0.fsx.us-east-1.amazonaws.com abcdefgh /fsx
#
# Needs root and the Lustre client. DNS_NAME and MOUNT_NAME stand in the console and in the output of
# `aws fsx describe-file-systems`. What is mounted there already is left as it is.
#
#   --dry_run         print the commands, run none of them
#   --shards FOLDER   where the shards are, or will be (default DIR): its striping, and its files
#                     that are still in S3 alone
#
# Exit status: 0 mounted, 1 a command failed, 2 wrong use or no Lustre client.
set -euo pipefail

restore_at_once=8

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() {
  echo "mount_fsx: error: $1" >&2
  exit "${2:-1}"
}

# A word as one would type it.
quote() {
  if [[ $1 =~ ^[A-Za-z0-9@%+=:,./_-]+$ ]]; then printf %s "$1"; else printf %q "$1"; fi
}

# Print a command, and run it unless this is a dry run.
run() {
  printf +
  for word in "$@"; do printf ' %s' "$(quote "$word")"; done
  printf '\n'
  if [ "$dry_run" = no ]; then
    "$@" || fail "$1 failed with status $?"
  fi
}

dry_run=no
shards=
names=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run | --dry-run) dry_run=yes ;;
    --shards)
      [ $# -gt 1 ] && [ -n "$2" ] || fail "--shards needs a folder" 2
      shards=$2
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) fail "unknown argument $1; see --help" 2 ;;
    *) names+=("$1") ;;
  esac
  shift
done
[ ${#names[@]} = 3 ] ||
  fail "DNS_NAME MOUNT_NAME DIR are needed, got ${#names[@]} of them; see --help" 2
dns=${names[0]} name=${names[1]} dir=${names[2]}
[[ $dns =~ ^[A-Za-z0-9.-]+$ && $dns != -* ]] ||
  fail "$dns is no DNS name; write for example fs-0123456789abcdef0.fsx.us-east-1.amazonaws.com" 2
[[ $name =~ ^[A-Za-z0-9_-]{1,8}$ ]] ||
  fail "$name is no mount name of FSx (1 to 8 letters, digits, _ and -)" 2
dir=${dir%/}
[[ $dir = /?* ]] || fail "${names[2]} is no absolute path to mount on; write for example /fsx" 2
shards=${shards:-$dir}
[[ $shards = /* ]] || fail "$shards is no absolute path; write for example $dir/imagenet-shards" 2

missing=
for program in lfs mount.lustre; do
  # mount.lustre is for root, whose folders others may not have on PATH.
  PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing="$missing $program"
done
if [ -n "$missing" ]; then
  advice="the Lustre client is not installed (no$missing). Amazon Linux 2023: \`dnf install -y \
lustre-client\`; Ubuntu: add AWS's repository of clients, then \`apt-get install \
lustre-client-modules-\$(uname -r)\` (FSx for Lustre User Guide, 'Installing the Lustre client')"
  [ "$dry_run" = yes ] || fail "$advice" 2
  echo "mount_fsx: $advice" >&2
fi

# Device and type of what is mounted on a folder; the kernel writes a space as \040.
mounted_on() {
  local device folder kind found=
  while read -r device folder kind _; do
    [ "$(printf %b "$folder")" != "$1" ] || found="$device $kind"
  done <"${MOUNT_FSX_MOUNTS:-/proc/mounts}" # the tests have a list of their own
  printf %s "$found"
}

there=$(mounted_on "$dir")
case $there in
  '')
    run mkdir -p -- "$dir"
    # flock: locks that hold on all nodes. relatime: no write for each read.
    run mount -t lustre -o relatime,flock "$dns@tcp:/$name" "$dir"
    ;;
  *"@tcp:/$name lustre") echo "mount_fsx: $dir is mounted already: ${there% *}" ;;
  *) fail "something else is mounted on $dir: $there; choose another folder, or unmount it" 2 ;;
esac
run lfs df -h "$dir" # fails on what is no Lustre; lists the targets

cat <<EOF

Striping. A shard of 128 MB belongs on one target: shards spread over all of them, and reading one
takes one lock and one connection. The default of FSx may cut a file into several from 100 MiB on.
Only new files follow what is set, so before packing or copying to the folder:

    mkdir -p $(quote "$shards") && lfs setstripe -c 1 $(quote "$shards")

Shards of more than 1 GB that many nodes read at a time gain from more: lfs setstripe -c 4 -S 16M.
What the folder says now:
EOF
if [ "$dry_run" = yes ] || [ -d "$shards" ]; then
  run lfs getstripe -d "$shards"
else
  echo "(there is no $shards yet)"
fi

echo
echo "Released files: their bytes are in S3 alone, and whoever reads one first waits for it."
find_files="find $(quote "$shards") -type f -print0"
echo "+ $find_files | xargs -0 -r -n 100 lfs hsm_state | grep released"
if [ "$dry_run" = no ]; then
  [ -d "$shards" ] || exit 0
  states=$(find "$shards" -type f -print0 | xargs -0 -r -n 100 lfs hsm_state) ||
    fail "lfs hsm_state failed below $shards"
  # A line: PATH: (0x0000000d) released exists archived, archive_id:1
  released=$(grep -cE ': \(0x[0-9a-f]+\)( [a-z_]+)* released' <<<"$states" || true)
  echo "$released released files below $shards"
  [ "$released" != 0 ] || exit 0
fi
cat <<EOF
To bring them here, $restore_at_once requests at a time (a request returns at once; run hsm_state again
to see what is still to come):

    $find_files | xargs -0 -r -n 100 -P $restore_at_once lfs hsm_restore
EOF
