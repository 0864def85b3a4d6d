//! Files: names, metadata, and what goes wrong with them.

use std::time::Duration;

use stacyvm_api::Timestamp;
use stacyvm_sandbox::{EntryKind, FileEntry, RemoveOptions, SessionError, WriteOptions};

use super::check;
use crate::check::{ensure, expect_eq, expect_error};
use crate::context::{argv, shell};
use crate::{Check, Checked, Context, Failure, Subject, pattern};

const CONTRACT_PATH: &str = "/workspace/contract.txt";
const MOVED_PATH: &str = "/workspace/contract-moved.txt";
const CONTRACT_TEXT: &[u8] = b"provider contract file";

/// How far the sandbox's clock may be from ours.
const CLOCK_TOLERANCE: Duration = Duration::from_mins(5);

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!("C12", "a file can be written with mode 0644", [], c12),
        check!("C13", "it reads back byte for byte", [], c13),
        check!("C14", "its stat shows size, mode, kind, path and time", [], c14),
        check!("C15", "a glob finds exactly it", [], c15),
        check!("C16", "it can be moved: the new name reads, the old one is gone", [], c16),
        check!("C17", "chmod 0755 shows in its stat", [], c17),
        check!("C18", "it can be deleted and is then not found", [], c18),
        check!("S04", "odd names survive: spaces, unicode, newline, dash, pipe, quotes", [], odd_names),
        check!("S05", "an empty file is a file of size zero", [], empty_file),
        check!("S06", "shorter content replaces longer content completely", [], shorter_content),
        check!("S07", "a missing file is FileNotFound for every call", [Failures], missing_file),
        check!("S08", "file calls on directories, and the reverse, are typed conflicts", [Failures], wrong_kind),
        check!("S09", "recursive removal takes a tree and nothing else", [], recursive_removal),
        check!("S10", "paths cannot leave the sandbox, NUL and empty ones are refused", [Failures], path_tricks),
        check!("S11", "a listing is in order, one level deep, with all fields", [FileDetails], listing),
        check!("S12", "a deep listing shows the tree to its depth", [], deep_listing),
        check!("S13", "modes are kept and missing parents are made", [], modes_and_parents),
        check!("S15", "globs: star, question mark, set, two stars, and none", [], globs),
        check!(
            "S16",
            "symbolic links are shown as such and followed inside only",
            [Programs, FileDetails],
            symbolic_links
        ),
        check!("S20", "a directory can be made, with its parents", [FileDetails], make_directory),
        check!("S17", "files of the API and of commands are the same files", [Programs], same_files),
        check!("S75", "names of 255 bytes and read-only modes are exactly kept", [ExactFiles], exact_files),
    ]
}

async fn with_contract_file(cx: &Context) -> Result<Subject, Failure> {
    let subject = cx.sandbox().await?;
    let options = WriteOptions { mode: Some(0o644), user: None };
    subject.session.write(CONTRACT_PATH, pattern::once(CONTRACT_TEXT), options).await?;
    Ok(subject)
}

async fn c12(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let options = WriteOptions { mode: Some(0o644), user: None };
    let entry = subject.session.write(CONTRACT_PATH, pattern::once(CONTRACT_TEXT), options).await?;
    contract_entry(&entry, CONTRACT_PATH, 0o644)
}

async fn c13(cx: &Context) -> Checked {
    let subject = with_contract_file(cx).await?;
    expect_eq("content", &subject.get(CONTRACT_PATH).await?, &CONTRACT_TEXT.to_vec())
}

async fn c14(cx: &Context) -> Checked {
    let subject = with_contract_file(cx).await?;
    let entry = subject.session.stat(CONTRACT_PATH).await?;
    contract_entry(&entry, CONTRACT_PATH, 0o644)?;
    let now = Timestamp::now();
    let apart = now.since(entry.modified_at).max(entry.modified_at.since(now));
    ensure!(apart < CLOCK_TOLERANCE, "modified at {}, now is {now}", entry.modified_at);
    Ok(())
}

fn contract_entry(entry: &FileEntry, path: &str, mode: u32) -> Checked {
    expect_eq("path", entry.path.as_str(), path)?;
    expect_eq("name", &Some(entry.name.as_str()), &path.rsplit('/').next())?;
    expect_eq("size", &entry.size, &(CONTRACT_TEXT.len() as u64))?;
    expect_eq("mode", &format!("{:04o}", entry.mode), &format!("{mode:04o}"))?;
    expect_eq("kind", &entry.kind, &EntryKind::File)?;
    expect_eq("symlink target", &entry.symlink_target, &None)
}

