# Sourced by the run.sh beside this file and by others that need a live server.
# start_server BINARY MODEL [FLAGS...] serves on a free loopback port, waits for /health, and sets
# server_url and server_pid. On exit the server is stopped, and its log shown when the script failed.

server_work=$(mktemp -d)
server_pid=

stop_server() {
    local status=$?
    if [ -n "$server_pid" ]; then
        kill "$server_pid" 2>/dev/null || true
        wait "$server_pid" 2>/dev/null || true
    fi
    if [ "$status" -ne 0 ] && [ -s "$server_work/log" ]; then
        echo "--- the server's log, last 60 lines:"
        # Without the polling of the tests themselves.
        grep -v 'route="/\(metrics\|health\)" status=200' "$server_work/log" | tail -n 60
    fi
    rm -rf "$server_work"
    exit "$status"
}
trap stop_server EXIT

healthy() {
    python3 - "$server_url" 2>/dev/null <<'PY'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/health", timeout=2)
PY
}

start_server() {
    local port binary=$1 model=$2
    shift 2
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    server_url=http://127.0.0.1:$port
    # An own state directory: the user's keys would make every request a 401.
    XDG_STATE_HOME=$server_work/state "$binary" run "$model" --addr "127.0.0.1:$port" "$@" >"$server_work/log" 2>&1 &
    server_pid=$!
    for _ in $(seq 600); do
        if healthy; then return; fi
        if ! server_running; then
            echo "the server ended before it served" >&2
            exit 1
        fi
        sleep 0.2
    done
    echo "the server did not become healthy" >&2
    exit 1
}

server_running() {
    kill -0 "$server_pid" 2>/dev/null
}
