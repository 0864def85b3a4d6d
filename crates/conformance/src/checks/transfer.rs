//! Moving bytes in and out: binary, large, in parts, interrupted, as trees.

use futures_util::{StreamExt as _, stream};
use stacyvm_sandbox::{ByteStream, EntryKind, SessionError, WriteOptions};

use super::check;
use crate::check::{ensure, expect_eq};
use crate::context::argv;
use crate::{Ability, Check, Checked, Context, Failure, pattern};

const LARGE_BYTES: u64 = 64 << 20;

/// A tar header and its data come in blocks of this size.
const TAR_BLOCK_BYTES: usize = 512;

pub(super) fn checks() -> Vec<Check> {
    vec![
        check!("S01", "a file of all byte values comes back unchanged", [Bytes], binary_file),
        check!("S02", "a file of 64 MiB comes back with the same hash", [Bytes], large_file, long),
        check!("S03", "a range gives exactly those bytes that exist", [Bytes], ranges),
        check!("S14", "an interrupted upload leaves the old content", [], interrupted_upload),
        check!("S18", "a tree goes out as tar and comes back the same", [Archives], tar_round_trip),
        check!("S19", "a hostile tar cannot write outside its directory", [Archives], hostile_tar),
    ]
}

async fn binary_file(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let content: Vec<u8> = (0..=255).cycle().take(256 * 40).collect();
    let path = format!("{}/binary", cx.dir());
    subject.put(&path, &content).await?;
    ensure!(subject.get(&path).await? == content, "the content differs");
    if cx.target.lacks(Ability::Programs).is_none() {
        let text = subject.run(argv(["sha256sum", &path])).await?.success()?;
        expect_eq("hash inside", &text.split_whitespace().next(), &Some(pattern::sha256(&content).as_str()))?;
    }
    Ok(())
}

async fn large_file(cx: &Context) -> Checked {
    let subject = cx.fresh().await?;
    let path = "/workspace/large";
    let written = subject.session.write(path, pattern::stream_of(LARGE_BYTES, 2), WriteOptions::default()).await?;
    expect_eq("size in the answer", &written.size, &LARGE_BYTES)?;
    let content = subject.session.read(path, None).await?;
    expect_eq("announced range", &content.range, &(0..LARGE_BYTES))?;
    let expected = pattern::digest_of(LARGE_BYTES, 2);
    expect_eq("length and hash", &pattern::measure(content.stream).await?, &(LARGE_BYTES, expected.clone()))?;
    if cx.target.lacks(Ability::Programs).is_none() {
        let text = subject.run(argv(["sha256sum", path])).await?.success()?;
        expect_eq("hash inside", &text.split_whitespace().next(), &Some(expected.as_str()))?;
    }
    Ok(())
}

async fn ranges(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let path = format!("{}/ranged", cx.dir());
    let content: Vec<u8> = (0..=255).cycle().take(1000).collect();
    subject.put(&path, &content).await?;
    for (range, expected) in [(0..10, 0..10), (990..1000, 990..1000), (500..501, 500..501), (995..5000, 995..1000)] {
        let part = subject.session.read(&path, Some(range.clone())).await?;
        expect_eq("announced range", &part.range, &expected)?;
        expect_eq("size of the whole file", &part.entry.size, &1000)?;
        let bytes = pattern::collect(part.stream, 4096).await?;
        let slice = &content[expected.start as usize..expected.end as usize];
        expect_eq(&format!("bytes {range:?}"), bytes.as_slice(), slice)?;
    }
    // Past the end there is nothing: either an empty range or a typed refusal.
    match subject.session.read(&path, Some(2000..3000)).await {
        Ok(part) => expect_eq("bytes past the end", &pattern::collect(part.stream, 4096).await?, &Vec::new()),
        Err(SessionError::InvalidArgument(_)) => Ok(()),
        Err(error) => Err(Failure(format!("reading past the end: {error:?}"))),
    }
}

