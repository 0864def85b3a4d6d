//! Who listens on a port, for the message that says so.

use std::fs;

/// State of a listening socket in `/proc/net/tcp` (Linux, `TCP_LISTEN`).
const LISTENING: &str = "0A";

/// Name and id of the process that listens on a TCP port of this host, where
/// that can be seen.
pub(crate) fn owner(port: u16) -> Option<String> {
    let socket = format!("socket:[{}]", listening_inode(port)?);
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        let holds = descriptors.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|it| it.as_os_str() == &*socket));
        if holds {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (process {pid})", name.trim()));
        }
    }
    None
}

fn listening_inode(port: u16) -> Option<String> {
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|table| {
        let table = fs::read_to_string(table).ok()?;
        table.lines().skip(1).find_map(|line| inode_of(line, port))
    })
}

/// The inode on a line such as
/// `0: 0100007F:1CFF 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 12345 …`.
fn inode_of(line: &str, port: u16) -> Option<String> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
    let matches = *fields.get(3)? == LISTENING && u16::from_str_radix(local_port, 16) == Ok(port);
    matches.then(|| fields.get(9).map(|inode| (*inode).to_owned())).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let found = owner(listener.local_addr().unwrap().port()).unwrap();
        assert!(found.ends_with(&format!("(process {})", std::process::id())), "{found}");
    }

    #[test]
    fn a_free_port_has_no_owner() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        assert_eq!(owner(port), None);
    }
}
