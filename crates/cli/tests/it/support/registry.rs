//! A real registry on loopback.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::run;

/// Pushes the blobs of an OCI layout, and its manifest under a name.
const PUSH: &str = r#"
set -euo pipefail
cd "$1"; repository="http://$2/v2/$3" digest=$4 type=$5 tag=$6
for blob in blobs/sha256/*; do
    location=$(curl -fsS -X POST -D - -o /dev/null "$repository/blobs/uploads/" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
    curl -fsS -X PUT -H 'Content-Type: application/octet-stream' --data-binary "@$blob" \
        "$location&digest=sha256:$(basename "$blob")"
done
curl -fsS -X PUT -H "Content-Type: $type" --data-binary "@blobs/sha256/${digest#sha256:}" "$repository/manifests/$tag"
"#;

/// Debian's `docker-registry`, ended with the value.
pub(crate) struct Registry {
    child: Child,
    /// `127.0.0.1:PORT`
    pub(crate) host: String,
    _directory: TempDir,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, config) = (directory.path().display(), directory.path().join("config.yml"));
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {path}/data}}}}\n\
             http: {{addr: '127.0.0.1:0', secret: test}}\n"
        );
        std::fs::write(&config, text).expect("written");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("docker-registry: {error}; install it (scripts/test-packages.txt)"));
        // It picks a free port and says which.
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
        let host = lines.find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.split(['"', ' ', ',']).next().unwrap_or_default().to_owned())
        });
        // Keeps the pipe from filling up; ends with the process.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, host: host.expect("it says where it listens"), _directory: directory }
    }

    /// Pushes the one image of an OCI layout as `HOST/name:tag`; returns that.
    pub(crate) async fn push(&self, layout: &Path, name: &str, tag: &str) -> String {
        let index = std::fs::read(layout.join("index.json")).expect("an OCI layout");
        let index: serde_json::Value = serde_json::from_slice(&index).expect("JSON");
        let manifest = &index["manifests"][0];
        let text = |key: &str| manifest[key].as_str().expect("text").to_owned();
        let mut push = tokio::process::Command::new("bash");
        push.args(["-c", PUSH, "push"]).arg(layout);
        push.args([&self.host, name, &text("digest"), &text("mediaType"), tag]);
        run(push, b"").await.ok();
        format!("{}/{name}:{tag}", self.host)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
