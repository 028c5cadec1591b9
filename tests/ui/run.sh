#!/usr/bin/env bash
# Opens / and /docs of a live server in headless Chromium, works them as a person would, and takes pictures.
# Usage: tests/ui/run.sh BINARY MODEL.gguf OUTDIR
# Installs what it needs: Debian's chromium (as root) when there is none, playwright-core without a browser.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
if [ $# -ne 3 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
binary=$(realpath "$1") model=$(realpath "$2")
mkdir -p "$3"
out=$(realpath "$3")

for name in $(compgen -e M40LLM_ || true); do unset "$name"; done
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY all_proxy

if ! command -v chromium >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
fi
if ! cmp -s "$here/package-lock.json" "$here/node_modules/installed-lock.json"; then
    (cd "$here" && npm ci --silent --no-audit --no-fund)
    cp "$here/package-lock.json" "$here/node_modules/installed-lock.json"
fi

. "$here/../clients/server.sh"
start_server "$binary" "$model"

export TEST_URL=$server_url TEST_OUT=$out TEST_BINARY=$binary TEST_STATE=$server_work/state
TEST_CHROMIUM=$(command -v chromium)
export TEST_CHROMIUM
cd "$here"
npm test --silent
