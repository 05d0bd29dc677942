#!/usr/bin/env bash
# From a fresh clone to a passed test suite: packages, format, lint, types, unit tests beside browser tests. People and CI
# run the same. One line per step; a failed step shows all it said. The last lines are pytest's own counts.
#
#   ./check.sh             everything
#   CI=true ./check.sh     the same, and a missing browser is a failure instead of a loud skip
set -u
# shellcheck source=start.sh
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
cd "$ROOT" || exit 1

LOGS=$VENV/check
WORKERS=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
[ "$WORKERS" -gt 5 ] && WORKERS=5  # each holds PyTorch and a model: about 1.5 GB
failed=""
counts=""
has_browser=false
# Sound tools for the synthesis tests, a browser, and fonts for the scripts that screenshots show.
SYSTEM_PACKAGES=(ffmpeg chromium espeak-ng flite fonts-wqy-zenhei shellcheck)

# check NAME COMMAND...: one step; its whole output when it fails, and the script goes on to the next.
check() {
  local name=$1 log=$LOGS/${1// /-}.log
  shift
  : >"$log"
  if ! step "$name" "$log" "$@"; then fail "$name" "$log"; fi
}

fail() {  # fail NAME LOG
  failed="$failed${failed:+, }$1"
  cat "$2" >&2
}

# begin_tests NAME PYTEST-ARGUMENTS...: pytest in the background; its process is $child.
begin_tests() {
  local log=$LOGS/${1// /-}.log
  shift
  rm -f "$log" "$log.ended"
  begin "$log" note_end "$log.ended" env OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -rs "$@"
}

note_end() {  # note_end FILE COMMAND...
  local file=$1 status=0
  shift
  "$@" || status=$?
  echo "$SECONDS" >"$file"
  return "$status"
}

# end_tests NAME CHILD STARTED: as check's end; pytest's closing line is kept for ours.
end_tests() {
  local name=$1 log=$LOGS/${1// /-}.log
  if ! finish "$name" "$2" "$3" "$log.ended"; then fail "$name" "$log"; fi
  counts="$counts$(tail -n 1 "$log")"$'\n'
  awk '/^SKIPPED/ { n = substr($2, 2) + 0; sub(/^SKIPPED \[[0-9]+\] [^ ]+ /, ""); skipped[$0] += n }
    END { for (reason in skipped) print "    " skipped[reason] " skipped: " reason }' "$log" >&2
}

missing_system_packages() {
  local package
  for package in "${SYSTEM_PACKAGES[@]}"; do
    dpkg -s "$package" >/dev/null 2>&1 || printf '%s\n' "$package"
  done
}

install_system_packages() {  # quietly nothing where there is no apt-get or no right to use it; tests say what they lack
  local root=() missing
  command -v apt-get >/dev/null || return 0
  missing=$(missing_system_packages)
  [ -n "$missing" ] || return 0
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 0
    root=(sudo -n)
  fi
  step "system packages" "$LOGS/apt.log" apt_install "$missing" "${root[@]+"${root[@]}"}" ||
    say "  (not all of: $(echo "$missing" | tr '\n' ' '); tests that need one are skipped and say so)"
}

apt_install() {  # apt_install PACKAGES [SUDO...]
  local packages=$1
  shift
  "$@" apt-get update -qq
  # shellcheck disable=SC2086  # one word per package
  apt_get() { "$@" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages; }
  apt_get "$@" && return 0
  local package status=0 all=$packages
  for package in $all; do  # one that this distribution lacks must not keep the others away
    packages=$package
    apt_get "$@" || status=1
  done
  return "$status"
}

dev_packages() {  # the dev group of pyproject.toml, one requirement per line (pip knows groups only since 25.1)
  "$VENV/bin/python" -c \
    'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")'
}

install_dev_packages() {
  local wanted stamp=$VENV/.installed-dev
  wanted="$(cat "$STAMP") $(dev_packages | cksum)"
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return 0
  dev_packages >"$VENV/dev-requirements.txt"
  step "packages for development" "$LOG" pip_install -r "$VENV/dev-requirements.txt" || explain_failure
  printf '%s\n' "$wanted" >"$stamp"
}

find_browser() {
  command -v chromium || command -v chromium-browser || command -v google-chrome ||
    "$VENV/bin/python" -c 'from playwright.sync_api import sync_playwright as p
with p() as playwright: print(playwright.chromium.executable_path)' 2>/dev/null | xargs -r ls 2>/dev/null
}

ensure_browser() {  # where no system package can be had, Playwright's own download
  [ -n "$(find_browser)" ] && return 0
  step "Chromium from Playwright" "$LOGS/chromium.log" timeout 180 "$VENV/bin/python" -m playwright install chromium
  [ -n "$(find_browser)" ]
}

unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE  # else every process compiles every test anew
install_packages "$(wanted_build "$(driver_line)")"
mkdir -p "$LOGS"
install_system_packages
install_dev_packages

check "format" "$VENV/bin/python" -m ruff format --check .
check "lint" "$VENV/bin/python" -m ruff check .
command -v shellcheck >/dev/null && check "shell scripts" shellcheck start.sh check.sh .ci/run training/*.sh
check "types" "$VENV/bin/python" -m mypy .
# The browser's tests, one after another in a process of their own, beside those of the units. Of these each file is on one
# worker, where its tests share fixtures. (loadgroup groups nothing: pytest-xdist 3.8 writes its groups where pytest 9 no
# longer reads them.)
ensure_browser && has_browser=true
started=$SECONDS
if [ "$has_browser" = true ]; then
  begin_tests "browser tests" tests/browser -p no:xdist
  browser=$child
fi
begin_tests "unit tests" tests --ignore=tests/browser -n "$WORKERS" --dist loadfile --no-loadscope-reorder
end_tests "unit tests" "$child" "$started"
if [ "$has_browser" = true ]; then
  end_tests "browser tests" "$browser" "$started"
else
  say "  BROWSER TESTS SKIPPED: no Chromium here and none could be installed (apt install chromium)"
  if [ -n "${CI:-}" ]; then failed="$failed${failed:+, }browser tests"; fi
fi

say ""
verdict="all passed"
[ -n "$failed" ] && verdict="FAILED: $failed"
say "check.sh: $verdict ($SECONDS s)"
printf '%s' "$counts"
[ -z "$failed" ]
