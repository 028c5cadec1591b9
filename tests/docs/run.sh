#!/usr/bin/env bash
# Runs the examples of README.md and the documentation, and checks their links.
# Usage: tests/docs/run.sh [--full | --gpu] BINARY MODEL.gguf [PYTEST-ARGUMENTS]
#   --full  also those marked `slow`, which build the release and take minutes
#   --gpu   only those marked `gpu`, on a CUDA device; wants nothing but python3 and bash
# Installs what it needs into .venv/, but for --gpu. tests/docs/examples.py says how examples are marked.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mode=
case ${1:-} in --full | --gpu) mode=$1 && shift ;; esac
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
export TEST_BINARY TEST_MODEL TEST_ROOT=$root TEST_FULL=0
TEST_BINARY=$(realpath "$1") TEST_MODEL=$(realpath "$2")
shift 2

# The examples see only what they say themselves.
for name in $(compgen -e M40LLM_ || true) $(compgen -e OPENAI_ || true); do unset "$name"; done
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY all_proxy MAKEFLAGS MAKELEVEL

if [ "$mode" = --gpu ]; then exec python3 "$here/gpu.py"; fi
if [ "$mode" = --full ]; then TEST_FULL=1; fi
. "$root/tests/clients/venv.sh"
exec "$venv/bin/python" -m pytest "$here" -q --tb=short --durations=5 -p no:cacheprovider "$@"