async fn c15(cx: &Context) -> Checked {
    let subject = with_contract_file(cx).await?;
    let found = subject.session.glob("/workspace/contract*.txt").await?;
    expect_eq("matches", &found, &vec![CONTRACT_PATH.to_owned()])
}

async fn c16(cx: &Context) -> Checked {
    let subject = with_contract_file(cx).await?;
    subject.session.rename(CONTRACT_PATH, MOVED_PATH).await?;
    expect_eq("content under the new name", &subject.get(MOVED_PATH).await?, &CONTRACT_TEXT.to_vec())?;
    not_found("the old name", subject.session.stat(CONTRACT_PATH).await)?;
    subject.session.remove(MOVED_PATH, RemoveOptions::default()).await?;
    Ok(())
}

async fn c17(cx: &Context) -> Checked {
    let subject = with_contract_file(cx).await?;
    subject.session.chmod(CONTRACT_PATH, 0o755).await?;
    contract_entry(&subject.session.stat(CONTRACT_PATH).await?, CONTRACT_PATH, 0o755)
}

async fn c18(cx: &Context) -> Checked {
    let subject = with_contract_file(cx).await?;
    subject.session.remove(CONTRACT_PATH, RemoveOptions::default()).await?;
    not_found("stat", subject.session.stat(CONTRACT_PATH).await)?;
    not_found("read", subject.session.read(CONTRACT_PATH, None).await.map(drop))?;
    let names = subject.names("/workspace").await?;
    ensure!(!names.iter().any(|name| name == "contract.txt"), "still listed: {names:?}");
    Ok(())
}

pub(super) fn not_found<T>(what: &str, outcome: Result<T, SessionError>) -> Checked {
    expect_error(what, outcome, "FileNotFound", |error| matches!(error, SessionError::FileNotFound(_)))
}

async fn odd_names(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = format!("{}/odd", cx.dir());
    // One less than the kernel takes: see S75.
    let long = "n".repeat(254);
    let mut names = vec![
        " leading space",
        "trailing space ",
        "two  spaces",
        "new\nline",
        "tab\there",
        "-dash",
        "--",
        "pi|pe",
        "qu'ote",
        "dou\"ble",
        "back\\slash",
        "star*",
        "que?stion",
        "[set]",
        "$HOME",
        "semi;colon",
        "per%20cent",
        "plus+plus",
        "hash#tag",
        "amp&ersand",
        "ünïcödé",
        "漢字",
        "🦀",
        "...",
        ".hidden",
        "e\u{301}",
        long.as_str(),
    ];
    for name in &names {
        subject.put(&format!("{dir}/{name}"), name.as_bytes()).await.map_err(|e| Failure(format!("{name:?}: {e}")))?;
    }
    names.sort_unstable();
    expect_eq("listed names", &subject.names(&dir).await?, &names.iter().map(|name| (*name).to_owned()).collect())?;
    for name in &names {
        let path = format!("{dir}/{name}");
        expect_eq(name, &String::from_utf8_lossy(&subject.get(&path).await?).as_ref(), name)?;
        expect_eq("name in stat", subject.session.stat(&path).await?.name.as_str(), name)?;
        let moved = format!("{dir}/moved {name}");
        if name.len() < 200 {
            subject.session.rename(&path, &moved).await?;
            subject.session.remove(&moved, RemoveOptions::default()).await?;
        } else {
            subject.session.remove(&path, RemoveOptions::default()).await?;
        }
    }
    expect_eq("names left", &subject.names(&dir).await?, &Vec::<String>::new())
}

async fn empty_file(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let path = format!("{}/empty", cx.dir());
    subject.put(&path, b"").await?;
    let entry = subject.session.stat(&path).await?;
    expect_eq("size and kind", &(entry.size, entry.kind), &(0, EntryKind::File))?;
    expect_eq("content", &subject.get(&path).await?, &Vec::new())
}

async fn shorter_content(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let path = format!("{}/overwritten", cx.dir());
    subject.put(&path, &vec![b'x'; 100_000]).await?;
    subject.put(&path, b"short").await?;
    expect_eq("content", &subject.get(&path).await?, &b"short".to_vec())?;
    expect_eq("size", &subject.session.stat(&path).await?.size, &5)
}

