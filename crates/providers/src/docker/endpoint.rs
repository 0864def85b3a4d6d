//! Where a daemon is, as users write it.

use std::fmt;
use std::path::PathBuf;

/// Docker's own ports.
const PLAIN_PORT: u16 = 2375;
const TLS_PORT: u16 = 2376;

/// A daemon's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// On this machine.
    Unix(PathBuf),
    Tcp {
        host: String,
        port: u16,
        /// Without it everybody on the way can read and change everything.
        tls: Option<TlsFiles>,
    },
}

/// PEM files of a connection with TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Who vouches for the daemon.
    pub ca: PathBuf,
    /// Who vouches for us, where the daemon asks.
    pub identity: Option<ClientIdentity>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientIdentity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Endpoint {
    /// Docker's default.
    pub fn default_socket() -> Self {
        Self::Unix("/var/run/docker.sock".into())
    }

    /// `/path`, `unix:///path`, `tcp://host[:port]`, as in `DOCKER_HOST`. The
    /// error says what to write instead.
    pub fn parse(text: &str, tls: Option<TlsFiles>) -> Result<Self, String> {
        let text = text.trim();
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        match text.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("unix", _)) => Err(format!("`{text}` needs an absolute path: unix:///var/run/docker.sock")),
            Some(("tcp" | "http" | "https", address)) => Self::parse_tcp(address, tls),
            Some(("ssh", _)) => Err(format!(
                "`{text}` goes over ssh, which is not supported; forward the socket (ssh -L /path:/var/run/docker.sock) \
                 and name its path, or use tcp:// with TLS"
            )),
            _ => Err(format!("`{text}` is neither a socket's path, nor unix:///path, nor tcp://host:port")),
        }
    }

    fn parse_tcp(address: &str, tls: Option<TlsFiles>) -> Result<Self, String> {
        let address = address.trim_end_matches('/');
        let default = if tls.is_some() { TLS_PORT } else { PLAIN_PORT };
        let (host, port) = match address.rsplit_once(':') {
            // The colons of a bare IPv6 address are no port.
            Some((host, port)) if !port.ends_with(']') && (!host.contains(':') || host.ends_with(']')) => {
                (host, port.parse().map_err(|_| format!("`{port}` is not a port"))?)
            }
            _ => (address, default),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || host.contains(['/', '@', ' ']) {
            return Err(format!("`{address}` is not host:port"));
        }
        Ok(Self::Tcp { host: host.to_owned(), port, tls })
    }

    /// Whether the daemon's files may be this machine's files.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Unix(_))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp { host, port, .. } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port, .. } => write!(f, "tcp://{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls() -> TlsFiles {
        TlsFiles { ca: "/ca.pem".into(), identity: None }
    }

    #[test]
    fn addresses_are_read_as_docker_does() {
        for (text, shown) in [
            ("/run/d.sock", "unix:///run/d.sock"),
            (" unix:///run/d.sock ", "unix:///run/d.sock"),
            ("tcp://box:1234", "tcp://box:1234"),
            ("tcp://box", "tcp://box:2375"),
            ("http://10.0.0.1:80/", "tcp://10.0.0.1:80"),
            ("tcp://[::1]:99", "tcp://[::1]:99"),
            ("tcp://[::1]", "tcp://[::1]:2375"),
            ("tcp://fd00::1", "tcp://[fd00::1]:2375"),
        ] {
            assert_eq!(Endpoint::parse(text, None).unwrap().to_string(), shown, "{text}");
        }
        let with_tls = Endpoint::parse("tcp://box", Some(tls())).unwrap();
        assert_eq!(with_tls, Endpoint::Tcp { host: "box".into(), port: 2376, tls: Some(tls()) });
    }

    #[test]
    fn what_cannot_be_reached_says_why() {
        for (text, part) in [
            ("ssh://me@box", "forward the socket"),
            ("unix://relative", "absolute path"),
            ("npipe:////./pipe/docker", "neither"),
            ("box:2375", "neither"),
            ("tcp://:2375", "not host:port"),
            ("tcp://box:port", "not a port"),
            ("", "neither"),
        ] {
            let message = Endpoint::parse(text, None).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
