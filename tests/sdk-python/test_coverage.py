"""The SDK has no public method that these tests do not call."""

import ast
import inspect
from pathlib import Path

import pytest
import stacyvm
from stacyvm.providers import ProviderManager
from stacyvm.templates import TemplateManager

CLIENT = {
    "spawn", "admission", "get", "list", "spawn_template", "prune", "pool_status", "quota_summary", "health",
    "providers", "close",
}
SANDBOX = {
    "state", "provider", "image", "exec", "exec_stream", "write_file", "read_file", "list_files", "delete_file",
    "move_file", "chmod_file", "stat_file", "glob_files", "extend_ttl", "destroy", "refresh", "get_preview_url",
}


def public(cls) -> set[str]:
    return {name for name, _ in inspect.getmembers(cls) if not name.startswith("_")}


def called_in(file: str) -> set[str]:
    tree = ast.parse((Path(__file__).parent / file).read_text())
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize(
    ("cls", "methods", "file"),
    [
        (stacyvm.Client, CLIENT, "test_client.py"),
        (stacyvm.AsyncClient, CLIENT, "test_async.py"),
        (stacyvm.Sandbox, SANDBOX, "test_sandbox.py"),
        (stacyvm.AsyncSandbox, SANDBOX, "test_async.py"),
        (TemplateManager, {"list", "get", "save", "delete"}, "test_client.py"),
        (ProviderManager, {"list", "test"}, "test_client.py"),
    ],
)
def test_every_method_is_known_and_called(cls, methods, file):
    assert public(cls) == methods
    assert methods <= called_in(file), f"{file} does not call {methods - called_in(file)}"


def test_the_pinned_version_is_the_published_one():
    from importlib.metadata import version

    assert version("stacyvm") == "0.1.1"
