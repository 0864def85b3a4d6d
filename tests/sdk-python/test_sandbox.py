"""Every method of `stacyvm.Sandbox`."""

import re
import threading
import time
from datetime import datetime

import httpx
import pytest
from stacyvm import ProviderError, SandboxNotFound, StacyVMError


def test_exec_gives_exit_code_output_and_duration(sandbox):
    result = sandbox.exec("echo hello")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "hello\n", "")
    assert re.fullmatch(r"[0-9.]+(ns|µs|ms|s)", result.duration)


def test_a_failing_command_is_a_result(sandbox):
    result = sandbox.exec("echo out; echo err >&2; exit 42")
    assert (result.exit_code, result.stdout, result.stderr) == (42, "out\n", "err\n")
    assert sandbox.exec("no-such-program-here").exit_code == 127
    assert sandbox.exec("").exit_code == 0


def test_shell_mode_quotes_the_arguments(sandbox):
    hostile = ["a b", "$HOME", "*", "it's", '"', ";echo no", "`id`", "ü"]
    result = sandbox.exec("printf '%s|'", args=hostile)
    assert result.stdout == "".join(f"{argument}|" for argument in hostile)


def test_argv_mode_uses_no_shell(sandbox):
    result = sandbox.exec("echo", args=["$HOME", "a b", ";", "*"], mode="argv")
    assert result.stdout == "$HOME a b ; *\n"
    for mode in ["nonsense", "Shell "]:
        with pytest.raises(StacyVMError) as refused:
            sandbox.exec("echo", mode=mode)
        assert refused.value.code == "BAD_REQUEST"
    with pytest.raises(StacyVMError) as refused:
        sandbox.exec("  ", mode="argv")
    assert refused.value.code == "BAD_REQUEST"


def test_env_and_workdir(sandbox):
    assert sandbox.exec("pwd").stdout == "/workspace\n"
    result = sandbox.exec('echo "$MY_VAR"; pwd', env={"MY_VAR": "with  spaces ü"}, workdir="/tmp")
    assert result.stdout == "with  spaces ü\n/tmp\n"


def test_a_timeout_ends_the_command(sandbox):
    start = time.monotonic()
    with pytest.raises(StacyVMError) as late:
        sandbox.exec("echo begun; sleep 60", timeout="1s")
    assert late.value.code == "TIMEOUT"
    assert time.monotonic() - start < 30, "the deadline did not end the command"
    assert sandbox.exec("echo alive", timeout="20s").stdout == "alive\n"


@pytest.mark.parametrize(("timeout", "code"), [
    ("soon", "BAD_REQUEST"), ("5", "BAD_REQUEST"), ("-1s", "BAD_REQUEST|RESOURCE_LIMIT"), ("1000h", "RESOURCE_LIMIT"),
])
def test_a_timeout_that_makes_no_sense_is_refused(sandbox, timeout, code):
    with pytest.raises(StacyVMError) as refused:
        sandbox.exec("true", timeout=timeout)
    assert refused.value.code in code.split("|")


def test_exec_stream_delivers_while_the_command_runs(sandbox):
    chunks = sandbox.exec_stream("echo one; while [ ! -e /workspace/go ]; do sleep 0.1; done; echo two; echo err >&2")
    first = next(chunks)
    assert (first.stream, first.data) == ("stdout", "one\n")
    # The command waits for this file: its second line was not there before.
    sandbox.write_file("/workspace/go", "")
    rest = list(chunks)
    assert {chunk.stream for chunk in rest} <= {"stdout", "stderr"}
    assert "".join(chunk.data for chunk in rest if chunk.stream == "stdout") == "two\n"
    assert "".join(chunk.data for chunk in rest if chunk.stream == "stderr") == "err\n"


def test_exec_stream_takes_the_same_options(sandbox):
    chunks = sandbox.exec_stream("printf", args=["%s-%s", "a b", "$X"], mode="argv", workdir="/tmp", env={"X": "y"})
    assert "".join(chunk.data for chunk in chunks) == "a b-$X"
    chunks = sandbox.exec_stream("pwd; echo $X", workdir="/tmp", env={"X": "y"})
    assert "".join(chunk.data for chunk in chunks) == "/tmp\ny\n"


def test_exec_stream_does_not_cut_characters(sandbox):
    text = "ü漢🦀" * 3000
    sandbox.write_file("/workspace/text", text)
    assert "".join(chunk.data for chunk in sandbox.exec_stream("cat /workspace/text")) == text


