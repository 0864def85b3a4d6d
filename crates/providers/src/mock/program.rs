//! The programs that exist in a mock sandbox.

use std::time::Duration;

use bytes::Bytes;
use stacyvm_api::Limit;
use stacyvm_sandbox::{EntryKind, Exit, SessionError};

use super::shell::{Flow, Shell, Streams, shell_message};

/// Every name that can be run, apart from its directory.
const NAMES: [&str; 45] = [
    ":",
    "[",
    "cat",
    "cd",
    "chmod",
    "echo",
    "env",
    "exit",
    "export",
    "false",
    "head",
    "hostname",
    "id",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mock-disk-full",
    "mock-oom",
    "mock-pids",
    "mv",
    "nproc",
    "printenv",
    "printf",
    "pwd",
    "read",
    "rm",
    "rmdir",
    "seq",
    "sh",
    "bash",
    "sleep",
    "stty",
    "sync",
    "tail",
    "test",
    "touch",
    "true",
    "tty",
    "uname",
    "unset",
    "wait",
    "wc",
    "whoami",
    "yes",
];
/// Bytes that `yes` writes at once.
const FLOOD_CHUNK_BYTES: usize = 4096;
const SIGKILL: i32 = 9;

pub(super) fn exists(name: &str) -> bool {
    NAMES.contains(&base(name))
}

pub(super) async fn run(shell: &mut Shell, argv: Vec<String>, streams: &Streams) -> Flow {
    let Some((name, arguments)) = argv.split_first() else { return Flow::Continue(()) };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    shell.status = match base(name) {
        ":" | "true" | "sync" => 0,
        "false" => 1,
        "exit" => {
            return Flow::Break(arguments.first().map_or(shell.status, |code| number(code).rem_euclid(256) as i32));
        }
        "sh" | "bash" => run_shell(shell, &arguments, streams).await,
        "echo" => echo(shell, &arguments, streams).await,
        "printf" => printf(shell, &arguments, streams).await,
        "cat" => cat(shell, &arguments, streams).await,
        "head" => head(shell, &arguments, streams).await,
        "tail" => tail(shell, &arguments, streams).await,
        "wc" => wc(shell, &arguments, streams).await,
        "sleep" => {
            tokio::time::sleep(span(arguments.first().copied().unwrap_or("0"))).await;
            0
        }
        "yes" => flood(shell, arguments.first().copied().unwrap_or("y"), streams).await,
        "seq" => seq(shell, &arguments, streams).await,
        "read" => read(shell, &arguments, streams).await,
        "env" => return env(shell, &arguments, streams).await,
        "printenv" => printenv(shell, &arguments, streams).await,
        "wait" => {
            shell.wait_for_jobs().await;
            0
        }
        "cd" | "export" | "unset" => builtin(shell, base(name), &arguments, streams).await,
        "pwd" | "whoami" | "hostname" | "uname" | "nproc" | "id" | "tty" | "stty" => {
            fact(shell, base(name), &arguments, streams).await
        }
        "test" | "[" => i32::from(!test(shell, &arguments)),
        "kill" => kill(shell, &arguments, streams).await,
        "mock-oom" | "mock-pids" | "mock-disk-full" => {
            shell.sandbox.count_kill(match base(name) {
                "mock-oom" => Limit::Memory,
                "mock-pids" => Limit::Pids,
                _ => Limit::Disk,
            });
            shell.process.kill(Exit { code: None, signal: Some(SIGKILL), timed_out: false });
            std::future::pending::<i32>().await
        }
        "ls" | "mkdir" | "rm" | "rmdir" | "touch" | "mv" | "ln" | "chmod" => {
            change_files(shell, base(name), &arguments, streams).await
        }
        _ => {
            shell.complain(streams, &format!("sh: {name}: not found")).await;
            127
        }
    };
    Flow::Continue(())
}

