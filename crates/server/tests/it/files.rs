//! The eight file calls, mkdir and watch.

use serde_json::{Value, json};
use stacyvm_providers::mock::Exhausted;

use crate::support::{Answer, Fixture};

struct Files {
    fixture: Fixture,
    id: String,
}

impl Files {
    async fn open() -> Self {
        let fixture = Fixture::open().await;
        let id = fixture.sandbox().await;
        Self { fixture, id }
    }

    async fn get(&self, path: &str) -> Answer {
        self.fixture.get(&format!("/sandboxes/{}/files{path}", self.id)).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.fixture.post(&format!("/sandboxes/{}/files{path}", self.id), &body).await
    }

    async fn delete(&self, query: &str) -> Answer {
        self.fixture.delete(&format!("/sandboxes/{}/files{query}", self.id)).await
    }

    async fn write(&self, path: &str, content: &str) {
        let answer = self.post("", json!({ "path": path, "content": content })).await;
        assert_eq!(answer.text(), "{\"status\":\"written\"}\n");
    }
}

#[tokio::test]
async fn a_file_is_written_read_looked_at_moved_and_deleted() {
    let files = Files::open().await;
    files.write("/workspace/deep/new/a.txt", "h\u{e9}llo\n").await;
    let read = files.get("?path=/workspace/deep/new/a.txt").await;
    assert_eq!((read.status, read.text()), (200, "h\u{e9}llo\n"));
    assert_eq!(read.header("content-type"), Some("application/octet-stream"), "without a charset");
    let stat = files.get("/stat?path=/workspace/deep/new/a.txt").await.expect(200);
    assert_eq!(stat["name"], "a.txt");
    assert_eq!(stat["path"], "/workspace/deep/new/a.txt");
    assert_eq!((&stat["size"], &stat["mode"], &stat["is_dir"]), (&json!(7), &json!("0644"), &json!(false)));
    assert_eq!(stat["type"], "file");
    assert!(stat["mod_time"].as_str().is_some_and(|time| time.len() == 20 && time.ends_with('Z')), "{stat}");

    let moved =
        files.post("/move", json!({ "old_path": "/workspace/deep/new/a.txt", "new_path": "/workspace/b/c.txt" })).await;
    assert_eq!(moved.text(), "{\"status\":\"moved\"}\n");
    assert_eq!(files.get("?path=/workspace/deep/new/a.txt").await.failure(), (404, "FILE_NOT_FOUND".to_owned()));
    let chmod = files.post("/chmod", json!({ "path": "/workspace/b/c.txt", "mode": "600" })).await;
    assert_eq!(chmod.text(), "{\"status\":\"chmod applied\"}\n");
    assert_eq!(files.get("/stat?path=/workspace/b/c.txt").await.expect(200)["mode"], "0600");
    assert_eq!(files.delete("?path=/workspace/b/c.txt").await.text(), "{\"status\":\"deleted\"}\n");
    assert_eq!(files.get("/stat?path=/workspace/b/c.txt").await.failure(), (404, "FILE_NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn a_missing_file_is_404_with_its_path_in_the_message() {
    let files = Files::open().await;
    let path = "/workspace/no such.txt";
    let query = "path=/workspace/no+such.txt";
    let move_it = json!({ "old_path": path, "new_path": "/workspace/x" });
    let answers = [
        files.get(&format!("?{query}")).await,
        files.get(&format!("/stat?{query}")).await,
        files.get(&format!("/list?{query}")).await,
        files.get(&format!("/archive?{query}")).await,
        files.get(&format!("/watch?{query}")).await,
        files.delete(&format!("?{query}")).await,
        files.post("/move", move_it).await,
        files.post("/chmod", json!({ "path": path, "mode": "644" })).await,
    ];
    for answer in answers {
        assert_eq!(answer.failure(), (404, "FILE_NOT_FOUND".to_owned()));
        assert!(answer.json()["message"].as_str().unwrap().contains(path), "{}", answer.text());
    }
}

#[tokio::test]
async fn lists_are_arrays_in_order_and_never_null() {
    let files = Files::open().await;
    files.write("/workspace/b", "").await;
    files.write("/workspace/a", "").await;
    files.write("/workspace/d/c", "").await;
    let names = |list: Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
    };
    let flat = names(files.get("/list?path=/workspace").await.expect(200));
    assert_eq!(flat, ["/workspace/a", "/workspace/b", "/workspace/d"]);
    let deep = names(files.get("/list?path=/workspace&depth=2").await.expect(200));
    assert!(deep.contains(&"/workspace/d/c".to_owned()), "{deep:?}");
    assert!(names(files.get("/list").await.expect(200)).contains(&"/workspace".to_owned()), "the default is /");
    files
        .fixture
        .post(&format!("/sandboxes/{}/files/mkdir", files.id), &json!({ "path": "/workspace/e/f" }))
        .await
        .expect(200);
    assert_eq!(files.get("/list?path=/workspace/e/f").await.text(), "[]\n");
    assert_eq!(files.get("/glob?pattern=/workspace/none*").await.text(), "[]\n");
    assert_eq!(files.get("/glob?pattern=/workspace/**/c").await.expect(200), json!(["/workspace/d/c"]));
    assert_eq!(files.get("/glob?pattern=%5Bab%5D").await.expect(200), json!(["/workspace/a", "/workspace/b"]));
    for depth in ["0", "65", "x"] {
        assert_eq!(files.get(&format!("/list?path=/&depth={depth}")).await.failure().0, 400, "{depth}");
    }
}

#[tokio::test]
async fn odd_names_survive_every_call() {
    let files = Files::open().await;
    for (name, encoded) in [
        ("with space", "with+space"),
        ("plus+sign", "plus%2Bsign"),
        ("a&b=c#d?e", "a%26b%3Dc%23d%3Fe"),
        ("\u{6f22}\u{5b57}\u{1f980}", "%E6%BC%A2%E5%AD%97%F0%9F%A6%80"),
        ("line\nbreak", "line%0Abreak"),
        ("quote'\"$(x)", "quote'%22$(x)"),
        ("-rf", "-rf"),
        ("%41", "%2541"),
    ] {
        files.write(&format!("/workspace/odd/{name}"), name).await;
        assert_eq!(files.get(&format!("?path=/workspace/odd/{encoded}")).await.text(), name, "{name:?}");
        let stat = files.get(&format!("/stat?path=/workspace/odd/{encoded}")).await.expect(200);
        assert_eq!(stat["name"], name);
    }
    assert_eq!(files.get("/list?path=/workspace/odd").await.expect(200).as_array().unwrap().len(), 8);
}

#[tokio::test]
async fn binary_content_travels_in_base64() {
    let files = Files::open().await;
    let body = json!({ "path": "/workspace/bin", "content": "AP+AAQ==", "encoding": "base64", "mode": "0755" });
    files.post("", body).await.expect(200);
    assert_eq!(files.get("?path=/workspace/bin").await.body, b"\x00\xff\x80\x01");
    assert_eq!(files.get("/stat?path=/workspace/bin").await.expect(200)["mode"], "0755");
    let bad = json!({ "path": "/workspace/bin", "content": "not base64!", "encoding": "base64" });
    assert_eq!(files.post("", bad).await.failure().0, 400);
    assert_eq!(files.get("?path=/workspace/bin").await.body, b"\x00\xff\x80\x01", "a refused write changes nothing");
}

#[tokio::test]
async fn directories_are_deleted_only_when_asked_to() {
    let files = Files::open().await;
    files.write("/workspace/full/x", "").await;
    for query in ["", "&recursive=1", "&recursive=TRUE", "&recursive=false"] {
        let refused = files.delete(&format!("?path=/workspace/full{query}")).await;
        assert_eq!(refused.failure(), (409, "FILE_CONFLICT".to_owned()), "{query}");
    }
    files.delete("?path=/workspace/full&recursive=true").await.expect(200);
    assert_eq!(files.get("/stat?path=/workspace/full").await.failure().0, 404);
    assert_eq!(
        files.get("?path=/workspace").await.failure(),
        (409, "FILE_CONFLICT".to_owned()),
        "a directory has no content"
    );
}

#[tokio::test]
async fn a_full_disk_has_its_own_code() {
    let files = Files::open().await;
    files.fixture.mock.fill_disk(&files.id.parse().unwrap(), Exhausted::Yes);
    let refused = files.post("", json!({ "path": "/workspace/x", "content": "x" })).await;
    assert_eq!(refused.failure(), (429, "SANDBOX_DISK_FULL".to_owned()));
}

#[tokio::test]
async fn changes_arrive_as_lines_while_they_happen() {
    let files = Files::open().await;
    let path = format!("/sandboxes/{}/files/watch?path=/workspace&recursive=true", files.id);
    let mut live = files.fixture.api("GET", &path).open().await;
    assert_eq!((live.status, live.header("content-type")), (200, Some("application/x-ndjson")));
    files.write("/workspace/new.txt", "x").await;
    let change: Value = serde_json::from_str(&live.line().await.unwrap()).unwrap();
    assert_eq!((&change["name"], &change["type"]), (&json!("new.txt"), &json!("create")));
    assert_eq!(change.as_object().unwrap().len(), 2);
}