async fn missing_file(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let session = &subject.session;
    subject.session.make_dir(&cx.dir()).await?;
    let path = format!("{}/missing", cx.dir());
    let below = format!("{path}/below");
    not_found("stat", session.stat(&path).await)?;
    not_found("stat below it", session.stat(&below).await)?;
    not_found("read", session.read(&path, None).await.map(drop))?;
    not_found("list", session.list(&path, 1).await)?;
    not_found("remove", session.remove(&path, RemoveOptions::default()).await)?;
    not_found("rename", session.rename(&path, &format!("{}/other", cx.dir())).await)?;
    not_found("chmod", session.chmod(&path, 0o600).await)?;
    not_found("archive", async { super::lifecycle::first(&mut session.archive(&path).await?).await }.await)
}

async fn wrong_kind(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let session = &subject.session;
    let file = format!("{}/tree/file", cx.dir());
    let tree = format!("{}/tree", cx.dir());
    subject.put(&file, b"content").await?;
    let conflict =
        |error: &SessionError| matches!(error, SessionError::FileConflict(_) | SessionError::InvalidArgument(_));
    let read = async { super::lifecycle::first(&mut session.read(&tree, None).await?.stream).await }.await;
    expect_error("reading a directory", read, "FileConflict", conflict)?;
    let write = session.write(&tree, pattern::once("x"), WriteOptions::default()).await;
    expect_error("writing over a directory", write, "FileConflict", conflict)?;
    let below = session.write(&format!("{file}/below"), pattern::once("x"), WriteOptions::default()).await;
    expect_error("writing below a file", below, "FileConflict", conflict)?;
    expect_error("listing a file", session.list(&file, 1).await, "FileConflict", conflict)?;
    let remove = session.remove(&tree, RemoveOptions::default()).await;
    expect_error("removing a full directory without `recursive`", remove, "FileConflict", conflict)?;
    expect_eq("the file afterwards", &subject.get(&file).await?, &b"content".to_vec())
}

async fn recursive_removal(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    for path in ["tree/a", "tree/b/c", "tree/b/d/e", "treetop"] {
        subject.put(&format!("{}/{path}", cx.dir()), b"x").await?;
    }
    subject.session.remove(&format!("{}/tree", cx.dir()), RemoveOptions { recursive: true }).await?;
    expect_eq("what is left", &subject.names(&cx.dir()).await?, &vec!["treetop".to_owned()])
}

/// A file on this machine is planted where a path that left the sandbox would
/// find it. Against a remote server the plant proves nothing, but costs nothing.
async fn path_tricks(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let secret = format!("stacyvm-secret-{}", stacyvm_api::SandboxId::random());
    let plant = std::env::temp_dir().join(&secret);
    let io = |error: std::io::Error| Failure(format!("cannot plant a file on this machine: {error}"));
    std::fs::write(&plant, &secret).map_err(io)?;
    let outcome = path_tricks_with(cx, &subject, &plant.display().to_string()).await;
    std::fs::remove_file(&plant).map_err(io)?;
    outcome
}

async fn path_tricks_with(cx: &Context, subject: &Subject, plant: &str) -> Checked {
    let session = &subject.session;
    let up = "../".repeat(20);
    for path in [plant.to_owned(), format!("/workspace/{up}{}", plant.trim_start_matches('/'))] {
        not_found("a file of this machine", session.read(&path, None).await.map(drop))?;
        // `/proc/1/root` is the agent's root, which is the sandbox's own.
        let through_proc = format!("/proc/1/root{path}");
        ensure!(session.read(&through_proc, None).await.is_err(), "{through_proc} could be read");
    }
    subject.put(&format!("{}/{up}{}", cx.dir(), "workspace/up.txt"), b"inside").await?;
    expect_eq("a path with `..` ends at the root", &subject.get("/workspace/up.txt").await?, &b"inside".to_vec())?;
    session.remove("/workspace/up.txt", RemoveOptions::default()).await?;
    let refused = |error: &SessionError| matches!(error, SessionError::InvalidArgument(_));
    for path in ["/workspace/nul\0byte", ""] {
        let what = format!("{path:?}");
        expect_error(&what, session.stat(path).await, "InvalidArgument", refused)?;
        expect_error(&what, session.read(path, None).await.map(drop), "InvalidArgument", refused)?;
        let write = session.write(path, pattern::once("x"), WriteOptions::default()).await;
        expect_error(&what, write, "InvalidArgument", refused)?;
        expect_error(&what, session.remove(path, RemoveOptions::default()).await, "InvalidArgument", refused)?;
    }
    let too_long = format!("{}/{}", cx.dir(), "n".repeat(256));
    let write = session.write(&too_long, pattern::once("x"), WriteOptions::default()).await;
    expect_error("a name of 256 bytes", write, "InvalidArgument", |error| {
        matches!(error, SessionError::InvalidArgument(_) | SessionError::FileConflict(_))
    })
}