fn base(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

async fn run_shell(shell: &mut Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let mut inner = shell.subshell();
    let operands: Vec<&str> = arguments.iter().copied().filter(|argument| !argument.starts_with('-')).collect();
    let flow = match arguments.iter().find(|argument| argument.starts_with('-') && argument.contains('c')) {
        Some(_) => inner.run_script(operands.first().copied().unwrap_or_default(), streams).await,
        None => match operands.first() {
            Some(script) => {
                let path = inner.absolute(script);
                match inner.sandbox.read_all(&path) {
                    Ok(bytes) => inner.run_script(&String::from_utf8_lossy(&bytes), streams).await,
                    Err(error) => {
                        inner.complain(streams, &shell_message(script, &error)).await;
                        Flow::Break(127)
                    }
                }
            }
            None => interact(&mut inner, streams).await,
        },
    };
    match flow {
        Flow::Break(status) => status,
        Flow::Continue(()) => inner.status,
    }
}

/// Lines from standard input, with a prompt on a terminal.
async fn interact(shell: &mut Shell, streams: &Streams) -> Flow {
    loop {
        if shell.process.terminal {
            shell.write(&streams.output, "$ ").await;
        }
        let Some(line) = streams.input.read_line(&shell.process).await else { return Flow::Continue(()) };
        // A syntax error ends a script, but not an interactive shell.
        if let Flow::Break(status) = shell.run_script(&String::from_utf8_lossy(&line), streams).await
            && !(shell.process.terminal && status == 2)
        {
            return Flow::Break(status);
        }
    }
}

async fn echo(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let (newline, rest) = match arguments.split_first() {
        Some((&"-n", rest)) => (false, rest),
        _ => (true, arguments),
    };
    let (escapes, rest) = match rest.split_first() {
        Some((&"-e", rest)) => (true, rest),
        _ => (false, rest),
    };
    let mut text = rest.join(" ").into_bytes();
    if escapes {
        text = unescaped(&text);
    }
    if newline {
        text.push(b'\n');
    }
    shell.write(&streams.output, text).await;
    0
}

async fn printf(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let Some((format, values)) = arguments.split_first() else { return 2 };
    let format = unescaped(format.as_bytes());
    let mut values = values.iter();
    let mut text = Vec::new();
    loop {
        let left = values.len();
        let mut at = 0;
        while at < format.len() {
            match (format[at], format.get(at + 1)) {
                (b'%', Some(b'%')) => text.push(b'%'),
                (b'%', Some(b's')) => text.extend_from_slice(values.next().copied().unwrap_or_default().as_bytes()),
                (b'%', Some(b'd')) => {
                    text.extend_from_slice(number(values.next().copied().unwrap_or("0")).to_string().as_bytes());
                }
                (byte, _) => {
                    text.push(byte);
                    at += 1;
                    continue;
                }
            }
            at += 2;
        }
        // The format is used again as long as it uses up arguments.
        if values.len() == 0 || values.len() == left {
            break;
        }
    }
    shell.write(&streams.output, text).await;
    0
}

async fn cat(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    if arguments.is_empty() || arguments == ["-"] {
        while let Some(bytes) = streams.input.read(&shell.process).await {
            shell.write(&streams.output, bytes).await;
        }
        return 0;
    }
    let mut status = 0;
    for path in arguments {
        match shell.sandbox.read_all(&shell.absolute(path)) {
            Ok(bytes) => {
                let mut bytes = bytes;
                while !bytes.is_empty() {
                    let piece = bytes.split_to(bytes.len().min(32 * 1024));
                    shell.write(&streams.output, piece).await;
                }
            }
            Err(error) => {
                shell.complain(streams, &complaint("cat", path, &error)).await;
                status = 1;
            }
        }
    }
    status
}

/// All input, or all of the named file; the message when that fails.
async fn gather(shell: &Shell, name: &str, file: Option<&&str>, streams: &Streams) -> Result<Vec<u8>, String> {
    if let Some(path) = file {
        let read = shell.sandbox.read_all(&shell.absolute(path));
        return read.map(|bytes| bytes.to_vec()).map_err(|error| complaint(name, path, &error));
    }
    let mut all = Vec::new();
    while let Some(bytes) = streams.input.read(&shell.process).await {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

async fn head(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let (count, bytes, file) = match arguments {
        ["-c", count, rest @ ..] => (number(count), true, rest.first()),
        ["-n", count, rest @ ..] => (number(count), false, rest.first()),
        rest => (10, false, rest.first()),
    };
    let count = usize::try_from(count).unwrap_or(0);
    if bytes && file == Some(&"/dev/zero") {
        let mut left = count;
        while left > 0 {
            let piece = left.min(FLOOD_CHUNK_BYTES);
            shell.write(&streams.output, vec![0; piece]).await;
            left -= piece;
        }
        return 0;
    }
    match gather(shell, "head", file, streams).await {
        Ok(all) if bytes => shell.write(&streams.output, all[..count.min(all.len())].to_vec()).await,
        Ok(all) => {
            let lines: Vec<u8> = all.split_inclusive(|byte| *byte == b'\n').take(count).flatten().copied().collect();
            shell.write(&streams.output, lines).await;
        }
        Err(message) => {
            shell.complain(streams, &message).await;
            return 1;
        }
    }
    0
}

async fn tail(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let (count, file) = match arguments {
        ["-n", count, rest @ ..] => (number(count), rest.first()),
        rest => (10, rest.first()),
    };
    match gather(shell, "tail", file, streams).await {
        Ok(all) => {
            let lines: Vec<&[u8]> = all.split_inclusive(|byte| *byte == b'\n').collect();
            let skip = lines.len().saturating_sub(usize::try_from(count).unwrap_or(0));
            shell.write(&streams.output, lines[skip..].concat()).await;
            0
        }
        Err(message) => {
            shell.complain(streams, &message).await;
            1
        }
    }
}

async fn wc(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let file = arguments.iter().find(|argument| !argument.starts_with('-'));
    match gather(shell, "wc", file, streams).await {
        Ok(all) => {
            let lines = all.split(|byte| *byte == b'\n').count() - 1;
            let text = match arguments.first() {
                Some(&"-c") => format!("{}\n", all.len()),
                Some(&"-l") => format!("{lines}\n"),
                _ => format!("{lines} {} {}\n", String::from_utf8_lossy(&all).split_whitespace().count(), all.len()),
            };
            shell.write(&streams.output, text).await;
            0
        }
        Err(message) => {
            shell.complain(streams, &message).await;
            1
        }
    }
}

/// Writes without end, until it is killed.
async fn flood(shell: &Shell, word: &str, streams: &Streams) -> i32 {
    let line = format!("{word}\n");
    let chunk = Bytes::from(line.repeat((FLOOD_CHUNK_BYTES / line.len()).max(1)));
    loop {
        shell.write(&streams.output, chunk.clone()).await;
        tokio::task::yield_now().await;
    }
}

async fn seq(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let (first, last) = match arguments {
        [last] => (1, number(last)),
        [first, last] => (number(first), number(last)),
        _ => return 2,
    };
    for value in first..=last {
        shell.write(&streams.output, format!("{value}\n")).await;
    }
    0
}

async fn read(shell: &mut Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let Some(line) = streams.input.read_line(&shell.process).await else { return 1 };
    if let Some(name) = arguments.last() {
        let value = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
        shell.environment.insert((*name).to_owned(), value);
    }
    0
}

async fn env(shell: &mut Shell, arguments: &[&str], streams: &Streams) -> Flow {
    let settings: Vec<(&str, &str)> = arguments.iter().map_while(|argument| argument.split_once('=')).collect();
    let command: Vec<String> = arguments[settings.len()..].iter().map(|&argument| argument.to_owned()).collect();
    let mut inner = shell.subshell();
    inner.environment.extend(settings.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())));
    if command.is_empty() {
        inner.write(&streams.output, settings_of(&inner)).await;
        shell.status = 0;
        return Flow::Continue(());
    }
    shell.status = match inner.run_program(command, streams).await {
        Flow::Break(status) => status,
        Flow::Continue(()) => inner.status,
    };
    Flow::Continue(())
}

async fn printenv(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    match arguments.first() {
        None => {
            shell.write(&streams.output, settings_of(shell)).await;
            0
        }
        Some(name) => match shell.environment.get(*name) {
            Some(value) => {
                shell.write(&streams.output, format!("{value}\n")).await;
                0
            }
            None => 1,
        },
    }
}

/// The environment, one setting a line.
fn settings_of(shell: &Shell) -> String {
    shell.environment.iter().fold(String::new(), |lines, (name, value)| lines + name + "=" + value + "\n")
}

async fn builtin(shell: &mut Shell, name: &str, arguments: &[&str], streams: &Streams) -> i32 {
    match name {
        "cd" => {
            let target = shell.absolute(arguments.first().copied().unwrap_or("/"));
            match shell.sandbox.directory(&target) {
                Ok(path) => {
                    shell.environment.insert("PWD".to_owned(), path.clone());
                    shell.directory = path;
                }
                Err(error) => {
                    shell.complain(streams, &complaint("cd", &target, &error)).await;
                    return 1;
                }
            }
        }
        "export" => {
            for (name, value) in arguments.iter().filter_map(|argument| argument.split_once('=')) {
                shell.environment.insert(name.to_owned(), value.to_owned());
            }
        }
        _unset => {
            for name in arguments {
                shell.environment.remove(*name);
            }
        }
    }
    0
}

async fn fact(shell: &Shell, name: &str, arguments: &[&str], streams: &Streams) -> i32 {
    let text = match name {
        "pwd" => shell.directory.clone(),
        "whoami" => shell.user.clone(),
        "hostname" => shell.sandbox.hostname().to_owned(),
        "uname" => "Linux".to_owned(),
        "nproc" => "1".to_owned(),
        "tty" if shell.process.terminal => "/dev/pts/0".to_owned(),
        "stty" => match (arguments.first(), shell.process.terminal_size()) {
            (Some(&"size"), Some(size)) => format!("{} {}", size.rows, size.cols),
            _ => return 1,
        },
        "tty" => "not a tty".to_owned(),
        _id => if shell.user == "root" { "0" } else { "1000" }.to_owned(),
    };
    shell.write(&streams.output, format!("{text}\n")).await;
    i32::from(text == "not a tty")
}

fn test(shell: &Shell, arguments: &[&str]) -> bool {
    let arguments = arguments.strip_suffix(&["]"]).unwrap_or(arguments);
    let kind = |path: &str| shell.sandbox.kind(&shell.absolute(path));
    match arguments {
        ["!", rest @ ..] => !test(shell, rest),
        ["-e", path] => kind(path).is_some(),
        ["-f", path] => kind(path) == Some(EntryKind::File),
        ["-d", path] => kind(path) == Some(EntryKind::Directory),
        ["-z", text] => text.is_empty(),
        ["-n", text] | [text] => !text.is_empty(),
        [left, "=", right] => left == right,
        [left, "!=", right] => left != right,
        _ => false,
    }
}

async fn kill(shell: &Shell, arguments: &[&str], streams: &Streams) -> i32 {
    let (signal, pid) = match arguments {
        [signal, pid] => (super::session::signal_number(signal.trim_start_matches('-')), pid),
        [pid] => (Some(15), pid),
        _ => return 2,
    };
    let (Some(signal), Ok(pid)) = (signal, pid.parse()) else { return 2 };
    if pid == shell.process.pid {
        shell.process.kill(Exit { code: None, signal: Some(signal), timed_out: false });
        return std::future::pending().await;
    }
    if shell.sandbox.signal(pid, signal) {
        return 0;
    }
    shell.complain(streams, &format!("kill: can't kill pid {pid}: No such process")).await;
    1
}

async fn change_files(shell: &Shell, name: &str, arguments: &[&str], streams: &Streams) -> i32 {
    let flags: String = arguments.iter().filter_map(|argument| argument.strip_prefix('-')).collect();
    let paths: Vec<&str> = arguments.iter().copied().filter(|argument| !argument.starts_with('-')).collect();
    if name == "ls" {
        return list(shell, paths.first().copied().unwrap_or("."), streams).await;
    }
    let sandbox = &shell.sandbox;
    let mut status = 0;
    let mut report = Vec::new();
    let mut note = |path: &str, result: Result<(), SessionError>| {
        if let Err(error) = result {
            report.push(complaint(name, path, &error));
            status = 1;
        }
    };
    match (name, paths.as_slice()) {
        ("mv", [from, to]) => note(from, sandbox.rename(&shell.absolute(from), &shell.absolute(to))),
        ("ln", [target, path]) => note(path, sandbox.link(&shell.absolute(path), target, &shell.user)),
        ("chmod", [mode, path]) => {
            let mode = u32::from_str_radix(mode, 8).unwrap_or(0o644);
            note(path, sandbox.chmod(&shell.absolute(path), mode));
        }
        ("mkdir", paths) => {
            for path in paths {
                note(path, sandbox.make_dir(&shell.absolute(path), &shell.user).map(drop));
            }
        }
        ("touch", paths) => {
            for path in paths {
                note(path, sandbox.open_for_writing(&shell.absolute(path), false, &shell.user));
            }
        }
        (_remove, paths) => {
            for path in paths {
                let recursive = name == "rmdir" || flags.contains('r');
                match sandbox.remove(&shell.absolute(path), recursive) {
                    Err(SessionError::FileNotFound(_)) if flags.contains('f') => {}
                    result => note(path, result),
                }
            }
        }
    }
    for line in report {
        shell.complain(streams, &line).await;
    }
    status
}

async fn list(shell: &Shell, path: &str, streams: &Streams) -> i32 {
    match shell.sandbox.names(&shell.absolute(path)) {
        Ok(names) => {
            let lines = names.iter().fold(String::new(), |lines, name| lines + name + "\n");
            shell.write(&streams.output, lines).await;
            0
        }
        Err(error) => {
            shell.complain(streams, &complaint("ls", path, &error)).await;
            1
        }
    }
}

fn complaint(name: &str, path: &str, error: &SessionError) -> String {
    match error {
        SessionError::FileNotFound(_) => format!("{name}: {path}: No such file or directory"),
        other => format!("{name}: {path}: {other}"),
    }
}

fn number(text: &str) -> i64 {
    text.parse().unwrap_or(0)
}

fn span(text: &str) -> Duration {
    let (number, scale) = match text.chars().last() {
        Some('s') => (&text[..text.len() - 1], 1.0),
        Some('m') => (&text[..text.len() - 1], 60.0),
        Some('h') => (&text[..text.len() - 1], 3600.0),
        _ => (text, 1.0),
    };
    let seconds = number.parse::<f64>().unwrap_or(0.0) * scale;
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(u64::from(u32::MAX)))
}

/// `\n`, `\t`, `\r`, `\\`, `\0`, `\NNN` and `\xHH`.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        if text[at] != b'\\' || at + 1 == text.len() {
            out.push(text[at]);
            at += 1;
            continue;
        }
        at += 2;
        let digits = |from: usize, radix: u32, most: usize| {
            text[from..].iter().take(most).take_while(|byte| char::from(**byte).is_digit(radix)).count()
        };
        let (byte, length) = match text[at - 1] {
            b'n' => (b'\n', 0),
            b't' => (b'\t', 0),
            b'r' => (b'\r', 0),
            b'x' => parsed(text, at, digits(at, 16, 2), 16),
            b'0'..=b'7' => {
                let (byte, length) = parsed(text, at - 1, digits(at - 1, 8, 4), 8);
                (byte, length - 1)
            }
            other => (other, 0),
        };
        out.push(byte);
        at += length;
    }
    out
}

fn parsed(text: &[u8], at: usize, length: usize, radix: u32) -> (u8, usize) {
    let digits = std::str::from_utf8(&text[at..at + length]).unwrap_or_default();
    (u32::from_str_radix(digits, radix).unwrap_or(0) as u8, length)
}
