"""Every method of `stacyvm.AsyncClient` and `stacyvm.AsyncSandbox`."""

import anyio
import pytest
import stacyvm
from stacyvm import SandboxNotFound, StacyVMError, Template

pytestmark = pytest.mark.anyio


async def test_client_methods_that_make_nothing(async_client):
    assert (await async_client.health())["status"] == "ok"
    assert (await async_client.pool_status())["enabled"] is False
    assert (await async_client.quota_summary()).total >= 0
    assert [p for p in await async_client.providers() if p["default"]][0]["healthy"] is True
    assert (await async_client.admission(image="alpine:latest", ttl="5m")).allowed is True
    denied = await async_client.admission(ttl="1000h")
    assert (denied.allowed, "ttl" in denied.reason) == (False, True)
    assert isinstance(await async_client.prune(), int)
    with pytest.raises(SandboxNotFound):
        await async_client.get("sb-00000000000000000000")


async def test_spawn_list_get_destroy(async_client):
    sandbox = await async_client.spawn(memory_mb=128, ttl="5m", metadata={"async": "yes"})
    assert sandbox.id.startswith("sb-")
    assert (sandbox.state, sandbox.image) == ("running", "alpine:latest")
    assert sandbox.provider
    assert repr(sandbox) == f"AsyncSandbox(id='{sandbox.id}', state='running')"
    info = next(info for info in await async_client.list() if info.id == sandbox.id)
    assert (info.memory_mb, info.metadata) == (128, {"async": "yes"})
    assert (await async_client.get(sandbox.id)).id == sandbox.id
    await sandbox.destroy()
    await sandbox.destroy()
    with pytest.raises(SandboxNotFound):
        await sandbox.refresh()
    assert sandbox.id not in [info.id for info in await async_client.list()]


async def test_spawn_template(client, async_client):
    client.templates.save(Template(name="sdk-async", image="alpine:latest", memory_mb=160))
    try:
        async with await async_client.spawn_template("sdk-async") as sandbox:
            assert sandbox._info["memory_mb"] == 160
            assert (await sandbox.exec("echo templated")).stdout == "templated\n"
    finally:
        client.templates.delete("sdk-async")
    with pytest.raises(SandboxNotFound):
        await async_client.spawn_template("sdk-async")


async def test_exec(async_sandbox):
    result = await async_sandbox.exec("echo out; echo err >&2; exit 3", env={"A": "b"}, workdir="/tmp")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")
    result = await async_sandbox.exec("echo", args=["$HOME", "a b"], mode="argv")
    assert result.stdout == "$HOME a b\n"
    with pytest.raises(StacyVMError) as late:
        await async_sandbox.exec("sleep 60", timeout="1s")
    assert late.value.code == "TIMEOUT"


async def test_exec_stream_delivers_while_the_command_runs(async_sandbox):
    command = "echo one; while [ ! -e /workspace/go ]; do sleep 0.1; done; echo two"
    data = ""
    async for chunk in async_sandbox.exec_stream(command):
        assert chunk.stream == "stdout"
        data += chunk.data
        if data == "one\n":
            await async_sandbox.write_file("/workspace/go", "")
    assert data == "one\ntwo\n"


async def test_a_quiet_stream_stays_parseable(async_sandbox):
    # The async parser raises on anything that is not JSON, heartbeats included.
    chunks = [chunk async for chunk in async_sandbox.exec_stream("sleep 3; echo late")]
    assert "".join(chunk.data for chunk in chunks) == "late\n"


async def test_files(async_sandbox):
    await async_sandbox.write_file("/workspace/d/a.txt", "hello world", mode="0640")
    assert await async_sandbox.read_file("/workspace/d/a.txt") == "hello world"
    info = await async_sandbox.stat_file("/workspace/d/a.txt")
    assert (info["size"], info["mode"], info["is_dir"]) == (11, "0640", False)
    await async_sandbox.chmod_file("/workspace/d/a.txt", "0755")
    assert (await async_sandbox.stat_file("/workspace/d/a.txt"))["mode"] == "0755"
    await async_sandbox.move_file("/workspace/d/a.txt", "/workspace/d/b.txt")
    assert [entry["path"] for entry in await async_sandbox.list_files("/workspace/d")] == ["/workspace/d/b.txt"]
    assert await async_sandbox.glob_files("/workspace/**/*.txt") == ["/workspace/d/b.txt"]
    assert await async_sandbox.glob_files("/workspace/*.none") == []
    with pytest.raises(StacyVMError):
        await async_sandbox.delete_file("/workspace/d")
    await async_sandbox.delete_file("/workspace/d", recursive=True)
    with pytest.raises(SandboxNotFound, match="b.txt"):
        await async_sandbox.read_file("/workspace/d/b.txt")


async def test_extend_ttl_and_preview_url(async_sandbox):
    before = async_sandbox._info["expires_at"]
    await async_sandbox.extend_ttl("2h")
    assert async_sandbox._info["expires_at"] != before
    assert async_sandbox.get_preview_url(3000).startswith(f"http://3000-{async_sandbox.id}.")


async def test_many_sandboxes_at_once(async_client):
    outputs: dict[int, str] = {}

    async def one(number: int) -> None:
        async with await async_client.spawn() as sandbox:
            await sandbox.write_file("/workspace/n", str(number))
            outputs[number] = (await sandbox.exec("cat /workspace/n")).stdout

    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(one, number)
    assert outputs == {number: str(number) for number in range(8)}


async def test_leaving_the_context_destroys(async_client):
    async with await async_client.spawn() as sandbox:
        assert (await sandbox.exec("true")).exit_code == 0
    with pytest.raises(SandboxNotFound):
        await async_client.get(sandbox.id)


async def test_a_server_that_is_not_there_is_a_connection_error():
    async with stacyvm.AsyncClient("http://127.0.0.1:1") as nowhere:
        with pytest.raises(stacyvm.ConnectionError):
            await nowhere.spawn()
        with pytest.raises(stacyvm.ConnectionError):
            await nowhere.spawn_template("any")


async def test_close_ends_the_client(server):
    client = server.async_client()
    assert (await client.health())["status"] == "ok"
    await client.close()
    with pytest.raises(RuntimeError):
        await client.health()
