//! What happens on a terminal.

use crate::support::{Server, Terminal, eventually};

use super::Fixture;

fn on_terminal(server: &Server, arguments: &[&str]) -> Terminal {
    let mut command = server.site.program();
    command.args(arguments).env("STACYVM_URL", &server.url);
    Terminal::start(&command, 90, 30)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_has_the_size_the_keys_and_the_signals_of_the_terminal() {
    let fixture = Fixture::start().await;
    let mut terminal = on_terminal(&fixture.server, &["shell", &fixture.id, "-e", "GREETING=hi", "-w", "/tmp"]);
    // What is typed is shown once more, so that the answers must differ from it.
    terminal.press("echo kind $TERM; echo size $(stty size); echo $GREETING-$((40 + 2)); pwd; tty\r");
    terminal.shows("kind xterm\r\n").await;
    terminal.shows("size 30 90\r\n").await;
    terminal.shows("hi-42\r\n/tmp\r\n/dev/pts/").await;
    assert!(terminal.is_raw(), "keys would be shown twice");
    terminal.resize(120, 40);
    eventually("the new size arrives", async || {
        terminal.press("echo size $(stty size)\r");
        terminal.shown().contains("size 40 120\r\n").then_some(())
    })
    .await;
    // Ctrl-C is for what runs inside.
    terminal.press("sleep 1234\r");
    eventually("it sleeps", async || {
        let processes = fixture.server.run(&["exec", &fixture.id, "--", "ps"]).await;
        processes.stdout().contains("sleep 1234").then_some(())
    })
    .await;
    terminal.press("\x03");
    terminal.press("echo alive-$((1 + 1))\r");
    terminal.shows("alive-2\r\n").await;
    terminal.press("exit 5\r");
    assert_eq!(terminal.ends().await.code(), Some(5));
    assert!(!terminal.is_raw(), "the terminal is as it was");

    let mut terminal = on_terminal(&fixture.server, &["shell", &fixture.id]);
    terminal.press("echo ready-$((1 + 1))\r");
    terminal.shows("ready-2\r\n").await;
    terminal.press("\x04");
    assert!(terminal.ends().await.success(), "Ctrl-D ends a shell");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_comes_back_whatever_ends_the_session() {
    let fixture = Fixture::start().await;
    let mut terminal = on_terminal(&fixture.server, &["exec", &fixture.id, "-t", "--", "sh", "-c", "tty; read x"]);
    terminal.shows("/dev/pts/").await;
    assert!(terminal.is_raw());
    fixture.server.run(&["kill", &fixture.id]).await.ok();
    assert!(!terminal.ends().await.success());
    assert!(!terminal.is_raw(), "the terminal is as it was");
    terminal.shows("error: ").await;

    let server = Server::shared().await;
    let mut terminal = on_terminal(&server, &["run", "--memory", "128"]);
    terminal.press("hostname; exit 4\r");
    assert_eq!(terminal.ends().await.code(), Some(4), "{}", terminal.shown());
    let id =
        terminal.shown().lines().find_map(|line| Some(line.trim()).filter(|line| line.len() == 23)).map(str::to_owned);
    let gone = server.run(&["inspect", &id.expect("a host name")]).await;
    assert_eq!(gone.status(), Some(1), "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_terminal_none_is_pretended() {
    let fixture = Fixture::start().await;
    let refused = fixture.server.run(&["shell", &fixture.id]).await.failed(1).says("not a terminal");
    assert!(!refused.stderr().contains("--tty"), "there is no such option: {refused}");
    refused.says(&format!("stacyvm exec {} -- COMMAND", fixture.id));
    fixture.server.run(&["exec", &fixture.id, "-t", "--", "true"]).await.failed(1).says("leave out --tty");
    let refused = fixture.server.run(&["shell", "--json", &fixture.id]).await.says("stacyvm exec --json");
    assert_eq!(refused.status(), Some(1), "{refused}");
    // People see colours, and programs do not.
    let mut terminal = on_terminal(&fixture.server, &["inspect", &fixture.id]);
    assert!(terminal.ends().await.success());
    terminal.shows("\x1b[32mrunning\x1b[0m").await;
    let plain = fixture.server.run(&["inspect", &fixture.id]).await.ok();
    assert!(!plain.stdout().contains('\x1b'), "{plain}");
    fixture.finish().await;
}