async fn interrupted_upload(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let path = format!("{}/interrupted", cx.dir());
    subject.put(&path, b"the old content").await?;
    let broken: ByteStream =
        Box::pin(pattern::stream_of(1 << 20, 14).take(8).chain(stream::iter([Err(SessionError::Unavailable(None))])));
    let outcome = subject.session.write(&path, broken, WriteOptions::default()).await;
    ensure!(outcome.is_err(), "an upload whose source broke off succeeded");
    expect_eq("content", &subject.get(&path).await?, &b"the old content".to_vec())?;
    // Removal of what arrived may come a moment after the error.
    crate::context::eventually("no partial file is left beside it", std::time::Duration::from_secs(10), || async {
        Ok((subject.names(&cx.dir()).await? == ["interrupted"]).then_some(()))
    })
    .await
}

async fn tar_round_trip(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let session = &subject.session;
    let (from, to) = (format!("{}/from", cx.dir()), format!("{}/to", cx.dir()));
    let long_name = format!("dir/{}/{}", "d".repeat(90), "f".repeat(120));
    for (name, content) in
        [("a.txt", "a"), ("dir/b.bin", "b\0b"), ("dir/ü.txt", "ü"), ("empty", ""), (&*long_name, "long")]
    {
        subject.put(&format!("{from}/{name}"), content.as_bytes()).await?;
    }
    subject.session.make_dir(&format!("{from}/hollow")).await?;
    session.chmod(&format!("{from}/a.txt"), 0o750).await?;
    subject.session.make_dir(&to).await?;
    let archive = session.archive(&from).await?;
    session.extract(&to, archive).await?;
    let (before, after) = (session.list(&from, 9).await?, session.list(&to, 9).await?);
    let shape = |entries: &[stacyvm_sandbox::FileEntry], root: &str| -> Vec<_> {
        let relative = |path: &str| path.strip_prefix(root).unwrap_or(path).to_owned();
        let size = |entry: &stacyvm_sandbox::FileEntry| if entry.kind == EntryKind::File { entry.size } else { 0 };
        entries.iter().map(|entry| (relative(&entry.path), entry.kind, entry.mode, size(entry))).collect()
    };
    expect_eq("the tree", &shape(&after, &to), &shape(&before, &from))?;
    for entry in before.iter().filter(|entry| entry.kind == EntryKind::File) {
        let copy = entry.path.replacen(&from, &to, 1);
        expect_eq(&copy, &subject.get(&copy).await?, &subject.get(&entry.path).await?)?;
    }
    Ok(())
}

async fn hostile_tar(cx: &Context) -> Checked {
    let subject = cx.sandbox().await?;
    let session = &subject.session;
    let (inner, outside) = (format!("{}/inner", cx.dir()), format!("{}/outside", cx.dir()));
    subject.session.make_dir(&inner).await?;
    subject.session.make_dir(&outside).await?;
    let absolute = format!("{outside}/absolute");
    let archives = [
        tar(&[("../outside/dots", b'0', "")]),
        tar(&[(&absolute, b'0', "")]),
        tar(&[("link", b'2', &outside), ("link/through", b'0', "")]),
        tar(&[("hard", b'1', "../outside/hard")]),
        b"this is not a tar archive at all".to_vec(),
    ];
    for archive in archives {
        // Refusing it is fine, and so is keeping it inside.
        if let Err(error) = session.extract(&inner, pattern::once(archive)).await {
            cx.note(format!("refused: {error}"));
            ensure!(!matches!(error, SessionError::Gone | SessionError::Unavailable(_)), "{error:?}");
        }
    }
    expect_eq("files outside", &subject.names(&outside).await?, &Vec::<String>::new())?;
    session.ping().await?;
    Ok(())
}

/// A tar archive of `(name, type, link target)`; files hold four bytes.
fn tar(entries: &[(&str, u8, &str)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, kind, link) in entries {
        let content: &[u8] = if *kind == b'0' { b"evil" } else { b"" };
        let mut header = [0_u8; TAR_BLOCK_BYTES];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[148..156].copy_from_slice(b"        ");
        header[156] = *kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend_from_slice(&header);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(TAR_BLOCK_BYTES), 0);
    }
    archive.resize(archive.len() + 2 * TAR_BLOCK_BYTES, 0);
    archive
}
