//! What can go wrong between a caller and the server.

use std::fmt;

use serde::Deserialize;
use stacyvm_api::ErrorCode;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server answered that it will not, or cannot.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The address, a key or a name cannot be part of a request.
    #[error("{what}: {why}")]
    InvalidArgument { what: &'static str, why: String },
    /// This machine cannot make secure connections at all.
    #[error("no secure connection can be made from this machine")]
    NoTls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No connection could be made.
    #[error("no server answers at {server}")]
    Connect { server: String, source: reqwest::Error },
    /// Something answers, but no secure connection comes about.
    #[error("no secure connection to {server}: {}", problem.0)]
    Tls { server: String, problem: TlsProblem },
    /// The connection broke while a request or an answer was on its way.
    #[error("the connection to {server} broke")]
    Transport { server: String, source: Box<dyn std::error::Error + Send + Sync> },
    /// The answer is not what this API promises.
    #[error("the server's answer cannot be understood: {0}")]
    Protocol(String),
    /// Reading what was to be uploaded failed.
    #[error("reading the upload failed")]
    Upload(#[source] std::io::Error),
}

impl ClientError {
    /// The server's error code, when the server answered with one we know.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Api(error) => error.code,
            Self::InvalidArgument { .. }
            | Self::NoTls(_)
            | Self::Connect { .. }
            | Self::Tls { .. }
            | Self::Transport { .. }
            | Self::Protocol(_)
            | Self::Upload(_) => None,
        }
    }

    /// What the caller may do about it, where there is something to do.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Api(error) => error.hint.as_deref(),
            Self::Connect { .. } => Some("start one with `stacyvm serve`, or name another with --server"),
            Self::Tls { problem, .. } => Some(problem.hint()),
            Self::NoTls(_) => Some("install this machine's CA certificates: apt-get install -y ca-certificates"),
            Self::InvalidArgument { .. } | Self::Transport { .. } | Self::Protocol(_) | Self::Upload(_) => None,
        }
    }
}

/// Why there is no secure connection.
#[derive(Debug)]
pub struct TlsProblem(rustls::Error);

impl TlsProblem {
    /// The reason that TLS gave, somewhere behind a failed request.
    pub(crate) fn behind(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            // An I/O error shows what is behind the error that it holds, and not
            // that one.
            let held = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
            let found = error.downcast_ref().or_else(|| held.and_then(|held| held.downcast_ref()));
            if let Some(found) = found {
                return Some(Self(rustls::Error::clone(found)));
            }
            next = held.map(|held| held as _).or_else(|| error.source());
        }
        None
    }

    fn hint(&self) -> &'static str {
        use rustls::CertificateError::{
            Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext, Other,
        };
        match &self.0 {
            rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }) => {
                "name the server in --server by a name that its certificate has"
            }
            rustls::Error::InvalidCertificate(
                Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. },
            ) => "renew the server's certificate, and look at the clocks of both machines",
            // The verifier's own error, of a crate that we do not name.
            rustls::Error::InvalidCertificate(Other(error)) if error.to_string().contains("CaUsedAsEndEntity") => {
                "its certificate is one of a CA, as `openssl req -x509` makes them, and no server's: make it anew with \
                 `-addext basicConstraints=critical,CA:FALSE`, or sign the server's with the CA and name the CA's in \
                 SSL_CERT_FILE"
            }
            rustls::Error::InvalidCertificate(_) => {
                "its certificate is not trusted here: name the PEM file of its CA, or the certificate itself where it \
                 is self-signed, in SSL_CERT_FILE, or add it to this machine's (update-ca-certificates)"
            }
            rustls::Error::InvalidMessage(_) => "if that server speaks plain HTTP, write http:// in --server",
            _ => "the server's log may say more; `openssl s_client -connect HOST:PORT` shows what it offers",
        }
    }
}

/// An answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// `None` for a code that this client does not know, and for answers that
    /// did not come from the server itself (a proxy's, for example).
    pub code: Option<ErrorCode>,
    /// The code as it was sent; empty when there was none.
    pub code_text: String,
    pub message: String,
    pub hint: Option<String>,
    /// The id under which the server logged the request.
    pub request_id: Option<String>,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

/// The envelope, read leniently: a newer server may know more codes.
#[derive(Deserialize)]
struct Envelope {
    code: String,
    message: String,
    hint: Option<String>,
    request_id: Option<String>,
}

impl ApiError {
    pub(crate) fn from_body(status: u16, request_id: Option<String>, body: &[u8]) -> Self {
        let Ok(envelope) = serde_json::from_slice::<Envelope>(body) else {
            let text = String::from_utf8_lossy(body);
            let line = text.lines().next().unwrap_or_default().trim();
            let message = match line {
                "" => format!("the server answered with status {status} and no explanation"),
                line => format!("the server answered with status {status}: {line}"),
            };
            return Self { status, code: None, code_text: String::new(), message, hint: None, request_id };
        };
        Self {
            status,
            code: serde_json::from_value(serde_json::Value::String(envelope.code.clone())).ok(),
            code_text: envelope.code,
            message: envelope.message,
            hint: envelope.hint,
            request_id: envelope.request_id.or(request_id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envelope_is_read_with_all_its_parts() {
        let body = br#"{"code":"NOT_FOUND","message":"no such sandbox","hint":"list them","request_id":"r1"}"#;
        let error = ApiError::from_body(404, Some("header".into()), body);
        assert_eq!(error.code, Some(ErrorCode::NotFound));
        assert_eq!(error.message, "no such sandbox");
        assert_eq!(error.hint.as_deref(), Some("list them"));
        assert_eq!(error.request_id.as_deref(), Some("r1"));
    }

    #[test]
    fn a_code_from_the_future_keeps_its_text() {
        let error = ApiError::from_body(418, Some("r2".into()), br#"{"code":"TEAPOT","message":"short and stout"}"#);
        assert_eq!((error.code, error.code_text.as_str()), (None, "TEAPOT"));
        assert_eq!(error.request_id.as_deref(), Some("r2"));
    }

    #[test]
    fn an_answer_of_somebody_else_is_quoted_by_its_first_line() {
        let error = ApiError::from_body(502, None, b"Bad Gateway\n<html>");
        assert_eq!(error.message, "the server answered with status 502: Bad Gateway");
        let error = ApiError::from_body(500, None, b"");
        assert_eq!(error.message, "the server answered with status 500 and no explanation");
    }
}