def test_a_refused_stream_is_an_error(sandbox):
    sandbox.destroy()
    # The SDK cannot read a refusal's body here: its own limitation.
    with pytest.raises((httpx.ResponseNotRead, StacyVMError)):
        list(sandbox.exec_stream("true"))


def test_files_are_written_and_read(sandbox):
    sandbox.write_file("/workspace/dir/hello.txt", "hello world")
    assert sandbox.read_file("/workspace/dir/hello.txt") == "hello world"
    assert sandbox.exec("cat /workspace/dir/hello.txt").stdout == "hello world"
    sandbox.write_file("/workspace/dir/hello.txt", "short")
    assert sandbox.read_file("/workspace/dir/hello.txt") == "short"
    for text in ["", "ünïcödé 漢字 🦀\n", "line\r\nline\0nul", "x" * 2_000_000]:
        sandbox.write_file("/workspace/text", text)
        assert sandbox.read_file("/workspace/text") == text


def test_the_mode_of_a_written_file(sandbox):
    sandbox.write_file("/workspace/run.sh", "#!/bin/sh\necho it ran\n", mode="0755")
    assert sandbox.stat_file("/workspace/run.sh")["mode"] == "0755"
    assert sandbox.exec("/workspace/run.sh").stdout == "it ran\n"
    sandbox.write_file("/workspace/plain", "x")
    assert sandbox.stat_file("/workspace/plain")["mode"] == "0644"
    with pytest.raises(StacyVMError) as refused:
        sandbox.write_file("/workspace/plain", "x", mode="rwx")
    assert refused.value.code == "BAD_REQUEST"


def test_list_files(sandbox):
    for name in ["b.txt", "a.txt", "sub/c.txt", "with space & plus+.txt"]:
        sandbox.write_file(f"/workspace/list/{name}", name)
    listed = sandbox.list_files("/workspace/list")
    assert [entry["path"] for entry in listed] == [
        "/workspace/list/a.txt", "/workspace/list/b.txt", "/workspace/list/sub",
        "/workspace/list/with space & plus+.txt",
    ]
    assert [entry["is_dir"] for entry in listed] == [False, False, True, False]
    assert listed[0]["size"] == 5
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", listed[0]["mod_time"])
    assert sandbox.read_file("/workspace/list/with space & plus+.txt") == "with space & plus+.txt"
    assert "/workspace" in [entry["path"] for entry in sandbox.list_files()]
    assert sandbox.list_files("/workspace/list/sub")[0]["path"] == "/workspace/list/sub/c.txt"


def test_delete_file(sandbox):
    sandbox.write_file("/workspace/gone.txt", "x")
    sandbox.delete_file("/workspace/gone.txt")
    with pytest.raises(StacyVMError):
        sandbox.read_file("/workspace/gone.txt")
    sandbox.write_file("/workspace/tree/deep/file", "x")
    with pytest.raises(StacyVMError) as full:
        sandbox.delete_file("/workspace/tree")
    assert full.value.code == "FILE_CONFLICT"
    sandbox.delete_file("/workspace/tree", recursive=True)
    assert "/workspace/tree" not in [entry["path"] for entry in sandbox.list_files("/workspace")]


def test_move_file(sandbox):
    sandbox.write_file("/workspace/old.txt", "moved")
    sandbox.move_file("/workspace/old.txt", "/workspace/new/place/new.txt")
    assert sandbox.read_file("/workspace/new/place/new.txt") == "moved"
    with pytest.raises(StacyVMError):
        sandbox.read_file("/workspace/old.txt")


def test_chmod_and_stat(sandbox):
    sandbox.write_file("/workspace/file", "hello world")
    sandbox.chmod_file("/workspace/file", "755")
    info = sandbox.stat_file("/workspace/file")
    assert (info["path"], info["size"], info["is_dir"], info["mode"]) == ("/workspace/file", 11, False, "0755")
    sandbox.chmod_file("/workspace/file", "0600")
    assert sandbox.stat_file("/workspace/file")["mode"] == "0600"
    assert sandbox.stat_file("/workspace")["is_dir"] is True
    with pytest.raises(StacyVMError) as refused:
        sandbox.chmod_file("/workspace/file", "u+x!")
    assert refused.value.code == "BAD_REQUEST"


