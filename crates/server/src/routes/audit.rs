//! The audit log, as JSON and as a table for spreadsheets (http-api 7.9.1).

use std::borrow::Cow;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, header};
use stacyvm_api::{AuditQuery, AuditRecord, ErrorCode};
use stacyvm_engine::AuditPage;

use crate::App;
use crate::error::ApiError;
use crate::extract::Query;
use crate::reply::{NEXT_CURSOR, Reply};

pub(super) const CSV: &str = "text/csv; charset=utf-8";
const CSV_FILE: &str = "attachment; filename=\"stacyvm-admin-audit.csv\"";

/// The published columns.
const COLUMNS: [&str; 10] =
    ["id", "created_at", "actor", "method", "path", "status", "duration_ms", "request_id", "remote_addr", "user_agent"];

pub(super) async fn list(State(app): State<App>, Query(query): Query<AuditQuery>) -> Result<Response, ApiError> {
    let as_table = match query.format.as_deref() {
        None | Some("" | "json") => false,
        Some("csv") => true,
        Some(_) => return Err(ApiError::bad_request("query: format is json or csv")),
    };
    let AuditPage { items, next_cursor } = app.engine.audit(&query).await?;
    if !as_table {
        return Ok(Reply::ok(items).next_cursor(next_cursor.as_deref()).into_response());
    }
    let table = table(&items).map_err(|_| ApiError::new(ErrorCode::InternalError, "the table could not be written"))?;
    let mut response = table.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(CSV));
    headers.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static(CSV_FILE));
    if let Some(cursor) = next_cursor.and_then(|cursor| HeaderValue::from_str(&cursor).ok()) {
        headers.insert(NEXT_CURSOR, cursor);
    }
    Ok(response)
}

fn table(records: &[AuditRecord]) -> Result<Vec<u8>, csv::Error> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(COLUMNS)?;
    for record in records {
        let numbers = [record.id, u64::from(record.status), record.duration_ms].map(|number| number.to_string());
        let created_at = record.created_at.to_string();
        let [id, status, duration] = &numbers;
        let texts = [&record.actor, &record.method, &record.path].map(|text| inert(text));
        let rest = [&record.request_id, &record.remote_addr, &record.user_agent].map(|text| inert(text));
        let row = [id.as_str(), &created_at].into_iter();
        let row = row.chain(texts.iter().map(AsRef::as_ref)).chain([status.as_str(), duration]);
        writer.write_record(row.chain(rest.iter().map(AsRef::as_ref)))?;
    }
    writer.into_inner().map_err(|error| error.into_error().into())
}

/// Callers choose what is in a cell, and spreadsheets run what looks like a
/// formula (OWASP, CSV injection).
fn inert(text: &str) -> Cow<'_, str> {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r']) { format!("'{text}").into() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use stacyvm_api::Timestamp;

    use super::*;

    #[test]
    fn cells_are_quoted_and_formulas_are_not_run() {
        let record = AuditRecord {
            id: 7,
            actor: "api_key".to_owned(),
            method: "POST".to_owned(),
            path: "/a,b".to_owned(),
            status: 201,
            duration_ms: 12,
            request_id: "say \"x\"".to_owned(),
            remote_addr: "::1".to_owned(),
            user_agent: "=HYPERLINK(1)".to_owned(),
            tenant_id: String::new(),
            created_at: Timestamp::from_unix_ms(0),
            key_id: None,
            owner_id: None,
        };
        let text = String::from_utf8(table(&[record]).unwrap()).unwrap();
        assert_eq!(
            text,
            "id,created_at,actor,method,path,status,duration_ms,request_id,remote_addr,user_agent\n\
             7,1970-01-01T00:00:00Z,api_key,POST,\"/a,b\",201,12,\"say \"\"x\"\"\",::1,'=HYPERLINK(1)\n"
        );
    }
}
