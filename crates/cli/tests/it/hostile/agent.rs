//! What if a guest had taken over its agent? Then whatever the server hears
//! from it is a lie, and that is what these agents tell.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::future::join_all;
use rustix::process::Signal;
use stacyvm_api::{ErrorCode, SandboxState};
use stacyvm_client::{ClientError, SandboxClient};

use super::exhaustion::peak_kib;
use super::refusal;
use crate::support::{Server, Site, create, eventually, output, script, small, within};

/// What an agent says that does not stop.
const FLOOD_BYTES: usize = 96 << 20;

/// Most that agents which never stop talking may cost the server.
const MEMORY_KIB: u64 = 64 << 10;

/// HTTP/2 (RFC 9113): an empty SETTINGS frame, a PING frame, and the start of
/// an answer to the first request, with its headers as in RFC 7541.
const H2_SETTINGS: &[u8] = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00";
const H2_PING: &[u8] = b"\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678";
const H2_ANSWER: &[u8] = b"\x00\x00\x15\x01\x04\x00\x00\x00\x01\x88\x0f\x10\x11application/proto";

/// How an agent lies.
#[derive(Debug, Clone, Copy)]
enum Lie {
    /// Takes connections and never says anything.
    Silence,
    HangsUp,
    Noise,
    /// A head that has no end.
    EndlessHead,
    /// A failure that has no end.
    EndlessFailure,
    /// A file without a description.
    NoDescription,
    /// A file that is shorter than was promised.
    CutShort,
    /// A description that would break out of a header.
    Injection,
    /// Signs of life, as fast as they can be written.
    H2Pings,
    /// An answer that has no end.
    H2Answer,
    /// A frame larger than any frame.
    H2LargeFrame,
}

/// Listens in an agent's place until the process ends.
fn take_over(site: &Site, sandbox: &SandboxClient, lie: Lie) {
    let socket = site.sandbox_dir(sandbox.id().as_str()).join("agent.sock");
    fs::rename(&socket, socket.with_extension("real")).expect("renamed");
    let listener = UnixListener::bind(&socket).expect("a socket");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                // Whoever listens may have had enough of it at any time.
                let _ = tell(stream, lie);
            });
        }
    });
}