def test_glob_files(sandbox):
    for name in ["a.log", "b.log", "c.txt", "sub/d.log"]:
        sandbox.write_file(f"/workspace/{name}", "x")
    assert sandbox.glob_files("/workspace/*.log") == ["/workspace/a.log", "/workspace/b.log"]
    assert sandbox.glob_files("/workspace/**/*.log") == [
        "/workspace/a.log", "/workspace/b.log", "/workspace/sub/d.log",
    ]
    assert sandbox.glob_files("/workspace/*.none") == []


def test_a_missing_file_names_its_path(sandbox):
    missing = "/workspace/not here.txt"
    for call in (sandbox.read_file, sandbox.stat_file, sandbox.delete_file, sandbox.list_files):
        with pytest.raises(SandboxNotFound, match="not here.txt"):
            call(missing)
    for call in (lambda: sandbox.move_file(missing, "/x"), lambda: sandbox.chmod_file(missing, "644")):
        with pytest.raises(SandboxNotFound):
            call()


@pytest.mark.parametrize("path", ["", "   ", "/workspace/nul\0byte"])
def test_paths_that_cannot_be_are_refused(sandbox, path):
    for call in (sandbox.read_file, sandbox.stat_file, sandbox.delete_file):
        with pytest.raises(StacyVMError) as refused:
            call(path)
        assert refused.value.code == "BAD_REQUEST"
    with pytest.raises(StacyVMError) as refused:
        sandbox.write_file(path, "x")
    assert refused.value.code == "BAD_REQUEST"


def test_extend_ttl_counts_from_now(sandbox):
    sandbox.extend_ttl("3h")
    expires = datetime.fromisoformat(sandbox._info["expires_at"].replace("Z", "+00:00"))
    left = expires.timestamp() - time.time()
    assert 3 * 3600 - 60 < left < 3 * 3600 + 60
    sandbox.extend_ttl()
    shorter = datetime.fromisoformat(sandbox._info["expires_at"].replace("Z", "+00:00"))
    assert shorter < expires
    for ttl in ["soon", "0s", "-1m"]:
        with pytest.raises(StacyVMError) as refused:
            sandbox.extend_ttl(ttl)
        assert refused.value.code == "BAD_REQUEST"
    with pytest.raises(StacyVMError) as refused:
        sandbox.extend_ttl("1000h")
    assert refused.value.code == "RESOURCE_LIMIT"


def test_destroy_is_final_and_may_be_repeated(client):
    sandbox = client.spawn()
    sandbox.destroy()
    sandbox.destroy()
    for call in (
        lambda: sandbox.exec("true"),
        lambda: sandbox.read_file("/etc/hostname"),
        lambda: sandbox.write_file("/workspace/x", "x"),
        lambda: sandbox.list_files(),
        lambda: sandbox.glob_files("/*"),
        lambda: sandbox.extend_ttl("5m"),
        lambda: sandbox.refresh(),
    ):
        with pytest.raises(SandboxNotFound):
            call()


def test_leaving_the_context_destroys(client):
    with client.spawn() as sandbox:
        assert sandbox.exec("echo in").stdout == "in\n"
    with pytest.raises(SandboxNotFound):
        client.get(sandbox.id)


def test_refresh_reads_the_record_again(client, sandbox):
    other = client.get(sandbox.id)
    other._info = {}
    assert (other.state, other.provider, other.image) == ("unknown", "", "")
    other.refresh()
    assert (other.state, other.provider, other.image) == ("running", sandbox.provider, "alpine:latest")


def test_the_preview_url_has_the_published_form(sandbox):
    domain = sandbox._info.get("preview_domain", "localhost")
    assert sandbox.get_preview_url(3000) == f"http://3000-{sandbox.id}.{domain}"
    assert sandbox.get_preview_url(8080).startswith(f"http://8080-{sandbox.id}.")


def test_many_threads_share_one_sandbox(sandbox):
    results: dict[int, str] = {}

    def work(number: int) -> None:
        sandbox.write_file(f"/workspace/thread-{number}", f"content {number}")
        results[number] = sandbox.exec(f"cat /workspace/thread-{number}").stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {number: f"content {number}" for number in range(10)}


def test_errors_of_the_server_are_provider_errors_only_from_500_on(sandbox):
    with pytest.raises(StacyVMError) as refused:
        sandbox.exec("true", workdir="/no/such/directory")
    assert not isinstance(refused.value, ProviderError), refused.value.code
