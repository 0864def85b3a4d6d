//! `/stacyvm/dial`: a byte stream to something that listens in the sandbox.
//!
//! Only its own loopback, or a unix socket opened with the rights of the
//! sandbox's user.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use rustix::io::Errno;
use stacyvm_envd::http::{DIAL_PROTOCOL, PORT, UNIX, USERNAME};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::relay::relay;
use super::upload::Upload;
use super::{empty, query_value};
use crate::files::blocking;
use crate::serve::Body;
use crate::user::Identity;
use crate::wakeful::Wakeful;
use crate::{Failure, Sandbox, net};

/// Nothing on loopback takes longer, unless its backlog is full.
const CONNECT_TIME: Duration = Duration::from_secs(5);

/// Moved at once, in each direction, where bytes have to be copied.
const COPY_BYTES: usize = 64 << 10;

/// What was dialed.
enum Far {
    Port(TcpStream),
    Unix(UnixStream),
}

pub(crate) async fn dial(sandbox: &Sandbox, mut request: Request<Upload>) -> Result<Response<Body>, Failure> {
    let asked = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if asked != Some(DIAL_PROTOCOL) {
        return Err(Failure::InvalidArgument(format!("a dial needs `Upgrade: {DIAL_PROTOCOL}`")));
    }
    let query = request.uri().query();
    match (query_value(query, PORT), query_value(query, UNIX)) {
        (Some(port), None) => {
            let port = port.parse().ok().filter(|port| *port > 0);
            let port = port.ok_or_else(|| Failure::InvalidArgument("not a port".to_owned()))?;
            let stream = connect_port(sandbox, port).await?;
            join(&mut request, Far::Port(stream));
        }
        (None, Some(path)) => {
            let identity = sandbox.identity(query_value(query, USERNAME).as_deref())?;
            let path = identity.resolve_path(&path)?;
            let stream = connect_unix(path, identity).await?;
            join(&mut request, Far::Unix(stream));
        }
        _ => return Err(Failure::InvalidArgument("`port` or `unix` says what to dial".to_owned())),
    }
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(DIAL_PROTOCOL));
    Ok(response)
}

async fn connect_port(sandbox: &Sandbox, port: u16) -> Result<TcpStream, Failure> {
    let closed = || Failure::PortClosed(format!("port {port}"));
    if sandbox.shares_host_network {
        let own = blocking(|| net::listening_ports(net::Listeners::OwnOnly)).await?;
        if !own.contains(&port) {
            return Err(closed());
        }
    }
    let connect = async {
        match TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, port)).await {
            Ok(stream) => Ok(stream),
            Err(_) => TcpStream::connect((std::net::Ipv6Addr::LOCALHOST, port)).await,
        }
    };
    let stream = timeout(CONNECT_TIME, connect).await.map_err(|_| closed())?.map_err(|_| closed())?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn connect_unix(path: PathBuf, identity: Identity) -> Result<UnixStream, Failure> {
    let stream = blocking(move || {
        let shown = path.display().to_string();
        crate::user::acting_as(&identity, || net::connect_unix(&path)).map_err(|error: io::Error| {
            match Errno::from_io_error(&error) {
                Some(Errno::CONNREFUSED | Errno::NOENT | Errno::AGAIN) => Failure::PortClosed(shown),
                Some(Errno::INVAL | Errno::NAMETOOLONG) => {
                    Failure::InvalidArgument(format!("not the path of a socket: {shown}"))
                }
                Some(Errno::PROTOTYPE) => Failure::InvalidArgument(format!("not a stream socket: {shown}")),
                _ => Failure::file(&path, &error),
            }
        })
    })
    .await?;
    UnixStream::from_std(stream).map_err(|error| Failure::Internal(format!("watch a socket: {error}")))
}

/// Once the answer is sent, the connection is the stream.
fn join(request: &mut Request<Upload>, far: Far) {
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        // Either side may go away at any time.
        let _ended = match auto::upgrade::downcast::<TokioIo<Wakeful>>(upgraded) {
            Ok(near) => splice(near.io.into_inner().into_stream(), near.read_buf, far).await,
            Err(near) => copy(TokioIo::new(near), far).await,
        };
    });
}

async fn splice(near: UnixStream, first: Bytes, far: Far) -> io::Result<()> {
    let far = match far {
        Far::Port(stream) => OwnedFd::from(stream.into_std()?),
        Far::Unix(stream) => OwnedFd::from(stream.into_std()?),
    };
    relay(near.into_std()?.into(), first, far).await
}

async fn copy(mut near: impl AsyncRead + AsyncWrite + Unpin, far: Far) -> io::Result<()> {
    let copied = match far {
        Far::Port(mut stream) => copy_bidirectional_with_sizes(&mut near, &mut stream, COPY_BYTES, COPY_BYTES).await,
        Far::Unix(mut stream) => copy_bidirectional_with_sizes(&mut near, &mut stream, COPY_BYTES, COPY_BYTES).await,
    };
    copied.map(drop)
}
