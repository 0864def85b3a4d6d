//! Ports that listen in the sandbox, from the kernel's own tables.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::Failure;

/// No more of a table than this is read.
const MAX_TABLE_BYTES: u64 = 16 << 20;

/// `TCP_LISTEN`.
const LISTENING: &str = "0A";

/// 127.0.0.11, where Docker answers for names on networks of its users.
const DOCKER_RESOLVER: &str = "0B00007F";

/// Which listeners are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listeners {
    All,
    /// Those of processes below this agent, for sandboxes that share the host's
    /// network.
    OwnOnly,
}

/// One listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listener {
    port: u16,
    inode: u64,
}

/// TCP ports with a listener, in order.
pub(crate) fn listening_ports(wanted: Listeners) -> Result<Vec<u16>, Failure> {
    let mut listeners = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let Ok(file) = std::fs::File::open(table) else { continue };
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::io::Read::take(file, MAX_TABLE_BYTES), &mut text)
            .map_err(|error| Failure::Internal(format!("read {table}: {error}")))?;
        listeners.extend(text.lines().filter_map(parse_listener));
    }
    let own = match wanted {
        Listeners::All => None,
        Listeners::OwnOnly => Some(crate::process::descendant_sockets()),
    };
    let is_own = |listener: &Listener| own.as_ref().is_none_or(|own: &HashSet<u64>| own.contains(&listener.inode));
    let ports: BTreeSet<u16> = listeners.iter().filter(|listener| is_own(listener)).map(|l| l.port).collect();
    Ok(ports.into_iter().collect())
}

/// Connects without waiting for a full backlog.
pub(crate) fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// `proc_net_tcp(5)`: `sl local_address rem_address st … inode`.
fn parse_listener(line: &str) -> Option<Listener> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    if *fields.get(3)? != LISTENING {
        return None;
    }
    let (address, port) = fields.get(1)?.rsplit_once(':')?;
    if address == DOCKER_RESOLVER {
        return None;
    }
    Some(Listener { port: u16::from_str_radix(port, 16).ok()?, inode: fields.get(9)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_told_from_connections() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1";
        assert_eq!(parse_listener(line), Some(Listener { port: 8080, inode: 4711 }));
        assert_eq!(parse_listener(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(parse_listener(&line.replace("0100007F", "0B00007F")), None, "nobody of the sandbox's");
        assert_eq!(parse_listener("  sl  local_address rem_address   st"), None);
    }

    #[test]
    fn a_real_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let port = listener.local_addr().expect("bound").port();
        assert!(listening_ports(Listeners::All).expect("tables can be read").contains(&port));
    }
}
