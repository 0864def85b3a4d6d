"""Every method of `stacyvm.Client` and of its managers."""

import re
import time
from datetime import datetime, timezone

import pytest
import stacyvm
from stacyvm import SandboxNotFound, StacyVMError, Template
from stacyvm.providers import ProviderManager


def when(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    assert moment.utcoffset().total_seconds() == 0
    return moment


def test_spawn_gives_a_running_sandbox_of_the_default_image(client):
    sandbox = client.spawn()
    try:
        assert re.fullmatch(r"sb-[0-9a-z]{20}", sandbox.id)
        assert sandbox.state == "running"
        assert sandbox.image == "alpine:latest"
        assert sandbox.provider
        assert repr(sandbox) == f"Sandbox(id='{sandbox.id}', state='running')"
    finally:
        sandbox.destroy()


def test_spawn_keeps_all_that_it_was_asked_for(client):
    sandbox = client.spawn(
        image="alpine:latest", memory_mb=256, vcpus=1, ttl="10m", owner_id="owner@example.com",
        metadata={"purpose": "test", "ünï": "cödé"},
    )
    with sandbox:
        info = sandbox._info
        assert info["memory_mb"] == 256
        assert info["vcpus"] == 1
        assert isinstance(info["vcpus"], int)
        assert info["owner_id"] == "owner@example.com"
        assert info["metadata"] == {"purpose": "test", "ünï": "cödé"}
        lifetime = when(info["expires_at"]) - when(info["created_at"])
        assert 590 < lifetime.total_seconds() < 610


def test_the_provider_can_be_named(client):
    name = client.providers()[0]["name"]
    with client.spawn(provider=name) as sandbox:
        assert sandbox.provider == name
    with pytest.raises(SandboxNotFound, match="no-such-provider"):
        client.spawn(provider="no-such-provider")


def test_the_user_id_is_the_owner(server):
    for user in ["testuser", "user@example.com"]:
        with server.client(user_id=user) as client, client.spawn(owner_id="somebody-else") as sandbox:
            assert sandbox._info["owner_id"] == user


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"ttl": "soon"}, "BAD_REQUEST"),
        ({"ttl": "-5m"}, "BAD_REQUEST"),
        ({"ttl": "1000h"}, "RESOURCE_LIMIT"),
        ({"owner_id": "no spaces"}, "BAD_REQUEST"),
        ({"memory_mb": "much"}, "BAD_REQUEST"),
        ({"metadata": ["no", "map"]}, "BAD_REQUEST"),
    ],
)
def test_spawn_refuses_what_makes_no_sense(client, options, code):
    before = len(client.list())
    with pytest.raises(StacyVMError) as refused:
        client.spawn(**options)
    assert refused.value.code == code
    assert str(refused.value)
    assert len(client.list()) == before


def test_spawn_of_an_image_that_does_not_exist_is_a_typed_error(client):
    with pytest.raises(StacyVMError) as refused:
        client.spawn(image="stacyvm.invalid/no/such:image")
    assert refused.value.code in {"IMAGE_NOT_FOUND", "REGISTRY_UNAVAILABLE", "NOT_FOUND"}
    assert "stacyvm.invalid" in str(refused.value)


def test_admission_says_yes_without_making_anything(client):
    before = len(client.list())
    decision = client.admission(image="alpine:latest", memory_mb=128, vcpus=1, ttl="5m", metadata={"a": "b"})
    assert decision.allowed is True
    assert decision.reason == ""
    assert decision.active_sandboxes == before
    assert len(client.list()) == before
    assert client.admission().allowed is True


def test_admission_says_no_and_why(client):
    decision = client.admission(ttl="1000h", owner_id="owner")
    assert decision.allowed is False
    assert "ttl" in decision.reason
    unknown = client.admission(provider="no-such-provider")
    assert unknown.allowed is False
    with pytest.raises(StacyVMError) as refused:
        client.admission(ttl="soon")
    assert refused.value.code == "BAD_REQUEST"


def test_get_finds_what_was_spawned(client, sandbox):
    found = client.get(sandbox.id)
    assert (found.id, found.state, found.image) == (sandbox.id, "running", "alpine:latest")
    assert found.exec("echo found").stdout == "found\n"


def test_get_of_something_unknown_or_destroyed_is_not_found(client):
    for unknown in ["sb-00000000000000000000", "sb-00000000", "nonsense"]:
        with pytest.raises(SandboxNotFound) as missing:
            client.get(unknown)
        assert missing.value.code == "NOT_FOUND"
    sandbox = client.spawn()
    sandbox.destroy()
    with pytest.raises(SandboxNotFound):
        client.get(sandbox.id)


def test_list_shows_the_newest_first_and_no_destroyed_ones(client):
    with client.spawn(metadata={"n": "1"}) as first, client.spawn(memory_mb=256) as second:
        listed = client.list()
        ids = [info.id for info in listed]
        assert ids.index(second.id) < ids.index(first.id)
        info = next(info for info in listed if info.id == second.id)
        assert (info.state, info.image, info.memory_mb, info.vcpus) == ("running", "alpine:latest", 256, 1)
        assert when(info.created_at) < when(info.expires_at)
        assert info.metadata == {}
        assert next(info for info in listed if info.id == first.id).metadata == {"n": "1"}
    assert not {first.id, second.id} & {info.id for info in client.list()}