async fn listing(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = cx.dir();
    for (name, content) in [("b.txt", "bb"), ("a.txt", "a"), ("c/below.txt", "below"), ("B.txt", "")] {
        subject.put(&format!("{dir}/{name}"), content.as_bytes()).await?;
    }
    subject.session.chmod(&format!("{dir}/a.txt"), 0o600).await?;
    subject.session.chmod(&format!("{dir}/c"), 0o711).await?;
    let entries = subject.session.list(&dir, 1).await?;
    let seen: Vec<_> = entries
        .iter()
        .map(|entry| (entry.name.as_str(), entry.path.clone(), entry.kind, format!("{:04o}", entry.mode)))
        .collect();
    let expected = |name, kind, mode: &str| (name, format!("{dir}/{name}"), kind, mode.to_owned());
    expect_eq(
        "name, path, kind and mode",
        &seen,
        &vec![
            expected("B.txt", EntryKind::File, "0644"),
            expected("a.txt", EntryKind::File, "0600"),
            expected("b.txt", EntryKind::File, "0644"),
            expected("c", EntryKind::Directory, "0711"),
        ],
    )?;
    let sizes: Vec<_> = entries.iter().filter(|e| e.kind == EntryKind::File).map(|e| e.size).collect();
    expect_eq("sizes", &sizes, &vec![0, 1, 2])?;
    for entry in &entries {
        ensure!(!entry.owner.is_empty() && !entry.group.is_empty(), "no owner or group: {entry:?}");
    }
    Ok(())
}

async fn deep_listing(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = cx.dir();
    subject.put(&format!("{dir}/a/b/c/d"), b"deep").await?;
    subject.put(&format!("{dir}/z"), b"flat").await?;
    for (depth, expected) in
        [(1, vec!["a", "z"]), (2, vec!["a", "a/b", "z"]), (4, vec!["a", "a/b", "a/b/c", "a/b/c/d", "z"])]
    {
        let entries = subject.session.list(&dir, depth).await?;
        let paths: Vec<_> = entries.iter().map(|entry| entry.path.clone()).collect();
        let expected: Vec<_> = expected.iter().map(|path| format!("{dir}/{path}")).collect();
        expect_eq(&format!("paths to depth {depth}"), &paths, &expected)?;
    }
    Ok(())
}

async fn exact_files(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let path = format!("{}/exact/{}", cx.dir(), "n".repeat(255));
    let options = WriteOptions { mode: Some(0o444), user: None };
    subject.session.write(&path, pattern::once("x"), options).await?;
    expect_eq("mode", &format!("{:04o}", subject.session.stat(&path).await?.mode), &"0444".to_owned())?;
    expect_eq("content", &subject.get(&path).await?, &b"x".to_vec())
}

async fn modes_and_parents(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let session = &subject.session;
    for mode in [0o600, 0o755, 0o644, 0o777] {
        let path = format!("{}/some/parents/mode-{mode:o}", cx.dir());
        let options = WriteOptions { mode: Some(mode), user: None };
        let written = session.write(&path, pattern::once("x"), options).await?;
        let stat = session.stat(&path).await?;
        expect_eq("mode", &format!("{:04o}", stat.mode), &format!("{mode:04o}"))?;
        expect_eq("mode in the answer to the write", &written.mode, &stat.mode)?;
    }
    let moved = format!("{}/moved/below/here", cx.dir());
    session.rename(&format!("{}/some", cx.dir()), &moved).await?;
    expect_eq("a moved tree", &subject.get(&format!("{moved}/parents/mode-600")).await?, &b"x".to_vec())
}

