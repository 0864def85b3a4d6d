//! Raw connections to ports inside.

use stacyvm_providers::mock::MockService;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::guest::Guest;
use crate::support::{Fixture, within};

async fn open(fixture: &Fixture, id: &str, port: u16) -> (String, BufReader<TcpStream>) {
    let path = format!("/sandboxes/{id}/ports/{port}/forward");
    let request = fixture.api("GET", &path).header("Connection", "upgrade").header("Upgrade", "stacyvm-forward");
    let mut socket = BufReader::new(request.begin().await);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(within(socket.read_line(&mut head)).await.unwrap(), 0, "{head}");
    }
    (head, socket)
}

#[tokio::test]
async fn bytes_go_both_ways_until_each_end() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let guest = Guest::scripted(|mut talk, _| async move {
        let mut all = Vec::new();
        talk.stream.read_to_end(&mut all).await.unwrap();
        talk.write(&[b"got ", all.as_slice()].concat()).await;
    })
    .await;
    fixture.mock.listen(&id.parse().unwrap(), 5432, MockService::At(guest.address));
    let (head, mut socket) = open(&fixture, &id, 5432).await;
    assert!(head.starts_with("HTTP/1.1 101") && head.to_lowercase().contains("upgrade: stacyvm-forward"), "{head}");
    socket.get_mut().write_all(b"\0\xffquery").await.unwrap();
    socket.get_mut().shutdown().await.unwrap();
    let mut answer = Vec::new();
    within(socket.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"got \0\xffquery", "the guest answers after our end");
}

#[tokio::test]
async fn what_cannot_be_connected_is_an_error_before_any_byte() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let ask = |id: &str, port: &str, upgrade: &str| {
        let request = fixture.api("GET", &format!("/sandboxes/{id}/ports/{port}/forward"));
        request.header("Connection", "upgrade").header("Upgrade", upgrade).send()
    };
    assert_eq!(ask(&id, "8080", "stacyvm-forward").await.failure(), (502, "PORT_CLOSED".to_owned()));
    assert_eq!(ask("sb-00000000000000000000", "7", "stacyvm-forward").await.failure().0, 404);
    assert_eq!(ask(&id, "49983", "stacyvm-forward").await.failure().0, 400);
    assert_eq!(ask(&id, "0", "stacyvm-forward").await.failure().0, 400);
    let other = ask(&id, "7", "websocket").await;
    assert_eq!(
        (other.failure(), other.header("upgrade")),
        ((426, "UPGRADE_REQUIRED".to_owned()), Some("stacyvm-forward"))
    );
}

#[tokio::test]
async fn a_connection_ends_with_its_sandbox() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let (_, mut socket) = open(&fixture, &id, 7).await;
    socket.get_mut().write_all(b"echo").await.unwrap();
    let mut echoed = [0; 4];
    within(socket.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"echo");
    fixture.delete(&format!("/sandboxes/{id}")).await.expect(200);
    let mut rest = Vec::new();
    within(socket.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty());
}
