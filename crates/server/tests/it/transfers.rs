//! Raw uploads and downloads, ranges, archives.

use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::support::{Fixture, Live, Request, eventually, within};

const MIB: usize = 1 << 20;

struct Sandbox {
    fixture: Fixture,
    id: String,
}

impl Sandbox {
    async fn open() -> Self {
        let fixture = Fixture::open().await;
        let id = fixture.sandbox().await;
        Self { fixture, id }
    }

    fn files(&self, method: &str, rest: &str) -> Request {
        self.fixture.api(method, &format!("/sandboxes/{}/files{rest}", self.id))
    }

    fn upload(&self, rest: &str) -> Request {
        self.files("PUT", rest).header("X-StacyVM-Upload", "1")
    }
}

/// Bytes that compress badly and differ everywhere.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&next());
    }
    bytes.truncate(length);
    bytes
}

#[tokio::test]
async fn any_bytes_go_up_and_come_down_again() {
    let sandbox = Sandbox::open().await;
    let bytes = noise(9 * MIB + 17);
    let stored = sandbox.upload("?path=/workspace/blob&mode=0600").body(bytes.clone()).send().await.expect(200);
    assert_eq!((&stored["size"], &stored["mode"]), (&json!(bytes.len()), &json!("0600")));
    let read = sandbox.files("GET", "?path=/workspace/blob").send().await;
    assert_eq!(read.header("content-length"), Some(bytes.len().to_string().as_str()));
    assert_eq!(read.header("accept-ranges"), Some("bytes"));
    assert!(read.body == bytes, "the bytes differ");
    let head = sandbox.files("HEAD", "?path=/workspace/blob").send().await;
    assert_eq!((head.status, head.header("content-length")), (200, read.header("content-length")));
    let empty = sandbox.upload("?path=/workspace/empty").send().await.expect(200);
    assert_eq!(empty["size"], 0);
    assert_eq!(sandbox.files("GET", "?path=/workspace/empty").send().await.body, b"");
}

#[tokio::test]
async fn chunked_uploads_work_without_a_length() {
    let sandbox = Sandbox::open().await;
    let request = sandbox.upload("?path=/workspace/chunked").header("Transfer-Encoding", "chunked");
    let mut socket = request.begin().await;
    socket.write_all(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n").await.unwrap();
    let live = within(Live::read(socket)).await;
    assert_eq!(live.status, 200);
    assert_eq!(sandbox.files("GET", "?path=/workspace/chunked").send().await.text(), "hello world");
}

#[tokio::test]
async fn an_upload_that_breaks_off_changes_nothing() {
    let sandbox = Sandbox::open().await;
    sandbox.upload("?path=/workspace/kept").body("old").send().await.expect(200);
    let mut socket = sandbox.upload("?path=/workspace/kept").header("Content-Length", "1000").begin().await;
    socket.write_all(b"half of it").await.unwrap();
    socket.shutdown().await.unwrap();
    drop(socket);
    // The server notices on its own time; the failed write shows as a metric.
    eventually("the failure", || async {
        let metrics = sandbox.fixture.get("/metrics").await.expect(200);
        let writes =
            metrics["operations"].as_array().unwrap().iter().find(|item| item["operation"] == "file_write").cloned();
        writes.filter(|item| item["failure_total"] == 1)
    })
    .await;
    assert_eq!(sandbox.files("GET", "?path=/workspace/kept").send().await.text(), "old");
}

#[tokio::test]
async fn uploads_need_their_header_and_a_path() {
    let sandbox = Sandbox::open().await;
    for rest in ["?path=/workspace/x", "/archive?path=/workspace"] {
        let refused = sandbox.files("PUT", rest).body("x").send().await;
        assert_eq!(refused.failure(), (415, "UNSUPPORTED_MEDIA_TYPE".to_owned()));
        assert!(refused.text().contains("X-StacyVM-Upload: 1"), "{}", refused.text());
    }
    for rest in ["", "?path=", "?path=a%00b", "?path=/x&mode=999", "/archive"] {
        assert_eq!(sandbox.upload(rest).body("x").send().await.failure().0, 400, "{rest}");
    }
}

#[tokio::test]
async fn one_range_of_bytes_can_be_asked_for() {
    let sandbox = Sandbox::open().await;
    sandbox.upload("?path=/workspace/r").body("0123456789").send().await.expect(200);
    let range = |spec: &str| sandbox.files("GET", "?path=/workspace/r").header("Range", spec).send();
    for (spec, body, content_range) in [
        ("bytes=0-3", "0123", "bytes 0-3/10"),
        ("bytes=7-", "789", "bytes 7-9/10"),
        ("bytes=-2", "89", "bytes 8-9/10"),
        ("bytes=8-99", "89", "bytes 8-9/10"),
        ("bytes=-99", "0123456789", "bytes 0-9/10"),
        ("bytes=5-18446744073709551615", "56789", "bytes 5-9/10"),
    ] {
        let part = range(spec).await;
        assert_eq!((part.status, part.text()), (206, body), "{spec}");
        assert_eq!(part.header("content-range"), Some(content_range), "{spec}");
        assert_eq!(part.header("content-length"), Some(body.len().to_string().as_str()), "{spec}");
    }
    for spec in ["bytes=10-", "bytes=99-100", "bytes=-0"] {
        let refused = range(spec).await;
        assert_eq!(refused.failure(), (416, "RANGE_NOT_SATISFIABLE".to_owned()), "{spec}");
        assert_eq!(refused.header("content-range"), Some("bytes */10"));
    }
    for ignored in ["bytes=3-1", "lines=0-1", "bytes=0-1,4-5", "nonsense"] {
        let whole = range(ignored).await;
        assert_eq!((whole.status, whole.text()), (200, "0123456789"), "{ignored}");
    }
}

#[tokio::test]
async fn a_tree_goes_down_and_up_as_a_tar() {
    let sandbox = Sandbox::open().await;
    for (path, content) in [("a.txt", "one"), ("sub/b.txt", "two"), ("sub/deep/c.txt", "three")] {
        sandbox.upload(&format!("?path=/workspace/tree/{path}")).body(content).send().await.expect(200);
    }
    let down = sandbox.files("GET", "/archive?path=/workspace/tree").send().await;
    assert_eq!((down.status, down.header("content-type")), (200, Some("application/x-tar")));
    assert_eq!(down.body.len() % 512, 0, "a tar is made of blocks");
    assert!(down.body.windows(5).any(|window| window == b"three"));
    let up = sandbox.upload("/archive?path=/workspace/copy").body(down.body).send().await;
    assert_eq!(up.text(), "{\"status\":\"extracted\"}\n");
    assert_eq!(sandbox.files("GET", "?path=/workspace/copy/sub/deep/c.txt").send().await.text(), "three");
    let garbage = sandbox.upload("/archive?path=/workspace/bad").body(noise(4096)).send().await;
    assert_eq!(garbage.failure().0, 400);
}

#[tokio::test]
async fn a_slow_reader_holds_the_download_up_and_gets_all_of_it() {
    let sandbox = Sandbox::open().await;
    let bytes = noise(24 * MIB);
    sandbox.upload("?path=/workspace/big").body(bytes.clone()).send().await.expect(200);
    let mut live = sandbox.files("GET", "?path=/workspace/big").open().await;
    let first = live.chunk().await.unwrap();
    // Other calls go on while nobody reads.
    assert_eq!(sandbox.files("GET", "/stat?path=/workspace/big").send().await.expect(200)["size"], 24 * MIB);
    let mut all = first;
    all.extend(within(live.rest()).await);
    assert!(all == bytes, "the bytes differ");
}