def test_prune_destroys_what_has_expired_and_only_that(client, sandbox):
    short = client.spawn(ttl="1s")
    expires = when(short._info["expires_at"])
    end = time.monotonic() + 30
    pruned = 0
    while short.id in {info.id for info in client.list()}:
        assert time.monotonic() < end, "an expired sandbox is still there"
        result = client.prune()
        assert isinstance(result, int)
        if result:
            assert datetime.now(timezone.utc) >= expires
        pruned += result
        time.sleep(0.1)
    # The server's own reaper may have come first.
    assert pruned <= 1
    assert client.get(sandbox.id).state == "running"


def test_pool_status_reports_that_there_is_none(client):
    assert client.pool_status()["enabled"] is False


def test_quota_summary_counts(client, http):
    before = client.quota_summary()
    saved = http.put("/quotas/sdk-owner", json={"max_sandboxes": 3, "max_ttl": "1h", "max_exec_timeout": ""})
    assert saved.status_code == 200, saved.text
    try:
        after = client.quota_summary()
        assert after.total == before.total + 1
        assert after.with_max_sandboxes == before.with_max_sandboxes + 1
        assert after.with_max_ttl == before.with_max_ttl + 1
        assert after.with_max_exec_timeout == before.with_max_exec_timeout
        with pytest.raises(StacyVMError) as refused:
            client.spawn(owner_id="sdk-owner", ttl="2h")
        assert refused.value.code == "RESOURCE_LIMIT"
    finally:
        assert http.delete("/quotas/sdk-owner").status_code == 200
    assert client.quota_summary() == before


def test_health(client):
    health = client.health()
    assert health["status"] == "ok"
    assert health["version"]


def test_providers(client):
    providers = client.providers()
    assert [p["name"] for p in providers] == sorted(p["name"] for p in providers)
    default = [p for p in providers if p["default"]]
    assert len(default) == 1
    assert default[0]["healthy"] is True
    assert {"exec", "exec_stream", "files"} <= set(default[0]["capabilities"])


def test_the_provider_manager(client):
    manager = ProviderManager(client._http)
    names = [p["name"] for p in manager.list()]
    assert names == [p["name"] for p in client.providers()]
    tested = manager.test()
    assert set(tested) == set(names)
    assert all(isinstance(healthy, bool) for healthy in tested.values())


def test_templates_round_trip_every_field(client):
    template = Template(
        name="sdk-template", image="alpine:latest", memory_mb=192, vcpus=1, ttl="7m",
        provider=client.providers()[0]["name"], metadata={"team": "sdk"},
    )
    assert client.templates.save(template) == Template(**{**vars(template), "ttl": "7m0s"})
    try:
        found = client.templates.get("sdk-template")
        assert found == Template(**{**vars(template), "ttl": "7m0s"})
        assert found in client.templates.list()
        with pytest.raises(StacyVMError) as taken:
            client.templates.save(template)
        assert taken.value.code == "CONFLICT"
        with client.spawn_template("sdk-template") as sandbox:
            info = sandbox._info
            assert (sandbox.state, info["memory_mb"]) == ("running", 192)
            assert info["metadata"]["template"] == "sdk-template"
            assert info["metadata"]["team"] == "sdk"
            lifetime = when(info["expires_at"]) - when(info["created_at"])
            assert 410 < lifetime.total_seconds() < 430
            assert sandbox.exec("echo from a template").stdout == "from a template\n"
        with client.spawn(template="sdk-template") as sandbox:
            assert sandbox._info["memory_mb"] == 192
    finally:
        client.templates.delete("sdk-template")
    for missing in (client.templates.get, client.templates.delete, client.spawn_template):
        with pytest.raises(SandboxNotFound, match="sdk-template"):
            missing("sdk-template")
    assert "sdk-template" not in [t.name for t in client.templates.list()]


def test_a_template_with_only_what_it_needs(client):
    saved = client.templates.save(Template(name="sdk-minimal", image="alpine:latest", ttl="", provider=""))
    try:
        assert (saved.name, saved.image, saved.metadata) == ("sdk-minimal", "alpine:latest", {})
        with client.spawn_template("sdk-minimal") as sandbox:
            assert sandbox.exec("echo ok").exit_code == 0
    finally:
        client.templates.delete("sdk-minimal")


def test_spawn_with_an_unknown_template_is_not_found(client):
    with pytest.raises(SandboxNotFound, match="no-such-template"):
        client.spawn(template="no-such-template")


def test_a_server_that_is_not_there_is_a_connection_error():
    with stacyvm.Client("http://127.0.0.1:1") as nowhere:
        with pytest.raises(stacyvm.ConnectionError):
            nowhere.spawn()
        with pytest.raises(stacyvm.ConnectionError):
            nowhere.spawn_template("any")


def test_close_ends_the_client(server):
    client = server.client()
    assert client.health()["status"] == "ok"
    client.close()
    with pytest.raises(RuntimeError):
        client.health()
