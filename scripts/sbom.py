"""What is built into the program, as CycloneDX 1.5 on standard output.

    sbom.py ROOT VERSION EPOCH

Every crate that `stacyvm` and the agent in it are linked from or built with, as
Cargo.lock has them: tests' own are left out.
"""

import datetime
import json
import subprocess
import sys
import uuid

# The agent is embedded as bytes, so that nothing links it.
ROOTS = ("stacyvm", "stacyvm-agent")


def built_from(metadata):
    """Ids of the packages behind the roots, and who uses whom."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    names = {package["id"]: package["name"] for package in metadata["packages"]}
    waiting = [node for node in nodes if names[node] in ROOTS]
    uses = {}
    while waiting:
        node = waiting.pop()
        if node in uses:
            continue
        kinds = lambda dep: {kind["kind"] for kind in dep["dep_kinds"]}
        uses[node] = sorted(dep["pkg"] for dep in nodes[node]["deps"] if kinds(dep) & {None, "build"})
        waiting += uses[node]
    return uses


def reference(package):
    return "pkg:cargo/{name}@{version}".format(**package)


def component(package, checksums):
    found = {
        "type": "library",
        "bom-ref": reference(package),
        "name": package["name"],
        "version": package["version"],
        "purl": reference(package),
    }
    if package.get("license"):
        found["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    checksum = checksums.get((package["name"], package["version"]))
    if checksum:
        found["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return found


def locked(root):
    """Checksums of Cargo.lock by name and version."""
    checksums, entry = {}, {}
    for line in open(f"{root}/Cargo.lock", encoding="utf-8"):
        key, _, value = line.strip().partition(" = ")
        if line.startswith("[[package]]"):
            entry = {}
        elif key in ("name", "version", "checksum"):
            entry[key] = value.strip('"')
            if key == "checksum":
                checksums[entry["name"], entry["version"]] = entry["checksum"]
    return checksums


def main():
    root, version, epoch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    target = next(
        line.split()[1] for line in subprocess.check_output(["rustc", "-vV"], text=True).splitlines()
        if line.startswith("host: ")
    )
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
    metadata = json.loads(subprocess.check_output(command, cwd=root))
    packages = {package["id"]: package for package in metadata["packages"]}
    uses, checksums = built_from(metadata), locked(root)
    program = next(package for package in packages.values() if package["name"] == "stacyvm")
    ours = {"type": "application", "bom-ref": reference(program), "name": "stacyvm", "version": version}
    components = [component(packages[id], checksums) for id in uses if packages[id] is not program]
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'stacyvm {version} {epoch} {len(components)}')}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.datetime.fromtimestamp(epoch, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": ours,
        },
        "components": sorted(components, key=lambda it: it["bom-ref"]),
        "dependencies": sorted(
            ({"ref": reference(packages[id]), "dependsOn": sorted({reference(packages[it]) for it in on})}
             for id, on in uses.items()),
            key=lambda it: it["ref"],
        ),
    }
    json.dump(bom, sys.stdout, indent=1)
    print()


main()
