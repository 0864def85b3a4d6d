//! Builds `stacyvm-agent` as a static program for the target of this build.
//!
//! It is a build of its own, in a target directory of its own: the agent wants
//! another profile and other flags than the program that carries it, and the
//! outer build's lock must not be waited for.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Use this file instead of building one.
const PREBUILT: &str = "STACYVM_AGENT_BINARY";

/// What the inner cargo may inherit. Everything else that Cargo sets for a build
/// script (and a clippy or coverage wrapper) would change or break its build.
const KEPT: [&str; 6] =
    ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_CAINFO", "CARGO_HTTP_PROXY", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"];

/// Static, and at a fixed address: a program that has to relocate itself first
/// touches all its tables before it does anything, in every sandbox.
const RUSTFLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

fn main() {
    let out_dir = PathBuf::from(required("OUT_DIR"));
    let destination = out_dir.join("stacyvm-agent");
    println!("cargo::rerun-if-env-changed={PREBUILT}");
    if let Some(prebuilt) = env::var_os(PREBUILT) {
        println!("cargo::rerun-if-changed={}", Path::new(&prebuilt).display());
        std::fs::copy(&prebuilt, &destination).expect("STACYVM_AGENT_BINARY names a readable file");
        return;
    }

    let workspace = workspace();
    for input in ["Cargo.toml", "Cargo.lock", "crates/agent/Cargo.toml", "crates/agent/src", "crates/envd/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo::rerun-if-changed={}", workspace.join("crates/envd/src").display());

    let target = required("TARGET");
    let profile = if required("PROFILE") == "release" { "agent" } else { "agent-dev" };
    let target_dir = target_dir(&out_dir, &target).join("agent-build");
    build(&workspace, &target_dir, &target, profile);

    let built = target_dir.join(&target).join(profile).join("stacyvm-agent");
    std::fs::copy(&built, &destination).unwrap_or_else(|error| panic!("copy {}: {error}", built.display()));
}

fn build(workspace: &Path, target_dir: &Path, target: &str, profile: &str) {
    let mut command = Command::new(required("CARGO"));
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let ours = text.starts_with("CARGO") || text.starts_with("RUST") || text.starts_with("DEP_");
        if (ours && !KEPT.contains(&text))
            || ["TARGET", "HOST", "OUT_DIR", "PROFILE", "OPT_LEVEL", "DEBUG"].contains(&text)
        {
            command.env_remove(name);
        }
    }
    let status = command
        .current_dir(workspace)
        .env("RUSTFLAGS", RUSTFLAGS)
        .args(["build", "--package", "stacyvm-agent", "--bin", "stacyvm-agent", "--features", "quiet", "--locked"])
        .args(["--profile", profile, "--target", target])
        .arg("--target-dir")
        .arg(target_dir)
        .status()
        .expect("cargo can be run");
    assert!(status.success(), "building the static agent failed: {status}");
}

fn workspace() -> PathBuf {
    let manifest = PathBuf::from(required("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).expect("this crate lies in crates/").to_owned()
}

/// The outer target directory: `OUT_DIR` is `<dir>[/<triple>]/<profile>/build/<package>/out`.
fn target_dir(out_dir: &Path, target: &str) -> PathBuf {
    let above_profile = out_dir.ancestors().nth(4).expect("Cargo's layout of OUT_DIR");
    let is_triple = above_profile.file_name().is_some_and(|name| name == target);
    let dir = if is_triple { above_profile.parent().unwrap_or(above_profile) } else { above_profile };
    dir.to_owned()
}

fn required(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("Cargo sets {name}"))
}
