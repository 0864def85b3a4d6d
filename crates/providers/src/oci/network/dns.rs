//! The name server of sandboxes: forwards to whatever the host itself asks.
//!
//! It listens inside the router's namespace and asks from the host's, so that
//! sandboxes can use a resolver (such as one on the host's loopback) that they
//! could never reach.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

/// Longest query or answer over UDP (EDNS; RFC 6891 6.2.5 suggests 4096).
const MAX_UDP_BYTES: usize = 4096;

/// Longest message over TCP (RFC 1035 4.2.2: a 16-bit length).
const MAX_TCP_BYTES: usize = u16::MAX as usize;

/// Queries on their way at a time, of all sandboxes together; more are dropped
/// and asked again by whoever wants to know.
const MAX_PENDING: usize = 512;

/// Queries over one TCP connection, and how long it may be idle.
const MAX_PER_CONNECTION: usize = 100;
const CONNECTION_IDLE: Duration = Duration::from_secs(10);

/// How long one name server may take before the next is asked.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// Name servers asked at most (`MAXNS` of the C library).
const MAX_SERVERS: usize = 3;

const RESOLV_CONF: &str = "/etc/resolv.conf";
const DNS_PORT: u16 = 53;

/// Length of a message's header, and where its flags are.
const HEADER_BYTES: usize = 12;

/// Answers queries until the future is dropped. Asks `name_servers`, or the
/// host's own if there are none.
pub(super) async fn serve(
    sockets: (std::net::UdpSocket, std::net::TcpListener),
    name_servers: Vec<SocketAddr>,
) -> io::Result<()> {
    let (udp, tcp) = sockets;
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    let (udp, tcp) = (Arc::new(UdpSocket::from_std(udp)?), TcpListener::from_std(tcp)?);
    let forwarder = Arc::new(Forwarder {
        pending: Arc::new(Semaphore::new(MAX_PENDING)),
        fixed: name_servers,
        servers: Mutex::default(),
    });
    // Dropping the set ends whatever is on its way.
    let mut tasks = tokio::task::JoinSet::new();
    let mut buffer = vec![0; MAX_UDP_BYTES];
    loop {
        tokio::select! {
            received = udp.recv_from(&mut buffer) => match received {
                Ok((length, from)) => {
                    let Ok(permit) = Arc::clone(&forwarder.pending).try_acquire_owned() else { continue };
                    let (forwarder, udp, query) = (Arc::clone(&forwarder), Arc::clone(&udp), buffer[..length].to_vec());
                    tasks.spawn(async move {
                        let answer = forwarder.answer_udp(&query).await;
                        if let Some(answer) = answer {
                            // A sandbox that is gone needs no answer.
                            let _ = udp.send_to(&answer, from).await;
                        }
                        drop(permit);
                    });
                }
                Err(error) => tracing::debug!(%error, "a name query could not be read"),
            },
            accepted = tcp.accept() => match accepted {
                Ok((stream, _)) => {
                    let Ok(permit) = Arc::clone(&forwarder.pending).try_acquire_owned() else { continue };
                    let forwarder = Arc::clone(&forwarder);
                    tasks.spawn(async move {
                        // Its own trouble, or the guest's; nobody else's.
                        let _ = forwarder.converse(stream).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection for name queries could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = tasks.join_next() => {}
        }
    }
}

struct Forwarder {
    pending: Arc<Semaphore>,
    /// Asked instead of the host's own, if there are any.
    fixed: Vec<SocketAddr>,
    servers: Mutex<Servers>,
}

/// The host's name servers as of a version of its configuration.
#[derive(Default)]
struct Servers {
    read_at: Option<SystemTime>,
    addresses: Vec<SocketAddr>,
}

impl Forwarder {
    async fn answer_udp(&self, query: &[u8]) -> Option<Vec<u8>> {
        if !is_query(query) {
            return None;
        }
        for server in self.servers() {
            if let Ok(Ok(answer)) = tokio::time::timeout(ANSWER_LIMIT, ask_udp(server, query)).await {
                return Some(answer);
            }
        }
        Some(failure(query))
    }

    /// Serves one TCP connection.
    async fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        for _ in 0..MAX_PER_CONNECTION {
            let query = tokio::time::timeout(CONNECTION_IDLE, read_message(&mut stream)).await??;
            if !is_query(&query) {
                return Ok(());
            }
            let mut answer = failure(&query);
            for server in self.servers() {
                if let Ok(Ok(got)) = tokio::time::timeout(ANSWER_LIMIT, ask_tcp(server, &query)).await {
                    answer = got;
                    break;
                }
            }
            tokio::time::timeout(CONNECTION_IDLE, write_message(&mut stream, &answer)).await??;
        }
        Ok(())
    }

    fn servers(&self) -> Vec<SocketAddr> {
        if !self.fixed.is_empty() {
            return self.fixed.clone();
        }
        let changed_at = std::fs::metadata(RESOLV_CONF).and_then(|metadata| metadata.modified()).ok();
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if servers.addresses.is_empty() || servers.read_at != changed_at {
            let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
            *servers = Servers { read_at: changed_at, addresses: parse_servers(&text) };
        }
        servers.addresses.clone()
    }
}

/// `nameserver` lines of resolv.conf(5). Without any the resolver of the C
/// library asks the host itself, and so do we.
fn parse_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let mut servers: Vec<SocketAddr> = resolv_conf
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next()?.parse::<IpAddr>().ok()).flatten()
        })
        .map(|address| SocketAddr::new(address, DNS_PORT))
        .take(MAX_SERVERS)
        .collect();
    if servers.is_empty() {
        servers.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DNS_PORT));
    }
    servers
}

async fn ask_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr =
        if server.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; MAX_UDP_BYTES];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // Anything else is not an answer to this question.
        if length >= HEADER_BYTES && buffer[..2] == query[..2] {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_message(&mut stream, query).await?;
    read_message(&mut stream).await
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?).min(MAX_TCP_BYTES);
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream.write_u16(length).await?;
    stream.write_all(message).await
}

/// A question, by its header (RFC 1035 4.1.1: QR is the first bit of byte 2).
fn is_query(message: &[u8]) -> bool {
    message.len() >= HEADER_BYTES && message[2] & 0x80 == 0
}

/// The question back, marked as answered with "server failure".
fn failure(query: &[u8]) -> Vec<u8> {
    const RESPONSE: u8 = 0x80;
    const RECURSION_AVAILABLE_AND_SERVFAIL: u8 = 0x82;
    let mut answer = query.to_vec();
    answer[2] |= RESPONSE;
    answer[3] = RECURSION_AVAILABLE_AND_SERVFAIL;
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_the_hosts_own() {
        let text = "# comment\nnameserver 10.0.0.53\nsearch example\nnameserver fd00::1\nnameserver bad\n";
        let expected = ["10.0.0.53:53", "[fd00::1]:53"].map(|address| address.parse().unwrap());
        assert_eq!(parse_servers(text), expected);
        assert_eq!(parse_servers(""), ["127.0.0.1:53".parse().unwrap()]);
    }

    #[test]
    fn only_questions_are_questions() {
        let mut query = vec![0x12, 0x34, 0x01, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        assert!(is_query(&query));
        let failed = failure(&query);
        assert_eq!((failed[..2].to_vec(), failed[3] & 0xf), (vec![0x12, 0x34], 2));
        assert!(!is_query(&failed));
        query.truncate(11);
        assert!(!is_query(&query));
    }
}
