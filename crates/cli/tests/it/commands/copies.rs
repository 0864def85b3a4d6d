//! `cp`: files and directories in both directions.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::Value;

use super::Fixture;
use crate::support::{create, output, small};

/// A tree with what trees have.
fn plant(tree: &Path) {
    fs::create_dir_all(tree.join("a/empty")).expect("made");
    fs::write(tree.join("a/run.sh"), "#!/bin/sh\necho ran\n").expect("written");
    fs::set_permissions(tree.join("a/run.sh"), fs::Permissions::from_mode(0o755)).expect("its mode");
    fs::write(tree.join("bytes"), (0..=255).collect::<Vec<u8>>().repeat(5000)).expect("written");
    std::os::unix::fs::symlink("a/run.sh", tree.join("link")).expect("a link");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_go_in_and_come_out_as_they_were() {
    let fixture = Fixture::start().await;
    let home = tempfile::tempdir_in(fixture.server.site.home()).expect("a directory");
    let here = |name: &str| home.path().join(name).to_str().expect("text").to_owned();
    let inside = |path: &str| format!("{}:{path}", fixture.id);
    let cp = async |from: &str, to: &str| fixture.server.run(&["cp", from, to]).await;
    plant(home.path());

    cp(&here("a/run.sh"), &inside("/workspace/new/dir/run.sh")).await.ok().says("copied 19 B");
    assert_eq!(output(&fixture.sandbox, "new/dir/run.sh; stat -c %a new/dir/run.sh").await, "ran\n755");
    cp(&here("bytes"), &inside("/workspace")).await.ok();
    cp(&inside("/workspace/bytes"), &here("back")).await.ok();
    assert!(fs::read(here("bytes")).expect("readable") == fs::read(here("back")).expect("copied"));
    let told: Value = fixture.server.run(&["--json", "cp", &inside("/workspace/bytes"), &here("a")]).await.json();
    assert_eq!((&told["bytes"], fs::exists(here("a/bytes")).expect("can be seen")), (&Value::from(1_280_000), true));

    let piped = fixture.server.run_with_input(&["cp", "-", &inside("/workspace/piped")], b"typed").await;
    piped.ok();
    assert_eq!(cp(&inside("/workspace/piped"), "-").await.ok().stdout(), "typed");
    output(&fixture.sandbox, "mkdir special; touch special/file; chmod 4711 special/file; chmod 1777 special").await;
    let left_out = |count: u8| format!("left out the set-ID and sticky bits of {count} files");
    cp(&inside("/workspace/special/file"), &here("plain")).await.ok().says(&left_out(1));
    assert_eq!(fs::metadata(here("plain")).expect("copied").permissions().mode() & 0o7777, 0o711);
    cp(&inside("/workspace"), &here("all")).await.ok().says(&left_out(2));
    // A copy that cannot be made leaves what was there.
    let missing = cp(&inside("/workspace/missing"), &here("back")).await;
    assert_eq!(missing.status(), Some(1), "{missing}");
    missing.says("no such file or directory: /workspace/missing");
    assert_eq!(fs::metadata(here("back")).expect("still there").len(), 1_280_000);
    // A link that is in the way, as a sandbox plants it, is replaced.
    fs::create_dir(here("planted")).expect("made");
    fs::write(here("victim"), "kept").expect("written");
    for name in ["bytes", "full"] {
        std::os::unix::fs::symlink(here("victim"), here(&format!("planted/{name}"))).expect("a link");
    }
    for to in ["planted/", "planted/full"] {
        cp(&inside("/workspace/bytes"), &here(to)).await.ok();
    }
    for name in ["planted/bytes", "planted/full"] {
        let copied = fs::symlink_metadata(here(name)).expect("copied");
        assert_eq!((copied.is_file(), copied.len()), (true, 1_280_000), "{name}");
    }
    assert_eq!(fs::read_to_string(here("victim")).expect("readable"), "kept");
    std::os::unix::fs::symlink(here("a"), here("planted/dir")).expect("a link");
    cp(&inside("/workspace/piped"), &here("planted/dir")).await.failed(1).says("planted/dir/ to copy into");
    cp(&inside("/workspace/piped"), &here("planted/dir/")).await.ok();
    assert_eq!(fs::read_to_string(here("a/piped")).expect("copied"), "typed");
    cp(&here("missing"), &inside("/workspace")).await.says("missing");
    cp(&here("bytes"), &here("other")).await.failed(1).says("ID:/path");
    cp(&here("bytes"), &format!("{}:relative", fixture.id)).await.says("absolute path");
    cp(&here("bytes"), "sb-00000000000000000000:/x").await.says("does not exist");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_go_in_come_out_and_across() {
    let fixture = Fixture::start().await;
    let other = create(&fixture.server.client(), &small()).await;
    let home = tempfile::tempdir_in(fixture.server.site.home()).expect("a directory");
    let here = |name: &str| home.path().join(name).to_str().expect("text").to_owned();
    let inside = |path: &str| format!("{}:{path}", fixture.id);
    let cp = async |from: &str, to: &str| fixture.server.run(&["cp", from, to]).await.ok();
    let tree = home.path().join("tree");
    plant(&tree);

    // Into a directory that exists, as a name that does not, and its contents.
    cp(&here("tree"), &inside("/workspace")).await;
    cp(&here("tree"), &inside("/workspace/named")).await;
    cp(&here("tree/."), &inside("/workspace/contents")).await;
    cp(&here("tree/."), &inside("/tmp")).await;
    // Once more, over what is there.
    cp(&here("tree"), &inside("/workspace")).await;
    for place in ["tree", "named", "contents", "/tmp"] {
        let shown = "cd /workspace; cd PLACE; ./link; stat -c %a a/run.sh; ls -d a/empty; wc -c < bytes";
        let shown = output(&fixture.sandbox, &shown.replace("PLACE", place)).await;
        assert_eq!(shown, "ran\n755\na/empty\n1280000", "{place}");
    }
    cp(&inside("/workspace/tree"), &here("back")).await;
    cp(&inside("/workspace/named/."), &here("contents")).await;
    for _ in 0..2 {
        cp(&inside("/workspace/named/."), &format!("{}:/workspace/across", other.id())).await;
    }
    for place in ["back", "contents"] {
        let place = home.path().join(place);
        assert_eq!(fs::read_link(place.join("link")).expect("a link").to_str(), Some("a/run.sh"));
        assert_eq!(place.join("a/run.sh").metadata().expect("there").permissions().mode() & 0o7777, 0o755);
        assert!(place.join("a/empty").is_dir());
        assert!(fs::read(place.join("bytes")).expect("readable") == fs::read(tree.join("bytes")).expect("readable"));
    }
    assert_eq!(output(&other, "across/link").await, "ran");
    // As a tar, for other programs.
    let tar = fixture.server.run(&["cp", &inside("/workspace/tree"), "-"]).await.ok();
    let names = crate::support::run(
        {
            let mut command = fixture.server.site.command("tar");
            command.args(["-tf", "-"]);
            command.into()
        },
        tar.stdout_bytes(),
    );
    assert!(names.await.ok().stdout().contains("a/run.sh"));
    // A link that the sandbox planted with one copy leads no later one away.
    let (victim, planted) = (here("victim"), here("planted"));
    fs::create_dir(&victim).expect("made");
    output(&fixture.sandbox, &format!("mkdir planted; cd planted; ln -s {victim} c; ln -s {victim} d")).await;
    cp(&inside("/workspace/planted/."), &planted).await;
    output(&fixture.sandbox, "cd planted; rm c; mkdir c; echo x > c/job; mkdir -m 700 ../d; echo x > ../d/job").await;
    cp(&inside("/workspace/planted/."), &planted).await;
    cp(&inside("/workspace/d"), &planted).await;
    for name in ["c/job", "d/job"] {
        assert_eq!(fs::read_to_string(format!("{planted}/{name}")).expect("copied"), "x\n");
    }
    assert_eq!(fs::read_dir(&victim).expect("readable").count(), 0, "nothing was written through a link");
    // Devices and pipes stay behind, and that is said.
    output(&fixture.sandbox, "mkfifo /workspace/tree/pipe").await;
    cp(&inside("/workspace/tree"), &here("without")).await.says("left out 1");
    let conflict = fixture.server.run(&["cp", &here("tree"), &inside("/workspace/tree/bytes")]).await;
    assert_eq!(conflict.status(), Some(1), "{conflict}");
    conflict.says("is a file");
    other.destroy().await.expect("destroyed");
    fixture.finish().await;
}
