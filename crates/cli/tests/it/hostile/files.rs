//! Files that are traps: links, pipes, devices, names, depths and sizes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;

use stacyvm_api::{ErrorCode, FileKind, WriteRequest};
use stacyvm_client::UploadOptions;

use super::{Attack, refusal};
use crate::support::{output, sh, small, within};

#[tokio::test(flavor = "multi_thread")]
async fn links_lead_nowhere_but_inside() {
    let attack = Attack::by(&small()).await;
    let guest = &attack.guest;
    let host_name = fs::read_to_string("/etc/hostname").unwrap_or_default();
    let plant = "cd /workspace; ln -s /etc/passwd absolute; ln -s ../../../../../../etc/hostname up; \
                 ln -s /proc/1/root/etc/shadow init; ln -s loop loop; ln -s /new/file dangling; ln -s / root; \
                 ln -s /proc/self/fd/0 self; echo 'guest:x:0:0::/:/bin/sh' > /etc/shadow";
    output(guest, plant).await;
    let read = async |path: &str| guest.read_file(path).await;
    let passwd = read("/workspace/absolute").await.expect("the sandbox's own");
    assert!(passwd.starts_with(b"root:x:0:0:root:/root:/bin/sh\n"), "{}", String::from_utf8_lossy(&passwd));
    let name = String::from_utf8(read("/workspace/up").await.expect("its own")).expect("text");
    assert!(name.trim() == guest.id().as_str() && name != host_name, "{name}");
    let shadow = b"guest:x:0:0::/:/bin/sh\n";
    assert_eq!(read("/workspace/init").await.expect("its own"), shadow);
    assert_eq!(refusal(read("/workspace/loop").await), ErrorCode::BadRequest);
    assert_eq!(refusal(read("/workspace/dangling").await), ErrorCode::FileNotFound);
    for outside in ["/workspace/../../../../etc/shadow", "/../../etc/shadow", "../../../etc/shadow"] {
        assert_eq!(read(outside).await.expect("its own"), shadow, "{outside}");
    }
    assert!(read("/workspace/self").await.is_err());

    // Writing goes where commands inside would write.
    let host_shadow = fs::metadata("/etc/shadow").and_then(|file| file.modified()).ok();
    let write = |path: &str| {
        let request = WriteRequest { path: path.to_owned(), content: "written".to_owned(), ..WriteRequest::default() };
        async move { guest.write_file(&request).await }
    };
    output(guest, "ln -s /etc/shadow /workspace/shadow").await;
    write("/workspace/shadow").await.expect("written");
    write("/workspace/root/etc/through").await.expect("written");
    assert_eq!(output(guest, "cat /workspace/shadow /etc/through").await, "writtenwritten");
    assert_eq!(fs::metadata("/etc/shadow").and_then(|file| file.modified()).ok(), host_shadow);
    assert!(!fs::exists("/etc/through").expect("can be looked for"));

    // A tree with all of them is packed as links, and unpacked here as links.
    let (from, to) = (format!("{}:/workspace", guest.id()), attack.server.site.home().join("copied"));
    attack.server.run(&["cp", &from, to.to_str().expect("text")]).await.ok();
    let target = fs::read_link(to.join("init")).expect("a link");
    assert_eq!(target.to_str(), Some("/proc/1/root/etc/shadow"));
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_file_is_refused_at_once_instead_of_read_for_ever() {
    let attack = Attack::by(&small()).await;
    let guest = &attack.guest;
    output(guest, "cd /workspace; mkfifo pipe; ln -s /dev/zero endless; ln -s pipe link").await;
    for path in ["pipe", "link", "endless", "/dev/zero", "/dev/tty", "/dev/ptmx", "/proc/kmsg", "/workspace", "/dev"] {
        let read = within(path, guest.read_file(path)).await;
        assert!(matches!(refusal(read), ErrorCode::FileConflict | ErrorCode::FileForbidden), "{path}");
    }
    for path in ["/dev/full", "/dev/tty", "/proc/sys/kernel/hostname", "/sys/power/state", "/workspace", "/proc/1/mem"]
    {
        let options = UploadOptions::default();
        let code = refusal(within(path, guest.upload(path, &b"x"[..], &options)).await);
        // In `/proc` no file can be made beside another, and that is what it says.
        let is_refused = matches!(code, ErrorCode::FileConflict | ErrorCode::FileForbidden | ErrorCode::FileNotFound);
        assert!(is_refused, "{path}: {code}");
    }
    assert_eq!(guest.stat("pipe").await.expect("it is there").kind, FileKind::Other);
    let listed = guest.list_files("/workspace").await.expect("listed");
    assert_eq!(listed.iter().map(|file| file.name.as_str()).collect::<Vec<_>>(), ["endless", "link", "pipe"]);
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_names_are_listed_copied_and_removed() {
    let attack = Attack::by(&small()).await;
    let guest = &attack.guest;
    let make = r#"mkdir /workspace/odd; cd /workspace/odd
        printf one > "$(printf 'new\nline')"; printf two > "$(printf 'not-utf8-\377\376')"
        printf three > "$(printf '\033[2Jescape')"; printf four > ' '; printf five > '-rf'; printf six > '...'"#;
    output(guest, make).await;
    assert_eq!(guest.list_files("/workspace/odd").await.expect("listed").len(), 6);
    assert_eq!(guest.read_file("/workspace/odd/new\nline").await.expect("read"), b"one");
    assert_eq!(guest.read_file("/workspace/odd/-rf").await.expect("read"), b"five");
    for (path, expected) in [
        ("/workspace/odd/a\0b", ErrorCode::BadRequest),
        ("", ErrorCode::BadRequest),
        (&*format!("/workspace/{}", "x".repeat(256)), ErrorCode::BadRequest),
        ("/workspace/odd/ /x", ErrorCode::FileConflict),
    ] {
        assert_eq!(refusal(guest.read_file(path).await), expected, "{path:?}");
    }

    let home = attack.server.site.home();
    let (from, to) = (format!("{}:/workspace/odd", guest.id()), home.join("odd"));
    attack.server.run(&["cp", &from, to.to_str().expect("text")]).await.ok();
    let names: BTreeSet<Vec<u8>> = fs::read_dir(&to)
        .expect("copied")
        .map(|entry| entry.expect("an entry").file_name().as_bytes().to_vec())
        .collect();
    let expected = [&b" "[..], b"-rf", b"...", b"new\nline", b"not-utf8-\xff\xfe", b"\x1b[2Jescape"];
    assert_eq!(names, expected.into_iter().map(<[u8]>::to_vec).collect());
    // And back again, bytes for bytes.
    let (from, to) = (to.join("."), format!("{}:/workspace/back", guest.id()));
    attack.server.run(&["cp", from.to_str().expect("text"), &to]).await.ok();
    assert_eq!(
        output(guest, "cd /workspace/back; cat \"$(printf 'not-utf8-\\377\\376')\"; ls -A | wc -l").await,
        "two6"
    );
    guest.remove_all("/workspace/odd").await.expect("removed");
    assert_eq!(refusal(guest.stat("/workspace/odd").await), ErrorCode::FileNotFound);
    // What people see of it in a terminal is harmless.
    let failed = attack.server.run(&["cp", &format!("{}:/no/\x1b[2Jescape", guest.id()), "-"]).await;
    assert!(failed.status() == Some(1) && !failed.stderr().contains('\x1b'), "{failed}");
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_deeper_and_files_larger_than_anything_are_taken_as_they_are() {
    const DEPTH: usize = 3000;
    let attack = Attack::by_host_programs().await;
    let guest = &attack.guest;
    let dig =
        format!("import os\nfor _ in range({DEPTH}):\n    os.mkdir('d')\n    os.chdir('d')\nopen('file', 'w').close()");
    attack.python(&dig).await;
    assert_eq!(guest.list_files("/workspace").await.expect("listed").len(), 1);
    assert!(within("a glob", guest.glob("/workspace/**/file")).await.expect("found").len() <= 1);
    // Each way of taking all of it ends, with the whole or with a typed error.
    let packed = within("packing", async { guest.download_archive("/workspace").await?.bytes().await }).await;
    if let Err(error) = packed {
        assert!(error.code().is_some() || error.to_string().contains("broke"), "{error:?}");
    }
    within("removal", guest.remove_all("/workspace/d")).await.expect("removed");
    assert_eq!(output(guest, "ls /workspace | wc -l").await, "0");

    output(guest, "truncate -s 1T /workspace/sparse").await;
    assert_eq!(guest.stat("/workspace/sparse").await.expect("there").size, 1 << 40);
    let end = guest.download("/workspace/sparse", Some((1 << 40) - 4..=(1 << 40) - 1)).await.expect("a range");
    assert_eq!(end.bytes().await.expect("its bytes"), [0; 4]);
    // It becomes shorter while it is on its way: that must not look like its end.
    let mut shrinking = guest.download("/workspace/sparse", None).await.expect("it begins");
    assert!(within("the first piece", shrinking.chunk()).await.expect("a piece").is_some());
    assert_eq!(sh(guest, "truncate -s 0 /workspace/sparse").await.exit_code, 0);
    let cut = within("the end", async {
        loop {
            match shrinking.chunk().await {
                Ok(Some(_)) => {}
                other => return other,
            }
        }
    });
    assert!(cut.await.is_err(), "a file that became shorter seems complete");
    output(guest, "cd /workspace; for i in $(seq 20000); do : > many-$i; done").await;
    assert_eq!(within("a long listing", guest.list_files("/workspace")).await.expect("listed").len(), 20_001);
    attack.ends_well().await;
}
