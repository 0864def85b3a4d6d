//! Pages of lists in the order newest first: a cursor names the last entry of
//! the page before.

use stacyvm_api::Timestamp;

use crate::EngineError;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) at: Timestamp,
    pub(crate) id: String,
}

impl Cursor {
    pub(crate) fn text(at: Timestamp, id: &str) -> String {
        format!("{}.{id}", at.unix_ms())
    }

    pub(crate) fn parse(text: &str) -> Result<Self, EngineError> {
        let parsed = text.split_once('.').and_then(|(at, id)| {
            let at = at.parse().ok().map(Timestamp::from_unix_ms)?;
            (!id.is_empty()).then(|| Self { at, id: id.to_owned() })
        });
        parsed.ok_or_else(|| EngineError::InvalidInput("the cursor is not one that this server gave out".to_owned()))
    }

    /// Whether an entry lies behind this cursor.
    pub(crate) fn precedes(&self, at: Timestamp, id: &str) -> bool {
        (at, id) < (self.at, self.id.as_str())
    }
}

pub(crate) fn limit(asked: Option<u32>, max: u32) -> Result<Option<u32>, EngineError> {
    match asked {
        Some(limit) if limit == 0 || limit > max => {
            Err(EngineError::InvalidInput(format!("limit is between 1 and {max}")))
        }
        limit => Ok(limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_survive_text_and_nonsense_is_refused() {
        let at = Timestamp::from_unix_ms(17);
        let cursor = Cursor::parse(&Cursor::text(at, "sb-1")).unwrap();
        assert_eq!(cursor, Cursor { at, id: "sb-1".to_owned() });
        assert!(cursor.precedes(at, "sb-0") && !cursor.precedes(at, "sb-1"));
        assert!(!cursor.precedes(Timestamp::from_unix_ms(18), "a"));
        for text in ["", "17", "17.", "x.sb-1", "."] {
            assert!(Cursor::parse(text).is_err(), "{text:?}");
        }
    }
}
