//! `/stacyvm/archive`: trees as tar.

use futures_util::TryStreamExt as _;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use stacyvm_envd::http::{PATH, USERNAME};

use super::upload::Upload;
use super::{empty, query_value};
use crate::files::archive;
use crate::heap::Passing;
use crate::serve::Body;
use crate::{Failure, Sandbox};

pub(crate) async fn download(sandbox: &Sandbox, request: &Request<Upload>) -> Result<Response<Body>, Failure> {
    let query = request.uri().query();
    let identity = sandbox.identity(query_value(query, USERNAME).as_deref())?;
    let path = identity.resolve_path(&query_value(query, PATH).unwrap_or_default())?;
    let pieces = archive::pack(path).await?;
    let passing = Passing::begin();
    let body = StreamBody::new(pieces.map_err(Into::into).map_ok(move |piece| {
        let _held = &passing;
        Frame::data(piece)
    }));
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-tar"));
    Ok(response)
}

pub(crate) async fn upload(sandbox: &Sandbox, request: Request<Upload>) -> Result<Response<Body>, Failure> {
    let _passing = Passing::begin();
    let (parts, body) = request.into_parts();
    let query = parts.uri.query();
    let identity = sandbox.identity(query_value(query, USERNAME).as_deref())?;
    let path = identity.resolve_path(&query_value(query, PATH).unwrap_or_default())?;
    archive::unpack(path, identity, body.pieces()).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}
