#!/usr/bin/env bash
# From a fresh clone to the running app: Python, .venv, packages, ffmpeg, a look at the GPU driver, then app.py.
#
#   ./start.sh                         the web page on http://127.0.0.1:7860
#   ./start.sh transcribe talk.mp3     any other command of app.py; ./start.sh --help lists them
#
# Run it as often as you like: what is installed stays, and a second run goes straight to app.py. This script speaks on
# stderr only, so the output of a command can be piped. PYTHON=/path/to/python3.12 picks the interpreter.
# check.sh sources this file for its functions. Written for bash 3.2 too (macOS).
set -u

repository() {
  local file=${BASH_SOURCE[0]} folder
  while [ -L "$file" ]; do  # started through a link: go where the files are
    folder=$(cd "$(dirname "$file")" && pwd)
    file=$(readlink "$file")
    case $file in /*) ;; *) file=$folder/$file ;; esac
  done
  (cd "$(dirname "$file")" && pwd)
}

ROOT=$(repository)
VENV=$ROOT/.venv
LOG=$VENV/install.log
STAMP=$VENV/.installed
CPU_WHEELS=https://download.pytorch.org/whl/cpu
child=""
children=" "

say() { printf '%s\n' "$*" >&2; }

die() {
  say "Sotto: $*"
  exit 1
}

stop_children() {
  local one
  for one in $children; do kill -- "-$one" 2>/dev/null; done
  say ""
  exit 130
}

# begin LOG COMMAND...: start a command with its output in LOG; its process is $child.
begin() {
  local log=$1
  shift
  # A script's background child would ignore Ctrl-C for good, and with it all that the child starts. With job control it
  # does not; it is a process group of its own, which the trap ends as a whole.
  trap stop_children INT TERM
  set -m
  "$@" >>"$log" 2>&1 </dev/null &
  child=$!
  set +m
  children="$children$child "
}

# finish LABEL CHILD STARTED [ENDED]: wait for it, with one line on screen: "  LABEL ... 12 s". ENDED: a file that it wrote
# the second of its end to, where it may have ended before anyone waited.
finish() {
  local label=$1 child=$2 started=$3 status=0 counter=0 took
  [ -t 2 ] || printf '  %s ...' "$label" >&2
  while kill -0 "$child" 2>/dev/null; do
    if [ -t 2 ] && [ $((counter % 5)) = 0 ]; then printf '\r  %s ... %d s' "$label" $((SECONDS - started)) >&2; fi
    counter=$((counter + 1))
    sleep 0.1
  done
  wait "$child" || status=$?
  children=${children/ $child / }
  [ "$children" != " " ] || trap - INT TERM
  took=$(($(cat "${4:-}" 2>/dev/null || echo "$SECONDS") - started))
  [ -t 2 ] && printf '\r  %s ...' "$label" >&2
  if [ "$status" = 0 ]; then say " $took s"; else say " failed after $took s"; fi
  return "$status"
}

# step LABEL LOG COMMAND...: run a command with its output in LOG and one line on screen.
step() {
  local label=$1 log=$2 started=$SECONDS
  shift 2
  begin "$log" "$@"
  finish "$label" "$child" "$started"
}

python_version() { "$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_fit_version() { case $1 in 3.11 | 3.12 | 3.13) return 0 ;; *) return 1 ;; esac; }

# Print the command of a Python that can make a virtual environment.
find_python() {
  local candidate version seen="" incomplete=""
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    version=$(python_version "$candidate") || continue
    if ! is_fit_version "$version"; then
      case " $seen " in *" $version "*) ;; *) seen="$seen $version" ;; esac
    elif ! "$candidate" -I -c 'import ensurepip, venv' 2>/dev/null; then
      incomplete=$version
    else
      printf '%s\n' "$candidate"
      return
    fi
  done
  if [ -n "$incomplete" ]; then
    die "Python $incomplete is here without its venv module." \
      "Install it and start again: apt install python$incomplete-venv"
  fi
  die "Python 3.11, 3.12 or 3.13 is needed; found${seen:+ Python}${seen:- none}." \
    "Install one (apt install python3 python3-venv, or python.org), or name one: PYTHON=/path/to/python3.12 ./start.sh"
}

driver_line() {  # "NVIDIA H200, 570.86.15" per GPU; nothing without a working driver
  command -v nvidia-smi >/dev/null || return 0
  timeout 10 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || true
}

# Which PyTorch fits: cpu (200 MB instead of 3 GB) only where there are such packages and surely no GPU.
wanted_build() {
  if [ "$(uname -sm)" = "Linux x86_64" ] && [ -z "$1" ]; then echo cpu; else echo default; fi
}

installed_key() { printf '%s python-%s' "$(cksum <"$ROOT/requirements.txt")" "$(python_version "$VENV/bin/python")"; }

# is_installed BUILD: the stamp matches requirements.txt, Python and a PyTorch that serves this machine.
is_installed() {
  local stamp key
  [ -x "$VENV/bin/python" ] && [ -r "$STAMP" ] || return 1
  stamp=$(cat "$STAMP") key=$(installed_key)
  [ "$stamp" = "$key default" ] || [ "$stamp" = "$key $1" ]
}

explain_failure() {  # one sentence about a failed installation, from the end of its log
  local last
  last=$(tail -n 60 "$LOG" 2>/dev/null)
  tail -n 12 "$LOG" 2>/dev/null | sed 's/^/    /' >&2
  case $last in
    *"No space left on device"* | *"Disk quota exceeded"*)
      die "the disk is full. The packages need about 3 GB (9 GB with a GPU) in $ROOT," \
        "and some room in ${TMPDIR:-/tmp}; free some and start again." ;;
    *CERTIFICATE_VERIFY_FAILED* | *SSLError*)
      die "the certificate of the package index is not trusted here. Behind a company proxy, set PIP_CERT to its" \
        "certificate file and start again." ;;
    *"No matching distribution"* | *ConnectionError* | *"Temporary failure"* | *"timed out"* | *"is unreachable"*)
      die "the packages could not be had. Is there a network? Behind a proxy, or with an index of your own, set" \
        "https_proxy, PIP_INDEX_URL or PIP_FIND_LINKS; then start again, what is already there is kept." ;;
    *)
      die "installing failed; the lines above are the end of $LOG." \
        "If it fails again, delete $VENV and start once more." ;;
  esac
}

venv_pip() { "$VENV/bin/python" -I -m pip --disable-pip-version-check --no-input "$@"; }

pip_install() { venv_pip install --progress-bar off --retries 2 "$@"; }

is_reachable() {  # within seconds; pip itself would try for minutes
  timeout 10 "$VENV/bin/python" -c \
    'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5).read(1)' "$1"
}

install_torch() {  # install_torch BUILD
  local pin
  pin=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$ROOT/requirements.txt")
  [ -n "$pin" ] || return 0
  if [ "$1" = default ]; then
    # A processor build satisfies the pin too, so it is replaced by force; with all it needs, or not at all.
    if is_installed cpu; then pip_install --force-reinstall "$pin"; else pip_install "$pin"; fi
  elif is_reachable "$CPU_WHEELS/torch/"; then
    pip_install --no-deps --extra-index-url "$CPU_WHEELS" "$pin"
  else
    pip_install --no-deps "$pin"  # the usual index or a local folder; may be the larger CUDA build, which runs here too
  fi
}

make_venv() {
  local version
  if [ -e "$VENV" ]; then
    version=$(python_version "$VENV/bin/python")
    if is_fit_version "$version" && venv_pip --version >/dev/null 2>&1; then return 0; fi
    say "  .venv is incomplete and is made anew"
    rm -rf "$VENV" || die "$VENV cannot be removed; remove it and start again."
  fi
  python=$(find_python) || exit 1
  if ! { mkdir -p "$VENV" && : >"$LOG"; } 2>/dev/null; then
    die "$ROOT cannot be written to: no right, or no room. See to it and start again."
  fi
  step "Python $("$python" -I -c 'import platform; print(platform.python_version())') in .venv" "$LOG" \
    "$python" -I -m venv "$VENV" || explain_failure
}

# install_packages BUILD: bring .venv to what requirements.txt says; at once when it is there already.
install_packages() {
  local build=$1
  is_installed "$build" && return 0
  if command -v flock >/dev/null; then exec 9<"$ROOT/requirements.txt" && flock 9; fi  # of two at once, one installs
  is_installed "$build" || fill_venv "$build"
  exec 9<&-
}

fill_venv() {
  local build=$1 label="PyTorch, build for processors"
  say "Sotto: preparing .venv, once; some minutes on a fresh machine (details: $LOG)"
  make_venv
  printf '== %s\n' "$(date)" >>"$LOG"
  [ "$build" = default ] && label="PyTorch"
  if ! step "$label" "$LOG" install_torch "$build"; then
    if [ "$build" = default ] && is_installed cpu; then
      say "Sotto: there is a GPU now, but PyTorch's build for it could not be had; going on without (details: $LOG)"
      return 0
    fi
    explain_failure
  fi
  step "packages of requirements.txt" "$LOG" pip_install -r "$ROOT/requirements.txt" || explain_failure
  printf '%s %s\n' "$(installed_key)" "$build" >"$STAMP"
}

ffmpeg_line() {
  local binary
  if command -v ffmpeg >/dev/null; then
    echo "ffmpeg of the system"
    return
  fi
  for binary in "$VENV"/lib/python3.*/site-packages/imageio_ffmpeg/binaries/ffmpeg-*; do
    if [ -x "$binary" ]; then
      echo "ffmpeg of imageio-ffmpeg"
      return
    fi
  done
  die "there is no ffmpeg here, so no recording can be read." \
    "Install it and start again: apt install ffmpeg (or brew install ffmpeg)"
}

