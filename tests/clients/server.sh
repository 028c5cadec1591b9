# Sourced by the run.sh beside this file and by others that need a live server.
# start_server BINARY MODEL [FLAGS...] serves on a free loopback port, waits for /health, and sets
# server_url and server_pid. It may be called again for another server. On exit the servers are stopped,
# and their logs shown when the script failed.

server_work=$(mktemp -d)
server_pid=
server_pids=()

stop_servers() {
    local status=$? pid log
    for pid in "${server_pids[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    if [ "$status" -ne 0 ]; then
        for log in "$server_work"/log.*; do
            if [ ! -s "$log" ]; then continue; fi
            echo "--- the log of server ${log##*.}, last 60 lines:"
            # Without the polling of the tests themselves.
            grep -v 'route="/\(metrics\|health\)" status=200' "$log" | tail -n 60
        done
    fi
    rm -rf "$server_work"
    exit "$status"
}
trap stop_servers EXIT

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
    XDG_STATE_HOME=$server_work/state "$binary" run "$model" --addr "127.0.0.1:$port" "$@" \
        >"$server_work/log.$((${#server_pids[@]} + 1))" 2>&1 &
    server_pid=$!
    server_pids+=("$server_pid")
    for _ in $(seq 600); do
        if healthy; then return; fi
        if ! servers_running; then
            echo "the server ended before it served" >&2
            exit 1
        fi
        sleep 0.2
    done
    echo "the server did not become healthy" >&2
    exit 1
}

# Whether the servers are still there.
servers_running() {
    local pid
    for pid in "${server_pids[@]}"; do
        kill -0 "$pid" 2>/dev/null || return 1
    done
}
