#!/usr/bin/env bash
# Start OpenStack Swift, a real S3 server, on loopback ports, with its data in a temporary folder.
#
#   eval "$(scripts/swift_up.sh)"     Debian or Ubuntu, as root; installs Swift's packages
#   make test-s3                      or: python -m pytest tests/test_store.py tests/test_s3*.py
#   scripts/swift_down.sh
#
# Prints endpoint and keys as export lines. Swift checks signatures, clocks and Content-MD5, as AWS
# does. The folder must be on a file system with extended attributes (TMPDIR chooses another).
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac

fail() { echo "swift_up: $1" >&2; exit "${2:-1}"; }

if ! command -v swift-proxy-server >/dev/null; then
  command -v apt-get >/dev/null || fail "Swift's packages are Debian's; there is no apt-get here" 2
  [ "$(id -u)" = 0 ] || fail "installing Swift needs root" 2
  echo "swift_up: installing OpenStack Swift (half a minute)" >&2
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends \
    swift-proxy swift-account swift-container swift-object; } >&2 </dev/null ||
    fail "apt-get could not install Swift"
fi

folder=$(mktemp -d "${TMPDIR:-/tmp}/shardstream-swift.XXXXXX")
touch "$folder/swift_up" # by which swift_down knows the folder as its own
trap '[ $? = 0 ] || "$(dirname "$0")/swift_down.sh" "$folder"' EXIT
mkdir -p "$folder/data/disk" "$folder/cache"
read -r proxy account container object < <(/usr/bin/python3 - <<'PY'
import socket
servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(server.getsockname()[1] for server in servers))
PY
)

cat >"$folder/swift.conf" <<EOF
[swift-hash]
swift_hash_path_prefix = shardstream
swift_hash_path_suffix = test
[storage-policy:0]
name = one
default = yes
EOF
# One device, one copy: nothing here is to be kept.
for kind in account container object; do
  {
    swift-ring-builder "$folder/$kind.builder" create 4 1 1
    swift-ring-builder "$folder/$kind.builder" add "r1z1-127.0.0.1:${!kind}/disk" 1
    swift-ring-builder "$folder/$kind.builder" rebalance
  } >"$folder/$kind-ring.log" || fail "no ring for $kind: $(tail -n 1 "$folder/$kind-ring.log")"
done

settings() { # name, port
  cat <<EOF
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $2
workers = 0
user = $(id -un)
swift_dir = $folder
devices = $folder/data
mount_check = false
recon_cache_path = $folder/cache
log_name = swift-$1
[app:$1-server]
use = egg:swift#$1
EOF
}
for kind in account container object; do
  { settings "$kind" "${!kind}"; printf '[pipeline:main]\npipeline = %s-server\n' "$kind"; } \
    >"$folder/$kind.conf"
done
{
  settings proxy "$proxy"
  cat <<'EOF'
allow_account_management = true
account_autocreate = true
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats bulk s3api tempauth slo dlo proxy-server
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:s3api]
use = egg:swift#s3api
[filter:cache]
use = egg:swift#memcache
# Swift asks for the filter, but works without the server.
memcache_servers = 127.0.0.1:1
EOF
  for filter in catch_errors gatekeeper listing_formats bulk slo dlo; do
    printf '[filter:%s]\nuse = egg:swift#%s\n' "$filter" "$filter"
  done
} >"$folder/proxy.conf"

for kind in account container object proxy; do
  setsid "swift-$kind-server" "$folder/$kind.conf" verbose >"$folder/$kind.log" 2>&1 </dev/null &
  echo $! >"$folder/$kind.pid"
done
for kind in account container object proxy; do
  for _ in $(seq 100); do
    kill -0 "$(cat "$folder/$kind.pid")" || fail "the $kind server ended: $(tail -n 1 "$folder/$kind.log")"
    (exec 3<>"/dev/tcp/127.0.0.1/${!kind}") 2>/dev/null && continue 2
    sleep 0.1
  done
  fail "the $kind server does not answer; see $folder/$kind.log"
done
cat <<EOF
export SHARDSTREAM_SWIFT=$(printf %q "$folder")
export SHARDSTREAM_TEST_S3_ENDPOINT=http://127.0.0.1:$proxy
export AWS_ACCESS_KEY_ID=test:tester AWS_SECRET_ACCESS_KEY=testing AWS_REGION=us-east-1
EOF
