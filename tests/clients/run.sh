#!/usr/bin/env bash
# Runs openai-python and openai-node against a live server.
# Usage: tests/clients/run.sh BINARY MODEL.gguf [--full] [-- PYTEST-ARGUMENTS]
#   --full  larger counts: longer texts, more requests at once
# Installs what it needs: .venv/ (Python 3.10+) and tests/clients/node/node_modules (Node 18+).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ $# -lt 2 ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
fi
binary=$(realpath "$1") model=$(realpath "$2")
shift 2
full=0
if [ "${1:-}" = --full ]; then full=1 && shift; fi
if [ "${1:-}" = -- ]; then shift; fi

# The server and the commands under test see only what this script gives them.
for name in $(compgen -e M40LLM_ || true); do unset "$name"; done
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY all_proxy OPENAI_BASE_URL OPENAI_ORG_ID

venv=$root/.venv
if ! cmp -s "$here/requirements.txt" "$venv/clients-requirements.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/clients-requirements.txt"
fi
if ! cmp -s "$here/node/package-lock.json" "$here/node/node_modules/installed-lock.json"; then
    (cd "$here/node" && npm ci --silent --no-audit --no-fund)
    cp "$here/node/package-lock.json" "$here/node/node_modules/installed-lock.json"
fi

context=2048
. "$here/server.sh"
start_server "$binary" "$model" --ctx-size "$context"

export TEST_URL=$server_url TEST_BINARY=$binary TEST_MODEL=$model TEST_CTX=$context TEST_FULL=$full
failed=0
"$venv/bin/python" -m pytest "$here/python" -q --tb=short --durations=5 "$@" || failed=1
(cd "$here/node" && npm test --silent) || failed=1
if ! server_running; then
    echo "the server ended during the tests" >&2
    failed=1
fi
exit "$failed"
