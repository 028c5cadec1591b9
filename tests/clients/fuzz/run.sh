#!/usr/bin/env bash
# schemathesis against the document of a server that asks for keys. For ../run.sh, which sets TEST_BINARY,
# TEST_MODEL and TEST_FULL and has installed schemathesis. What is left out, and why:
#   positive_data_acceptance  a schema cannot say all that a value must be: that a model is loaded, that a
#                             prompt fits, what a template takes
#   negative_data_rejection   more is accepted than the document says: null for absent, 3.0 for 3
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
. "$here/../server.sh"

# A secret of its own: keys stay valid, since who rotates it is refused. (That it can be is tested in Rust.)
M40LLM_SIGNING_SECRET=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export M40LLM_SIGNING_SECRET TEST_STATE=$server_work/keyed
"$TEST_BINARY" keys create --name first --state-dir "$TEST_STATE" >"$server_work/first" 2>&1
# A request may ask for no more than eight choices.
start_server "$TEST_BINARY" "$TEST_MODEL" --ctx-size 512 --max-queue 8 --state-dir "$TEST_STATE"

if [ "$TEST_FULL" = 1 ]; then bounds=(--max-time 300); else bounds=(--max-time 30 --seed 6); fi
schemathesis=$(realpath "$here/../../../.venv/bin/schemathesis")
# It leaves a folder where it runs.
cd "$server_work"
export SCHEMATHESIS_HOOKS=hooks PYTHONPATH=$here PYTHONDONTWRITEBYTECODE=1
"$schemathesis" run "$server_url/openapi.json" "${bounds[@]}" --request-timeout 60 \
    --exclude-checks positive_data_acceptance,negative_data_rejection \
    --generation-database none --no-color
servers_running