fn tell(mut stream: UnixStream, lie: Lie) -> std::io::Result<()> {
    let head = |status: &str, headers: &str| format!("HTTP/1.1 {status}\r\n{headers}\r\n").into_bytes();
    let described = |path: &str| {
        let json = serde_json::json!({
            "path": path, "size": 1000, "mode": 0o644, "owner": "root", "group": "root", "modified_unix_ms": 0,
        });
        format!("x-stacyvm-entry: {}\r\ncontent-length: 1000\r\n", BASE64.encode(json.to_string()))
    };
    // A request has come, whatever it is.
    if !matches!(lie, Lie::HangsUp) {
        stream.read_exact(&mut [0; 16])?;
    }
    match lie {
        Lie::Silence => drop(stream.read_to_end(&mut Vec::new())),
        Lie::HangsUp => {}
        Lie::Noise => for_ever(stream, &(0..=255).map(|byte: u8| byte.wrapping_mul(151)).collect::<Vec<_>>())?,
        Lie::EndlessHead => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nx: ")?;
            for_ever(stream, b"xxxxxxxxxxxxxxxx")?;
        }
        Lie::EndlessFailure => {
            stream.write_all(&head("500 No", ""))?;
            for_ever(stream, b"no and no and no")?;
        }
        Lie::NoDescription => stream.write_all(&[head("200 OK", "content-length: 2\r\n"), b"hi".to_vec()].concat())?,
        Lie::CutShort => stream.write_all(&[head("200 OK", &described("/f")), b"short".to_vec()].concat())?,
        Lie::Injection => {
            let body = vec![b'x'; 1000];
            stream.write_all(&[head("200 OK", &described("/f\r\nx-evil: 1\r\n\r\n\u{1b}[2J")), body].concat())?;
        }
        Lie::H2Pings => {
            stream.write_all(H2_SETTINGS)?;
            for_ever(stream, H2_PING)?;
        }
        Lie::H2Answer => {
            stream.write_all(&[H2_SETTINGS, H2_ANSWER].concat())?;
            let data = [&b"\x00\x40\x00\x00\x00\x00\x00\x00\x01"[..], &[0x10; 16_384]].concat();
            for_ever(stream, &data)?;
        }
        Lie::H2LargeFrame => {
            stream.write_all(&[H2_SETTINGS, b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"].concat())?;
            for_ever(stream, b"xxxxxxxxxxxxxxxx")?;
        }
    }
    Ok(())
}

/// Says it again and again, far beyond any bound, and listens to nothing.
fn for_ever(mut stream: UnixStream, text: &[u8]) -> std::io::Result<()> {
    let text = text.repeat(1 + (64 << 10) / text.len());
    let mut listening = stream.try_clone()?;
    let listener = std::thread::spawn(move || std::io::copy(&mut listening, &mut std::io::sink()));
    for _ in 0..FLOOD_BYTES / text.len() {
        stream.write_all(&text)?;
    }
    // Then it is silent, but still there.
    let _ = listener.join();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_lies_about_files_is_not_believed() {
    let server = Server::start(&Site::with_image(), &["--destroy-on-exit"]).await;
    let client = server.client();
    let bystander = create(&client, &small()).await;
    let before = peak_kib(server.pid());
    for lie in [Lie::HangsUp, Lie::Noise, Lie::EndlessHead, Lie::EndlessFailure, Lie::NoDescription] {
        let guest = create(&client, &small()).await;
        take_over(&server.site, &guest, lie);
        let read = within(&format!("{lie:?}"), guest.read_file("/etc/passwd")).await;
        assert_eq!(refusal(read), ErrorCode::Unavailable, "{lie:?}");
        let packed = within(&format!("{lie:?}"), guest.download_archive("/etc")).await;
        // A tree needs no description: what came is then no tar.
        if !matches!(lie, Lie::NoDescription) {
            assert_eq!(refusal(packed.map(drop)), ErrorCode::Unavailable, "{lie:?}");
        }
        guest.destroy().await.expect("destroyed");
    }
    let guest = create(&client, &small()).await;
    take_over(&server.site, &guest, Lie::CutShort);
    let cut = within("a file that is cut short", guest.read_file("/etc/passwd")).await;
    assert!(matches!(cut, Err(ClientError::Transport { .. })), "{cut:?}");
    let target = server.site.home().join("passwd");
    let copied = server.run(&["cp", &format!("{}:/etc/passwd", guest.id()), target.to_str().expect("text")]).await;
    assert!(copied.status() == Some(1) && !target.exists(), "{copied}");

    let guest = create(&client, &small()).await;
    take_over(&server.site, &guest, Lie::Injection);
    let answer = within("an odd file", guest.read_file("/etc/passwd")).await.expect("only its name is odd");
    assert_eq!(answer, [b'x'; 1000]);

    assert_eq!(output(&bystander, "echo undisturbed").await, "undisturbed");
    let grown = peak_kib(server.pid()).saturating_sub(before);
    assert!(grown < MEMORY_KIB, "the server grew by {grown} KiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_and_works_among_agents_that_lie() {
    let site = Site::with_image();
    let server = Server::start(&site, &[]).await;
    let client = server.client();
    let lies =
        [Lie::Silence, Lie::HangsUp, Lie::Noise, Lie::EndlessHead, Lie::H2Pings, Lie::H2Answer, Lie::H2LargeFrame];
    let mut guests = Vec::new();
    for lie in lies {
        let guest = create(&client, &small()).await;
        take_over(&site, &guest, lie);
        guests.push((lie, guest.id().clone()));
    }
    // The last one: what was made before it is then on disk as made.
    let bystander = create(&client, &small()).await;
    output(&bystander, "echo undisturbed").await;
    let bystander = bystander.id().clone();
    drop(client);
    let before = peak_kib(server.pid());
    let site = server.kill();

    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    let client = server.client();
    assert_eq!(output(&client.sandbox(bystander.clone()), "echo undisturbed").await, "undisturbed");
    let refused = guests.iter().map(async |(lie, id)| {
        let guest = client.sandbox(id.clone());
        let seen = eventually(&format!("{lie:?} is seen"), async || {
            guest.get().await.ok().filter(|sandbox| sandbox.state == SandboxState::Unhealthy)
        })
        .await;
        assert!(seen.reason.is_some_and(|reason| reason.starts_with("it does not answer")), "{lie:?}");
        // Who says nothing of use is waited for, as long as a command may take to begin.
        if !matches!(lie, Lie::Silence | Lie::H2Pings | Lie::H2Answer) {
            let code = refusal(within(&format!("{lie:?}"), guest.exec(&script("true"))).await);
            assert_eq!(code, ErrorCode::Unavailable, "{lie:?}");
        }
    });
    join_all(refused).await;
    let grown = peak_kib(server.pid()).saturating_sub(before);
    assert!(grown < MEMORY_KIB, "the server grew by {grown} KiB");
    for (lie, id) in &guests {
        within(&format!("{lie:?}"), client.sandbox(id.clone()).destroy()).await.expect("destroyed");
    }
    assert_eq!(output(&client.sandbox(bystander), "echo undisturbed").await, "undisturbed");
    let site = Arc::clone(&server.site);
    assert!(server.stop(Signal::TERM).await.status.success());
    assert_eq!(site.remains(), Vec::<String>::new());
}