has_compiler() {  # as Triton looks for it, with the header that its launchers include
  command -v "${CC:-gcc}" >/dev/null || { [ -z "${CC:-}" ] && command -v clang >/dev/null; } || return 1
  "$VENV/bin/python" -I -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())'
}

main() {
  local gpus ffmpeg
  case $(uname -s) in MINGW* | MSYS* | CYGWIN*) die "this needs Linux or macOS; on Windows run it inside WSL." ;; esac
  unset PYTHONHOME PYTHONPATH  # packages of another Python must not stand in for ours
  gpus=$(driver_line)
  install_packages "$(wanted_build "$gpus")"
  ffmpeg=$(ffmpeg_line) || exit 1
  # What the driver lists is not yet a working GPU: app.py calls it one only after it has computed on it.
  if [ -n "$gpus" ]; then gpus="NVIDIA driver sees $(printf '%s' "$gpus" | tr '\n' ';')"; fi
  say "Sotto: $ffmpeg, ${gpus:-no NVIDIA driver}"
  if [ -n "$gpus" ] && ! has_compiler; then
    say "Sotto: no C compiler with Python's headers here; our own 8-bit and 4-bit GPU kernels need one:" \
      "apt install gcc python3-dev"
  fi
  exec "$VENV/bin/python" "$ROOT/app.py" "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
