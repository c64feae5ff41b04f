"""A real server in processes of its own, and a client of few lines."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
STARTS_WITHIN, STOPS_WITHIN = 300, 60  # seconds
PROMPT = "a large red circle left of a small blue square on a green checker floor"


class Server:
    """``serve run`` with these settings, on a free port, until it is left.

    Args:
        settings: see `flashomni.serve.Settings`.
        cpus: that Ray may give away.
    """

    def __init__(self, cpus: int = 4, **settings: object) -> None:
        self.settings, self.cpus = settings, cpus
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        # Ray puts sockets there, whose paths must be short.
        self.home = Path(tempfile.mkdtemp(prefix="fo"))
        bin_ = Path(sys.executable).parent
        config = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [{"import_path": "flashomni.serve:app", "args": self.settings}],
        }
        (self.home / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        packages = [ROOT / "src", ROOT / "packages/flashomni-assets/src"]
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "RAY_TMPDIR": str(self.home),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": self.cpus}),
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(map(str, packages)),
        }
        self.log = self.home / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [bin_ / "serve", "run", self.home / "config.yaml"],
                stdout=log, stderr=log, env=environment, cwd=self.home, start_new_session=True,
            )  # fmt: skip
        try:
            self.wait_for(lambda: self.ask("GET", "/health", timeout=60)[0] == 200)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)

    def wait_for(self, ready, within: float = STARTS_WITHIN):
        """The first true value of ``ready()``."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                found = ready()
            except OSError:
                found = None
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(
            f"not within {within} s; the log ends:\n{self.log.read_text()[-4000:]}"
        )

    def ask(self, method: str, path: str, body: object = None, timeout: float = 300, **headers):
        """Status, headers and body of a reply."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def get(self, path: str):
        status, _, body = self.ask("GET", path, timeout=60)
        return status, json.loads(body)

    def post(self, **body):
        """Status, and what the reply says, of a small picture unless it is told otherwise."""
        small = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 2, "seed": 1}
        status, headers, reply = self.ask("POST", "/v1/images/generations", {**small, **body})
        return status, {**json.loads(reply), "retry_after": headers["Retry-After"]}

    def start(self, **body) -> socket.socket:
        """A request whose reply nobody has waited for yet: close it, and the client is gone."""
        data = json.dumps({"prompt": PROMPT, "size": "64x64", **body}).encode()
        head = (
            "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        client = socket.create_connection(("127.0.0.1", self.port))
        client.sendall(head.encode() + data)
        return client

    def processes(self, name: str) -> list[int]:
        """Process ids of a deployment's replicas; those of this server alone."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
                mine = str(self.home).encode() in (folder / "environ").read_bytes()
            except OSError:  # gone
                continue
            if mine and re.match(rf"ray::(ServeReplica:default:)?{name}\b", title):
                found.append(int(folder.name))
        return found

    def metrics(self) -> dict[str, float]:
        """Ours, summed over replicas and tags."""
        text = ""
        for path in self.home.rglob("prom_metrics_service_discovery.json"):
            for place in json.loads(path.read_text())[0]["targets"]:
                with urllib.request.urlopen(f"http://{place}/metrics", timeout=60) as reply:
                    text += reply.read().decode()
        found: dict[str, float] = {}
        for name, value in re.findall(r"^ray_flashomni_(\w+)\{.*\} (\S+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found


def pixels(reply: dict, index: int = 0) -> bytes:
    """Of a picture of a reply."""
    file = base64.b64decode(reply["data"][index]["b64_json"])
    return Image.open(io.BytesIO(file)).tobytes()


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024
