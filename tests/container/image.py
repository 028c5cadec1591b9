"""Runs the image's process the way a runtime would, as far as that goes without one, and holds it to what docker/README.md says.

Usage: image.py WORK-DIRECTORY IMAGE BASE MODEL.gguf
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from openai import AuthenticationError, OpenAI

MEGABYTE = 1_000_000
MOST_ADDED, MOST_TOTAL = 60 * MEGABYTE, 150 * MEGABYTE
START_TIMEOUT_S = 60


def main(work: str, image: str, base: str, model: str) -> None:
    buildah = Buildah(Path(work))
    total = buildah.size(image)
    added = total - buildah.size(base)
    print(f"image: {total / 1e6:.1f} MB, of which {added / 1e6:.1f} MB are ours")
    assert added < MOST_ADDED, f"the image adds {added} bytes to its base"
    assert total < MOST_TOTAL, f"the image has {total} bytes"

    container = buildah.call("from", "--pull-never", image).strip()
    try:
        Container(buildah, container, image, Path(work) / "state", model).check()
    finally:
        buildah.call("umount", container)
        buildah.call("rm", container)


class Buildah:
    def __init__(self, work: Path):
        self.command = ["buildah", "--root", str(work / "storage"), "--runroot", str(work / "run")]

    def call(self, *arguments: str) -> str:
        return subprocess.run([*self.command, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

    def config(self, image: str) -> dict:
        return json.loads(self.call("inspect", "--type", "image", image))["Docker"]["config"]

    def size(self, image: str) -> int:
        """Bytes of the root file system, all layers together."""
        container = self.call("from", "--pull-never", image).strip()
        try:
            root = self.call("mount", container).strip()
            listing = subprocess.run(
                ["du", "--summarize", "--bytes", root], check=True, stdout=subprocess.PIPE, text=True
            )
            return int(listing.stdout.split()[0])
        finally:
            self.call("umount", container)
            self.call("rm", container)


class Container:
    """A process of the image: its user, environment, entry point; a read-only root, /models, /state and /tmp."""

    def __init__(self, buildah: Buildah, container: str, image: str, state: Path, model: str):
        self.config = buildah.config(image)
        self.root = buildah.call("mount", container).strip()
        self.model = model
        self.state = state
        subprocess.run(["rm", "-rf", str(state)], check=True)
        state.mkdir()
        # As a volume made from the image would be.
        owner = os.stat(f"{self.root}/state")
        os.chown(state, owner.st_uid, owner.st_gid)
        os.chmod(state, owner.st_mode & 0o777)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def command(self, arguments: list[str]) -> list[str]:
        environment = [*self.config["Env"], f"M40LLM_ADDR=0.0.0.0:{self.port}"]
        root, state, model = (shlex.quote(str(path)) for path in (self.root, self.state, self.model))
        inside = shlex.join(["env", "-i", *environment, *arguments])
        # What a runtime does; `exec` so that the process is the first of its namespace and gets the signals itself.
        script = f"""
            set -e
            mount --make-rprivate /
            mount --bind {root} {root}
            touch {root}/models/model.gguf
            mount --bind -o ro {model} {root}/models/model.gguf
            mount --bind {state} {root}/state
            mount --bind /dev {root}/dev
            mount -t proc proc {root}/proc
            mount -o remount,bind,ro {root}
            exec chroot --userspec={self.config["User"]} {root} {inside}
        """
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """The entry point with arguments, to its end."""
        command = self.command([*self.config["Entrypoint"], *arguments])
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def healthy(self) -> bool:
        check = self.config["Healthcheck"]["Test"]
        assert check[0] == "CMD", check
        return subprocess.run(self.command(check[1:]), capture_output=True, timeout=60).returncode == 0

    def check(self) -> None:
        revision = self.config["Labels"]["org.opencontainers.image.revision"]
        version = self.run("--version")
        assert version.returncode == 0 and version.stdout.endswith(f" ({revision})\n"), (version, revision)

        devices = self.run("devices")
        assert devices.returncode == 0 and "no CUDA device" in devices.stdout, devices

        refused = self.run(*self.config["Cmd"])
        assert refused.returncode != 0 and "m40llm keys create" in refused.stderr, refused
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr

        created = self.run("keys", "create", "--name", "container")
        assert created.returncode == 0, created
        key = created.stdout.strip()
        self.serve(key)

    def serve(self, key: str) -> None:
        log = open(self.state.parent / "container.log", "w+")
        started = time.monotonic()
        command = self.command([*self.config["Entrypoint"], *self.config["Cmd"]])
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not self.healthy():
                assert process.poll() is None, f"it ended: {Path(log.name).read_text()}"
                assert time.monotonic() - started < START_TIMEOUT_S, "it did not become healthy"
            print(f"start to healthy: {time.monotonic() - started:.1f} s")
            server = first_child(process.pid)
            self.confined(server)
            self.chat(key)
            os.kill(server, signal.SIGTERM)
            assert process.wait(timeout=60) == 0, process.returncode
        finally:
            process.kill()
            process.wait()
        text = Path(log.name).read_text()
        assert re.search(r"\bcpu\b", text, re.IGNORECASE), f"the log does not say that the CPU is used: {text}"

    def confined(self, server: int) -> None:
        status = Path(f"/proc/{server}/status").read_text()
        uid = re.search(r"^Uid:\s+(\d+)\s+(\d+)", status, re.MULTILINE)
        assert uid and uid[1] == uid[2] != "0", status
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE), status
        (root,) = [line for line in Path(f"/proc/{server}/mountinfo").read_text().splitlines() if line.split()[4] == "/"]
        assert "ro" in root.split()[5].split(","), root

    def chat(self, key: str) -> None:
        url = f"http://127.0.0.1:{self.port}/v1"
        client = OpenAI(base_url=url, api_key=key, max_retries=0)
        question = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 24, "temperature": 0}
        (model,) = client.models.list().data
        whole = client.chat.completions.create(model=model.id, **question)
        answer = whole.choices[0].message.content
        assert whole.usage.completion_tokens == 24 and len(answer) > 20, whole
        chunks = client.chat.completions.create(model=model.id, stream=True, **question)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
        try:
            OpenAI(base_url=url, api_key="sk-m40-wrong", max_retries=0).models.list()
            raise AssertionError("a wrong key was taken")
        except AuthenticationError:
            pass
        print(f"openai-python: {answer!r}")


def first_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
