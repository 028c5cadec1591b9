#!/usr/bin/env bash
# lm-evaluation-harness against a live server, and its scores against the engine's own. For ../run.sh --full, which sets
# TEST_BINARY and TEST_MODEL. Installs lm-eval into .venv-lm-eval/, some 800 MB: too much for every run.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
. "$here/../server.sh"

# The engine without a server; `cargo test` builds it beside the binary.
export TEST_SCORER=$(dirname "$TEST_BINARY")/examples/score
if [ ! -x "$TEST_SCORER" ]; then
    echo "$TEST_SCORER is missing; build it with \`cargo build -p m40llm-engine --example score\`" >&2
    exit 1
fi

venv=$here/../../../.venv-lm-eval
if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/installed.txt"
fi

start_server "$TEST_BINARY" "$TEST_MODEL" --ctx-size 1024
export TEST_URL=$server_url
# Tasks and texts are the files beside this one; whoever asks a hub for more is told that it is not there.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$server_work/hub PYTHONDONTWRITEBYTECODE=1
cd "$here"
"$venv/bin/python" -m pytest . -q --tb=short --durations=5 -p no:cacheprovider
servers_running
