#!/usr/bin/env bash
# Runs the SDKs that people use against a live server, and schemathesis against its document.
# Usage: tests/clients/run.sh BINARY MODEL.gguf [--full] [-- PYTEST-ARGUMENTS]
#   --full  all of it: more cases for each SDK, longer texts, more requests at once, lm-evaluation-harness (some 800 MB
#           into .venv-lm-eval/), five minutes of schemathesis
# With PYTEST-ARGUMENTS, only pytest runs. Installs what it needs: .venv/ (Python 3.10+) and
# tests/clients/node/node_modules (Node 20+).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ $# -lt 2 ]; then
    sed -n '2,7s/^# //p' "$0" >&2
    exit 2
fi
binary=$(realpath "$1") model=$(realpath "$2")
shift 2
full=0
if [ "${1:-}" = --full ]; then full=1 && shift; fi
if [ "${1:-}" = -- ]; then shift; fi

# The servers and the commands under test see only what this script gives them.
for name in $(compgen -e M40LLM_) $(compgen -e OPENAI_) $(compgen -e ANTHROPIC_) $(compgen -e LITELLM_); do
    unset "$name"
done
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY all_proxy
# The SDKs ask nobody but the server: no prices, no traces, no notices.
export LITELLM_LOCAL_MODEL_COST_MAP=True LANGSMITH_TRACING=false

. "$here/venv.sh"
if ! cmp -s "$here/node/package-lock.json" "$here/node/node_modules/installed-lock.json"; then
    (cd "$here/node" && npm ci --silent --no-audit --no-fund)
    cp "$here/node/package-lock.json" "$here/node/node_modules/installed-lock.json"
fi

# make_key STATE-DIR [FLAGS...] prints a new key.
make_key() {
    "$binary" keys create --name test --json --state-dir "$@" | "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["key"])'
}

. "$here/server.sh"

# One server asks for keys, has a small context, and a place for one request and for one that waits.
keyed_state=$server_work/keyed
export TEST_KEY TEST_KEY_OF_METRICS TEST_KEY_WITHOUT_TOKENS
TEST_KEY=$(make_key "$keyed_state" --scope inference)
TEST_KEY_OF_METRICS=$(make_key "$keyed_state" --scope metrics)
TEST_KEY_WITHOUT_TOKENS=$(make_key "$keyed_state" --tpm 1)
start_server "$binary" "$model" --ctx-size 512 --max-batch 1 --max-queue 1 --state-dir "$keyed_state"
export TEST_KEYED_URL=$server_url

context=2048
start_server "$binary" "$model" --ctx-size "$context"
export TEST_URL=$server_url TEST_BINARY=$binary TEST_MODEL=$model TEST_CTX=$context TEST_FULL=$full

failed=0
"$venv/bin/python" -m pytest "$here/python" -q --tb=short --durations=5 "$@" || failed=1
if [ $# -eq 0 ]; then
    (cd "$here/node" && npm test --silent) || failed=1
    if [ "$full" = 1 ]; then "$here/lm_eval/run.sh" || failed=1; fi
    "$here/fuzz/run.sh" || failed=1
fi
if ! servers_running; then
    echo "a server ended during the tests" >&2
    failed=1
fi
exit "$failed"
