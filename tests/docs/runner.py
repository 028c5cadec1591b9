"""Runs an example as a reader would, in an empty directory, and says what came of it.

What is not as the reader has it is all here: port 58439 is a free one, `m40llm` and `make run` serve in the background until
the block ends, keys and what cargo installs go to directories of the test's own. These files lie ready: model.gguf, cert.pem
and key.pem (fullchain.pem and privkey.pem), the C program of the same document, the repository's engine/ and target/release.

Standard library only, as examples.py.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from examples import ROOT, Block, blocks

BINARY = Path(os.environ["TEST_BINARY"])
MODEL = Path(os.environ["TEST_MODEL"])
FULL = os.environ.get("TEST_FULL") == "1"
PORT = "58439"
PYTHON = sys.executable
STAND_INS = ROOT / "tests/docs/stand-in"

# Servers stay until the block has ended, and must end well. `make test` is what runs this; a test's own build is there already.
PRELUDE = r"""
set -euo pipefail
server=
# What a server that was told to stop ends with.
stopped=0
halt() {
    local status=0
    if [ -n "$server" ]; then kill "$server"; wait "$server" || status=$?; server=; [ "$status" = "$stopped" ]; fi
}
finish() {
    local status=$?
    halt || { echo "the server did not end well" >&2; status=1; }
    exit "$status"
}
trap finish EXIT
serve() {
    halt
    "$@" >>server.log 2>&1 &
    server=$!
    local cert= before= word
    for word; do [ "$before" != --tls-cert ] || cert=$word; before=$word; done
    until M40LLM_TLS_CERT=$cert command m40llm health --addr "127.0.0.1:$TEST_PORT" >/dev/null 2>&1; do
        if ! kill -0 "$server" 2>/dev/null; then cat server.log >&2; server=; return 1; fi
        sleep 0.2
    done
}
m40llm() { if [ "$1" = run ]; then serve command m40llm "$@"; else command m40llm "$@"; fi; }
make() {
    case $1 in
    # make hands the signal on, waits, and ends by it too: 128 and SIGTERM's number.
    run) stopped=143 && serve command make -C "$TEST_ROOT" run ARGS="--addr 127.0.0.1:$TEST_PORT" ;;
    test) command make -C "$TEST_ROOT" --dry-run test >/dev/null ;;
    *) command make -C "$TEST_ROOT" "$@" ;;
    esac
}
cargo() {
    if [ "$TEST_FULL" = 1 ]; then (cd "$TEST_ROOT" && command cargo "$@"); return; fi
    [ "$*" = "build --release -p m40llm-engine" ] && [ -e target/release/libm40llm_engine.so ]
}
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def prepare(work: Path) -> None:
    """The files that examples name."""
    (work / "bin").mkdir()
    (work / "bin/m40llm").symlink_to(BINARY)
    (work / "model.gguf").symlink_to(MODEL)
    (work / "engine").symlink_to(ROOT / "engine")
    (work / "target").mkdir()
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute()
    (work / "target/release").symlink_to(target / "release" if FULL else BINARY.parent / "deps")


def certificate(work: Path) -> None:
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    files = ["-keyout", work / "key.pem", "-out", work / "cert.pem"]
    subprocess.run([*command, *files], env=environment(work, 0), check=True, capture_output=True)
    (work / "privkey.pem").symlink_to("key.pem")
    (work / "fullchain.pem").symlink_to("cert.pem")


def environment(work: Path, port: int) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("M40LLM_", "XDG_"))}
    # A status that is no success fails an example's curl.
    (work / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\nmax-time = 120\n")
    return keep | {
        # curl and openssl are most people's own; tests want nothing that `make run` does not.
        "PATH": f"{work / 'bin'}:{Path(PYTHON).parent}:{os.environ['PATH']}:{STAND_INS}",
        "HOME": os.environ["HOME"],
        "CURL_HOME": str(work),
        "CARGO_INSTALL_ROOT": str(work / "cargo"),
        "M40LLM_ADDR": f"127.0.0.1:{port}",
        "M40LLM_STATE_DIR": str(work / "state"),
        "TEST_PORT": str(port),
        "TEST_ROOT": str(ROOT),
        "TEST_FULL": "1" if FULL else "0",
    }


def serves(text: str) -> bool:
    return re.search(r"^(m40llm|make) run\b", text, re.MULTILINE) is not None


def run_shell(
    block: Block, work: Path, served: int | None, timeout: float = 120, port: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a block of shell; `served` is the port of a server that is there, for blocks that start none."""
    port = port or (free_port() if serves(block.text) or served is None else served)
    # `m40llm run … &` in one terminal is what `serve` does of itself.
    text = re.sub(r"^(m40llm run\b.*) &$", r"\1", block.text, flags=re.MULTILINE).replace(PORT, str(port))
    if "pem" in text and "openssl" not in text:
        certificate(work)
    for name in re.findall(r"\b(\w+)\.c\b", text):
        program = next(b.text for b in blocks(block.path) if b.language == "c" and "main(" in b.text)
        (work / f"{name}.c").write_text(program)
    if identity := re.search(r"\bkey_[0-9a-f]{24}\b", text):
        text = text.replace(identity[0], make_key(work, port))
    script = work / "example.sh"
    script.write_text(PRELUDE + text)
    return run_bounded(["bash", script], work, port, timeout)


def run_bounded(command: list, work: Path, port: int, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs a command; where it takes too long, all that it has started ends with it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=work, env=environment(work, port), start_new_session=True, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def make_key(work: Path, port: int) -> str:
    """The id of a new key, for examples that name one."""
    command = [BINARY, "keys", "create", "--name", "example", "--json"]
    made = subprocess.run(command, env=environment(work, port), text=True, capture_output=True, check=True)
    return re.search(r'"id": ?"(key_[0-9a-f]+)"', made.stdout)[1]


def run_python(block: Block, work: Path, served: int) -> subprocess.CompletedProcess[str]:
    script = work / "example.py"
    script.write_text(block.text.replace(PORT, str(served)))
    return run_bounded([PYTHON, script], work, served, 120)
