//! The same pages out of a container of a docker daemon, which the test starts
//! itself.

#[path = "../../../providers/tests/it/dockerd.rs"]
#[expect(dead_code, reason = "shared with the tests of the provider, which use the rest")]
mod dockerd;

use std::path::Path;
use std::process::Command;

use dockerd::Dockerd;

use crate::pages::look_at_a_site;
use crate::server::Server;

const IMAGE: &str = "python-site";

/// Packs this machine's Python with the libraries it and its modules load, a
/// shell of busybox beside it, as the file system of an image.
const PACK: &str = r#"
set -eu
mkdir -p "$1/usr/bin" "$1/bin" "$1/tmp"
cp /bin/busybox "$1/bin/sh"
python=$(readlink -f /usr/bin/python3)
library=$(/usr/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
libraries=$(ldd "$python" "$library"/lib-dynload/*.so | grep -o '/[^ )]*\.so[^ :)]*' | grep -v lib-dynload | sort -u)
tar --create --dereference --exclude=__pycache__ --exclude=test --exclude='config-*' --file="$2" \
    -C / "${python#/}" "${library#/}" $(printf '%s\n' $libraries | sed 's,^/,,')
ln -s "$(basename "$python")" "$1/usr/bin/python3"
tar --append --file="$2" -C "$1" .
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_what_a_container_of_docker_serves() {
    let daemon = Dockerd::start();
    let work = tempfile::tempdir().unwrap();
    let archive = work.path().join("image.tar");
    pack(&work.path().join("root"), &archive);
    daemon.import(&archive, IMAGE, &[]);

    let socket = format!("unix://{}", daemon.socket().display());
    let settings = [
        ("DOCKER_HOST", socket.as_str()),
        ("STACYVM_PROVIDERS_DEFAULT", "docker"),
        ("STACYVM_PROVIDERS_OCI_ENABLED", "false"),
    ];
    let server = Server::start_with(None, &settings).await;
    let sandbox = server.sandbox_of(IMAGE).await;
    look_at_a_site(&server, &sandbox, "preview-docker").await;
    server.stop().await;
}

fn pack(root: &Path, archive: &Path) {
    let packed = Command::new("sh").args(["-c", PACK, "pack"]).arg(root).arg(archive).output().unwrap();
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
}
