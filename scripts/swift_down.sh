#!/usr/bin/env bash
# Stop the Swift that scripts/swift_up.sh started, and remove its data.
#
#   scripts/swift_down.sh [FOLDER]     default: $SHARDSTREAM_SWIFT, which swift_up.sh exports
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
folder=${1:-${SHARDSTREAM_SWIFT:?swift_down: name the folder of the Swift to stop}}
if [ ! -e "$folder/swift_up" ]; then
  echo "swift_down: $folder was not made by swift_up.sh" >&2
  exit 2
fi
for file in "$folder"/*.pid; do
  [ -e "$file" ] || continue
  pid=$(cat "$file")
  # Only if the number still is that server's: it may belong to another process by now.
  if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$folder"; then kill "$pid"; fi
done
rm -rf "$folder"
