//! `image`: bringing images in and taking them out, with and without a registry.

use std::fs;
use std::path::Path;

use serde_json::Value;
use stacyvm_client::SandboxClient;

use crate::support::{Registry, Server, Site, create, make_image, output, run, small};

/// Unpacks the archive that an export wrote.
async fn unpack(site: &Site, archive: &Path, into: &Path) {
    fs::create_dir(into).expect("made");
    let mut tar = site.command("tar");
    tar.arg("-xf").arg(archive).arg("-C").arg(into);
    run(tar.into(), b"").await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn images_come_from_a_registry_and_leave_as_archives() {
    let (site, registry) = (Site::with_image(), Registry::start());
    let path = |name: &str| site.home().join(name);
    let text = |name: &str| path(name).to_str().expect("text").to_owned();
    site.run(&["image", "export", "alpine:latest", &text("oci.tar")]).await.ok().says("exported");
    unpack(&site, &path("oci.tar"), &path("layout")).await;
    let name = registry.push(&path("layout"), "team/tool", "1").await;

    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    let pulled: Vec<Value> = site.run(&["image", "pull", "--json", &name]).await.json();
    let digest = pulled[0]["digest"].as_str().expect("a digest").to_owned();
    assert!(digest.starts_with("sha256:") && pulled[0]["reference"] == *name, "{pulled:?}");
    site.run(&["image", "pull", &name]).await.ok().says(&digest);
    site.run(&["image", "pull", &format!("{}@{digest}", name.trim_end_matches(":1"))]).await.ok();
    let listed = site.run(&["image", "list"]).await.ok();
    assert!(listed.stdout().starts_with("IMAGE ") && listed.stdout().contains(&name), "{listed}");
    let rows: Vec<Value> = site.run(&["image", "ls", "--json"]).await.json();
    assert!(rows.iter().any(|row| row["reference"] == "docker.io/library/alpine:latest"), "{rows:?}");

    // A sandbox takes what is there, and what is not is fetched for it.
    assert_eq!(server.run(&["run", "--image", &name, "--", "echo", "pulled"]).await.ok().stdout(), "pulled\n");
    let other = registry.push(&path("layout"), "team/other", "2").await;
    assert_eq!(server.run(&["run", "--image", &other, "--", "echo", "fetched"]).await.ok().stdout(), "fetched\n");

    // Removal takes the name; who runs on it keeps what it needs.
    let request = stacyvm_api::CreateRequest { image: Some(name.clone()), ..small() };
    let sandbox: SandboxClient = create(&server.client(), &request).await;
    site.run(&["image", "rm", &name, &other, "alpine:latest"]).await.ok().says("removed");
    site.run(&["image", "prune"]).await.ok().says("freed");
    assert_eq!(output(&sandbox, "ls / | grep -c bin").await, "1");
    sandbox.destroy().await.expect("destroyed");
    site.run(&["image", "export", "alpine:latest", &text("again.tar")]).await.failed(1).says("alpine:latest");
    let unknown = format!("{}/team/none:1", registry.host);
    site.run(&["image", "pull", &unknown]).await.failed(1).says("team/none:1");
    server.run(&["run", "--image", &unknown, "--", "true"]).await.failed(125).says("team/none:1");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_registry_the_ways_out_are_named_and_work() {
    let site = Site::new();
    let path = |name: &str| site.home().join(name);
    let text = |name: &str| path(name).to_str().expect("text").to_owned();
    site.run(&["image", "list"]).await.ok().says("stacyvm image pull").says("--image host");
    let unreachable = site.run(&["image", "pull", "127.0.0.1:1/team/tool:1"]).await.failed(1);
    unreachable.says("cannot be reached").says("--image host").says("stacyvm image import");

    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    let refused = server.run(&["spawn", "--image", "127.0.0.1:1/team/tool:1"]).await.failed(1);
    refused.says("cannot be reached").says("--image host").says("stacyvm image import");
    assert_eq!(server.run(&["run", "--image", "host", "--", "echo", "way out"]).await.ok().stdout(), "way out\n");

    // An archive, compressed; a root file system with a name; an OCI layout.
    make_image(&path("docker.tar"), "from/archive:1");
    let mut gzip = site.command("gzip");
    gzip.arg(path("docker.tar"));
    run(gzip.into(), b"").await.ok();
    site.run(&["image", "import", &text("docker.tar.gz")])
        .await
        .ok()
        .says("docker.io/from/archive:1")
        .says("stored in ");
    let script = crate::support::in_repository("scripts/make-test-image.sh");
    let mut rootfs = site.command(script.to_str().expect("text"));
    rootfs.arg("--rootfs").arg(path("rootfs.tar"));
    run(rootfs.into(), b"").await.ok();
    site.run(&["image", "import", &text("rootfs.tar"), "--name", "from/rootfs:1"]).await.ok();
    site.run(&["image", "export", "from/rootfs:1", &text("oci.tar")]).await.ok();
    unpack(&site, &path("oci.tar"), &path("layout")).await;
    let imported: Vec<Value> =
        site.run(&["image", "import", "--json", &text("layout"), "--name", "from/layout:1"]).await.json();
    assert_eq!(imported[0]["layers"], 1);
    site.run(&["image", "export", "from/layout:1", &text("again.tar"), "--format", "docker"]).await.ok();
    site.run(&["image", "import", &text("again.tar"), "--name", "from/export:1"]).await.ok();
    for image in ["from/archive:1", "from/rootfs:1", "from/layout:1", "from/export:1"] {
        let ran = server.run(&["run", "--image", image, "--", "sh", "-c", "busybox | head -n 1"]).await.ok();
        assert!(ran.stdout().starts_with("BusyBox"), "{ran}");
    }

    fs::write(path("garbage"), [7; 5000]).expect("written");
    let nameless = site.run(&["image", "import", &text("rootfs.tar")]).await;
    assert_eq!(nameless.status(), Some(1), "{nameless}");
    nameless.says("--name");
    for (file, name) in [("garbage", "x/garbage:1"), ("missing", "x/missing:1")] {
        let refused = site.run(&["image", "import", &text(file), "--name", name]).await;
        assert_eq!(refused.status(), Some(1), "{refused}");
        assert!(refused.stderr().starts_with("error: "), "{refused}");
    }
}
