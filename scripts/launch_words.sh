# shellcheck shell=bash
# What the launchers have in common; sourced by them, with `home` set.
name=$(basename "$0" .sh)

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
fail() { # text [status]
  echo "$name: error: $1" >&2
  exit "${2:-1}"
}
say() { echo "$name: $1" >&2 || true; } # the terminal may be gone
trap : PIPE

# A word as one would type it in any shell.
quote() {
  if [[ $1 =~ ^[A-Za-z0-9@%+=:,./_-]+$ ]]; then printf %s "$1"; else printf "'%s'" "${1//\'/\'\\\'\'}"; fi
}
line_of() { # words
  local word line=
  for word in "$@"; do line+=" $(quote "$word")"; done
  printf %s "${line:1}"
}

find_python() { # sets `python`
  python=${PYTHON:-$home/.venv/bin/python}
  command -v "$python" >/dev/null || fail "there is no $python; \`make setup\` makes it, PYTHON names another" 2
}
