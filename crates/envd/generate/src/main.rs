//! Writes the Rust code of the agent protocol from its proto files.
//!
//! Run it after a change below `proto/` and commit what it writes. No `protoc`
//! is needed: protox compiles the descriptors.

use std::path::Path;

use anyhow::Context;
use buffa_codegen::{BytesRepr, CodeGenConfig};
use prost::Message;

const FILES: [&str; 3] = ["process/process.proto", "filesystem/filesystem.proto", "stacyvm/agent/v1/agent.proto"];

fn main() -> anyhow::Result<()> {
    let envd = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the generator lies inside crates/envd")?;
    let protos = envd.join("proto");
    let sources = FILES.map(|file| protos.join(file));

    let descriptors = protox::compile(&sources, [&protos])?;
    let set = tempfile::NamedTempFile::new()?;
    std::fs::write(set.path(), descriptors.encode_to_vec())?;

    let out = envd.join("src/gen");
    std::fs::create_dir_all(&out)?;

    let mut config = CodeGenConfig::default();
    config.preserve_unknown_fields = false;
    // A chunk read from a pipe moves into its message without a copy.
    config.bytes_fields = vec![(".".to_owned(), BytesRepr::Bytes)];

    connectrpc_build::Config::new()
        .buffa_config(config)
        .descriptor_set(set.path())
        .files(&FILES)
        .out_dir(&out)
        .include_file("mod.rs")
        .file_per_package(true)
        .emit_register_fn(false)
        .generate_json(true)
        .gate_client_feature(true)
        .emit_rerun_directives(false)
        .compile()?;
    Ok(())
}
