"""Starts the real server for the tests of the published Python SDK.

STACYVM_BIN          the `stacyvm` program (required)
STACYVM_TEST_IMAGE   a docker-archive to import as alpine:latest (required unless
                     the provider is the mock)
STACYVM_TEST_PROVIDER  default provider; the server's own default otherwise
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import stacyvm

START_SECONDS = 60
STOP_SECONDS = 60


@dataclass
class Server:
    url: str
    log: Path
    process: subprocess.Popen
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"X-API-Key": self.api_key} if self.api_key else {}

    def raw(self) -> httpx.Client:
        """Plain HTTP, for what the SDK has no method for."""
        return httpx.Client(base_url=f"{self.url}/api/v1", headers=self.headers, timeout=30, trust_env=False)

    def client(self, **options) -> stacyvm.Client:
        options.setdefault("api_key", self.api_key)
        return stacyvm.Client(self.url, **options)

    def async_client(self, **options) -> stacyvm.AsyncClient:
        options.setdefault("api_key", self.api_key)
        return stacyvm.AsyncClient(self.url, **options)


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.exit(f"{name} is not set; run scripts/test-sdk-python.sh, which sets it", returncode=2)
    return value


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(extra: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STACYVM_")}
    provider = os.environ.get("STACYVM_TEST_PROVIDER")
    if provider:
        extra = {"STACYVM_PROVIDERS_DEFAULT": provider, f"STACYVM_PROVIDERS_{provider.upper()}_ENABLED": "true", **extra}
    return {**kept, **extra}


@contextlib.contextmanager
def _serve(directory: Path, api_key: str | None = None, extra: dict[str, str] | None = None):
    binary = _required("STACYVM_BIN")
    data_dir = directory / "data"
    environment = _environment({**(extra or {}), **({"STACYVM_AUTH_API_KEY": api_key} if api_key else {})})
    image = os.environ.get("STACYVM_TEST_IMAGE")
    if image:
        imported = subprocess.run(
            [binary, "image", "import", image, "--data-dir", str(data_dir)],
            env=environment, capture_output=True, text=True, timeout=START_SECONDS, check=False,
        )
        assert imported.returncode == 0, f"importing the test image failed: {imported.stdout}{imported.stderr}"
    port = _free_port()
    log = directory / "server.log"
    command = [binary, "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(data_dir),
               "--destroy-on-exit"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    server = Server(f"http://127.0.0.1:{port}", log, process, api_key)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "no exit in time"
    assert code == 0, f"the server ended with {code}:\n{log.read_text(errors='replace')[-4000:]}"


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    answer = "nothing"
    with server.raw() as http:
        while time.monotonic() < end:
            if server.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                response = http.get("/ready")
                answer = f"{response.status_code} {response.text}"
                if response.status_code == 200:
                    return
            time.sleep(0.05)
    log = server.log.read_text(errors="replace")[-4000:]
    raise AssertionError(f"the server is not ready after {START_SECONDS} s: {answer}\n{log}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An open server, as on a developer's machine."""
    with _serve(tmp_path_factory.mktemp("open")) as running:
        yield running


@pytest.fixture(scope="session")
def keyed_server(tmp_path_factory):
    """A server that demands a key."""
    key = "sdk-test-key-" + "0123456789abcdef" * 2
    with _serve(tmp_path_factory.mktemp("keyed"), api_key=key) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture
def sandbox(client):
    with client.spawn() as sandbox:
        yield sandbox


@pytest.fixture
def http(server):
    with server.raw() as http:
        yield http


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def async_client(server):
    async with server.async_client() as client:
        yield client


@pytest.fixture
async def async_sandbox(async_client):
    async with await async_client.spawn() as sandbox:
        yield sandbox