async fn make_directory(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let path = format!("{}/made/with/parents", cx.dir());
    let made = subject.session.make_dir(&path).await?;
    expect_eq("path and kind", &(made.path, made.kind), &(path.clone(), EntryKind::Directory))?;
    subject.put(&format!("{path}/file"), b"kept").await?;
    let over = subject.session.make_dir(&format!("{path}/file")).await;
    let conflict = |error: &SessionError| matches!(error, SessionError::FileConflict(_));
    expect_error("making a directory over a file", over, "FileConflict", conflict)?;
    let refused = |error: &SessionError| matches!(error, SessionError::InvalidArgument(_));
    expect_error("an empty path", subject.session.make_dir("").await, "InvalidArgument", refused)
}

async fn globs(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = cx.dir();
    for name in ["a.py", "b.py", "c.txt", "sub/d.py", "sub/deep/e.py", "sp ace.py"] {
        subject.put(&format!("{dir}/{name}"), b"x").await?;
    }
    for (glob, expected) in [
        ("*.py", vec!["a.py", "b.py", "sp ace.py"]),
        ("?.py", vec!["a.py", "b.py"]),
        ("[ac].*", vec!["a.py", "c.txt"]),
        ("**/*.py", vec!["a.py", "b.py", "sp ace.py", "sub/d.py", "sub/deep/e.py"]),
        ("sub/**/e.py", vec!["sub/deep/e.py"]),
        ("*.none", vec![]),
        ("no/such/dir/*", vec![]),
    ] {
        let found = subject.session.glob(&format!("{dir}/{glob}")).await?;
        let expected: Vec<_> = expected.iter().map(|name| format!("{dir}/{name}")).collect();
        expect_eq(glob, &found, &expected)?;
    }
    Ok(())
}

async fn symbolic_links(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = cx.dir();
    subject.put(&format!("{dir}/target"), b"target content").await?;
    let script = format!(
        "cd {dir} && ln -s target link && ln -s /nowhere/at/all dangling && ln -s loop loop && ln -s /etc/hostname host"
    );
    subject.shell(&script).await?.success()?;
    let entries = subject.session.list(&dir, 1).await?;
    let links: Vec<_> = entries
        .iter()
        .filter(|entry| entry.kind == EntryKind::Symlink)
        .map(|entry| (entry.name.as_str(), entry.symlink_target.as_deref().unwrap_or_default()))
        .collect();
    let expected =
        vec![("dangling", "/nowhere/at/all"), ("host", "/etc/hostname"), ("link", "target"), ("loop", "loop")];
    expect_eq("links", &links, &expected)?;
    expect_eq("through a link", &subject.get(&format!("{dir}/link")).await?, &b"target content".to_vec())?;
    not_found("through a dangling link", subject.session.read(&format!("{dir}/dangling"), None).await.map(drop))?;
    ensure!(subject.session.read(&format!("{dir}/loop"), None).await.is_err(), "a loop of links could be read");
    let inside = subject.run(argv(["cat", "/etc/hostname"])).await?.success()?;
    let outside = subject.get(&format!("{dir}/host")).await?;
    expect_eq("a link out of the directory", String::from_utf8_lossy(&outside).as_ref(), inside.as_str())?;
    subject.session.remove(&format!("{dir}/link"), RemoveOptions::default()).await?;
    expect_eq("the target after its link is gone", &subject.get(&format!("{dir}/target")).await?.len(), &14)
}

async fn same_files(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let dir = cx.dir();
    for round in 0..5 {
        subject.put(&format!("{dir}/api"), format!("api {round}").as_bytes()).await?;
        let request = shell(&format!("cat {dir}/api; printf 'command {round}' > {dir}/command"));
        expect_eq("what the command read", &subject.run(request).await?.success()?, &format!("api {round}"))?;
        let read = subject.get(&format!("{dir}/command")).await?;
        expect_eq("what the API read", &String::from_utf8_lossy(&read).into_owned(), &format!("command {round}"))?;
    }
    let script = format!("printf '#!/bin/sh\\necho it ran' > {dir}/script");
    subject.shell(&script).await?.success()?;
    subject.session.chmod(&format!("{dir}/script"), 0o755).await?;
    let path = format!("{dir}/script");
    expect_eq("a script made executable", subject.run(argv([&path])).await?.success()?.as_str(), "it ran\n")
}
