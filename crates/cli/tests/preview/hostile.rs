//! A page in a preview tries to drive the API of an open server with all that a
//! browser offers. Success of any attempt would leave a file in the sandbox.

use serde_json::{Value, json};
use stacyvm_api::ExecRequest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::browser::Browser;
use crate::server::{PORT, Server, site};

const OWNED: &str = "/workspace/owned";

#[tokio::test(flavor = "multi_thread")]
async fn a_page_in_a_preview_cannot_drive_the_api() {
    let server = Server::start(None).await;
    let sandbox = server.sandbox().await;
    site(&sandbox, PORT).await;
    let browser = Browser::start();
    let page = browser.open(&format!("http://{}/", server.host(&sandbox, PORT))).await;
    page.until("document.title", &json!("Inside")).await;

    let exec = format!("/api/v1/sandboxes/{}/exec", sandbox.id());
    let command = json!({ "command": format!("touch {OWNED}") }).to_string();
    for api in [format!("http://localhost:{}", server.port), format!("http://127.0.0.1:{}", server.port)] {
        // With JSON the browser asks first, and is told no.
        let fetch = format!(
            "fetch('{api}{exec}', {{ method: 'POST', headers: {{ 'Content-Type': 'application/json' }}, \
             body: '{command}' }}).then(answer => answer.status)"
        );
        let refused: Result<Value, String> = page.evaluate(&fetch).await;
        assert!(refused.is_err(), "{refused:?}");
        // Without asking, the answer cannot be read; whether it had an effect
        // is looked at in the end.
        let blind = format!(
            "fetch('{api}{exec}', {{ method: 'POST', mode: 'no-cors', body: '{command}' }}).then(answer => answer.type)"
        );
        assert_eq!(page.evaluate(&blind).await, Ok(json!("opaque")));
        let form = format!(
            "new Promise(done => {{ const frame = document.createElement('iframe'); frame.name = 'sink'; \
             document.body.append(frame); const form = document.createElement('form'); form.method = 'POST'; \
             form.action = '{api}{exec}'; form.enctype = 'text/plain'; form.target = 'sink'; \
             const field = document.createElement('input'); field.name = '{command}'; form.append(field); \
             document.body.append(form); frame.onload = () => {{ frame.remove(); done('sent'); }}; \
             form.submit(); }})"
        );
        assert_eq!(page.evaluate(&form).await, Ok(json!("sent")));
        let address = api.replacen("http", "ws", 1);
        let socket = format!(
            "new Promise(done => {{ const socket = new WebSocket('{address}{exec}/ws'); \
             socket.onopen = () => {{ socket.send('{command}'); done('open'); }}; \
             socket.onerror = () => done('refused'); }})"
        );
        assert_eq!(page.evaluate(&socket).await, Ok(json!("refused")));
        let read: Result<Value, String> = page.evaluate(&format!("fetch('{api}/api/v1/sandboxes')")).await;
        assert!(read.is_err(), "{read:?}");
    }

    // The API's paths on the preview's own host are the guest's.
    let own: Value = page.evaluate("fetch('/api/v1/sandboxes').then(answer => answer.text())").await.unwrap();
    assert_eq!(own, json!("no such page"));

    // A name of the attacker's that leads to this machine.
    let rebound = browser.open(&format!("http://evil.example:{}/api/v1/sandboxes", server.port)).await;
    rebound.until("document.body.textContent.includes('does not answer to the host')", &json!(true)).await;
    let fetch = format!(
        "fetch('{exec}', {{ method: 'POST', headers: {{ 'Content-Type': 'application/json' }}, body: '{command}' }})\
         .then(answer => answer.status)"
    );
    // The refusal is a page that may not call anybody.
    let tried: Result<Value, String> = rebound.evaluate(&fetch).await;
    assert!(tried.is_err(), "{tried:?}");
    // And the call itself, as such a page would make it, is refused.
    let call = format!(
        "POST {exec} HTTP/1.1\r\nHost: evil.example:{}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{command}",
        server.port,
        command.len()
    );
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
    stream.write_all(call.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");

    let look = |command: String| ExecRequest { command, ..ExecRequest::default() };
    let owned = sandbox.exec(&look(format!("test -e {OWNED}"))).await.unwrap();
    assert_eq!(owned.exit_code, 1, "one of them went through");
    let control = sandbox.exec(&look(format!("touch {OWNED} && test -e {OWNED}"))).await.unwrap();
    assert_eq!(control.exit_code, 0, "the command itself would have worked");
    browser.close().await;
    server.stop().await;
}
