"""What the SDK sees of a server that demands a key."""

import pytest
from stacyvm import StacyVMError, Template

CALLS = {
    "spawn": lambda client: client.spawn(),
    "admission": lambda client: client.admission(),
    "get": lambda client: client.get("sb-00000000000000000000"),
    "list": lambda client: client.list(),
    "spawn_template": lambda client: client.spawn_template("any"),
    "prune": lambda client: client.prune(),
    "pool_status": lambda client: client.pool_status(),
    "quota_summary": lambda client: client.quota_summary(),
    "providers": lambda client: client.providers(),
    "templates.list": lambda client: client.templates.list(),
    "templates.get": lambda client: client.templates.get("any"),
    "templates.save": lambda client: client.templates.save(Template(name="any", image="alpine:latest")),
    "templates.delete": lambda client: client.templates.delete("any"),
}


@pytest.mark.parametrize("key", [None, "wrong-key"])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_without_the_right_key_is_unauthorized(keyed_server, name, key):
    with keyed_server.client(api_key=key) as client, pytest.raises(StacyVMError) as refused:
        CALLS[name](client)
    assert refused.value.code == "UNAUTHORIZED"
    assert keyed_server.api_key not in str(refused.value)


def test_calls_on_a_sandbox_need_the_key_too(keyed_server):
    with keyed_server.client() as owner, owner.spawn() as sandbox, keyed_server.client(api_key=None) as stranger:
        theirs = type(sandbox)(stranger._http, sandbox.id)
        for call in (
            lambda: theirs.exec("true"),
            lambda: theirs.read_file("/etc/hostname"),
            lambda: theirs.write_file("/workspace/x", "x"),
            lambda: theirs.list_files(),
            lambda: theirs.stat_file("/"),
            lambda: theirs.glob_files("/*"),
            lambda: theirs.move_file("/a", "/b"),
            lambda: theirs.chmod_file("/a", "644"),
            lambda: theirs.delete_file("/a"),
            lambda: theirs.extend_ttl(),
            lambda: theirs.refresh(),
            lambda: theirs.destroy(),
        ):
            with pytest.raises(StacyVMError) as refused:
                call()
            assert refused.value.code == "UNAUTHORIZED"
        assert sandbox.exec("echo mine").stdout == "mine\n"


def test_with_the_key_everything_works(keyed_server):
    with keyed_server.client() as client, client.spawn() as sandbox:
        assert sandbox.exec("echo keyed").stdout == "keyed\n"
        sandbox.write_file("/workspace/k", "v")
        assert sandbox.read_file("/workspace/k") == "v"


@pytest.mark.anyio
async def test_the_async_client_is_treated_the_same(keyed_server):
    async with keyed_server.async_client(api_key="wrong") as client:
        with pytest.raises(StacyVMError) as refused:
            await client.spawn()
        assert refused.value.code == "UNAUTHORIZED"
    async with keyed_server.async_client() as client, await client.spawn() as sandbox:
        assert (await sandbox.exec("echo keyed")).stdout == "keyed\n"


def test_the_key_is_not_in_the_log(keyed_server):
    assert keyed_server.api_key.encode() not in keyed_server.log.read_bytes()


def test_a_key_made_on_the_server_works_until_it_is_revoked(keyed_server):
    with keyed_server.raw() as admin:
        made = admin.post("/admin/keys", json={"name": "sdk", "ttl": "1h", "owner_id": "alice"}).json()
        key = made["key"]
        with keyed_server.client(api_key=key) as client, client.spawn() as sandbox:
            assert sandbox.exec("echo stored").stdout == "stored\n"
            assert admin.get(f"/sandboxes/{sandbox.id}").json()["owner_id"] == "alice"
        assert admin.delete(f"/admin/keys/{made['id']}").status_code == 200
        with keyed_server.client(api_key=key) as client, pytest.raises(StacyVMError) as refused:
            client.list()
        assert refused.value.code == "UNAUTHORIZED"
        assert key not in str(refused.value)
        paths = [record["path"] for record in admin.get("/admin/audit", params={"actor": "key:sdk"}).json()]
    assert "/api/v1/sandboxes" in paths and f"/api/v1/sandboxes/{sandbox.id}/exec" in paths
    assert key.encode() not in keyed_server.log.read_bytes()
