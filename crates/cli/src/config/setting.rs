//! The types a setting can have and how each is read from text.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use stacyvm_api::Duration;

/// A value as it was written, before it means anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Raw {
    Scalar { text: String, quoted: bool },
    List(Vec<String>),
    Map(BTreeMap<String, String>),
}

/// What people write for a type, in documents and in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Text,
    Secret,
    /// A list, or names and values, of secrets.
    Secrets,
    Number,
    Fraction,
    Switch,
    Duration,
    List,
    Map,
    Choice(&'static [&'static str]),
}

/// A type that a setting can have.
pub(crate) trait Setting: Sized {
    const SHAPE: Shape;

    /// From one piece of text: an environment variable, a default, a scalar.
    /// The error completes the sentence "`key` …".
    fn parse(text: &str) -> Result<Self, String>;

    /// From a value of the file.
    fn from_raw(raw: &Raw) -> Result<Self, String> {
        match raw {
            Raw::Scalar { text, quoted } => {
                let words = matches!(Self::SHAPE, Shape::Number | Shape::Fraction | Shape::Switch);
                if *quoted && words {
                    return Err(format!("must be {}, not quoted text", Self::SHAPE));
                }
                Self::parse(text)
            }
            Raw::List(_) => Err(format!("must be {}, not a list", Self::SHAPE)),
            Raw::Map(_) => Err(format!("must be {}, not a section", Self::SHAPE)),
        }
    }
}

/// Text that must not be shown: it has no `Display`, no `Serialize`, and its
/// `Debug` says only that it is there.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// For handing it to what needs it; never for printing.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text | Self::Secret => f.write_str("text"),
            Self::Number => f.write_str("a whole number"),
            Self::Fraction => f.write_str("a number"),
            Self::Switch => f.write_str("true or false"),
            Self::Duration => f.write_str("a duration such as 30s or 1h30m"),
            Self::List => f.write_str("a list"),
            Self::Secrets => f.write_str("a list or section of texts"),
            Self::Map => f.write_str("a section of names and values"),
            Self::Choice(words) => write!(f, "one of {}", words.join(", ")),
        }
    }
}

impl Setting for String {
    const SHAPE: Shape = Shape::Text;

    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
}

impl Setting for PathBuf {
    const SHAPE: Shape = Shape::Text;

    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.into())
    }
}

impl Setting for Secret {
    const SHAPE: Shape = Shape::Secret;

    fn parse(text: &str) -> Result<Self, String> {
        Ok(Self::new(text.trim()))
    }
}

impl Setting for bool {
    const SHAPE: Shape = Shape::Switch;

    fn parse(text: &str) -> Result<Self, String> {
        match text.trim() {
            "true" | "True" | "TRUE" | "1" => Ok(true),
            "false" | "False" | "FALSE" | "0" => Ok(false),
            other => Err(format!("must be {}, not `{other}`", Self::SHAPE)),
        }
    }
}

macro_rules! whole_numbers {
    ($($type:ty),*) => {$(
        impl Setting for $type {
            const SHAPE: Shape = Shape::Number;

            fn parse(text: &str) -> Result<Self, String> {
                let text = text.trim();
                text.parse().map_err(|_| match text.parse::<i128>() {
                    Ok(_) => format!("must lie between {} and {}, not {text}", <$type>::MIN, <$type>::MAX),
                    Err(_) => format!("must be {}, not `{text}`", Self::SHAPE),
                })
            }
        }
    )*};
}
whole_numbers!(u16, u32, u64, usize);

impl Setting for f64 {
    const SHAPE: Shape = Shape::Fraction;

    fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
            Ok(_) => Err(format!("must be a number from 0 on, not {text}")),
            Err(_) => Err(format!("must be {}, not `{text}`", Self::SHAPE)),
        }
    }
}

impl Setting for Duration {
    const SHAPE: Shape = Shape::Duration;

    fn parse(text: &str) -> Result<Self, String> {
        text.trim().parse().map_err(|error| format!("must be {}: {error}", Self::SHAPE))
    }
}

/// Memory as Docker's command line takes it: `512m`, `1g`, or bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemorySize {
    pub(crate) mib: u64,
}

impl Setting for MemorySize {
    const SHAPE: Shape = Shape::Text;

    fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("must be a size of at least 1m, such as 512m or 1g, not `{}`", text.trim());
        let lower = text.trim().to_ascii_lowercase();
        let lower = lower.strip_suffix('b').unwrap_or(&lower);
        let (digits, shift) = match lower.as_bytes().last() {
            Some(b'k') => (&lower[..lower.len() - 1], 10),
            Some(b'm') => (&lower[..lower.len() - 1], 20),
            Some(b'g') => (&lower[..lower.len() - 1], 30),
            _ => (lower, 0),
        };
        let count: u64 = digits.parse().map_err(|_| wrong())?;
        let bytes = count.checked_mul(1 << shift).ok_or_else(wrong)?;
        if bytes < 1 << 20 { Err(wrong()) } else { Ok(Self { mib: bytes >> 20 }) }
    }
}

/// Processors, quoted or not, as published configurations have both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Processors(pub(crate) f64);

impl Setting for Processors {
    const SHAPE: Shape = Shape::Text;

    fn parse(text: &str) -> Result<Self, String> {
        match text.trim().parse::<f64>() {
            Ok(number) if number.is_finite() && number > 0.0 => Ok(Self(number)),
            Ok(_) | Err(_) => Err(format!("must be a number above 0, such as 1 or 0.5, not `{}`", text.trim())),
        }
    }
}

/// Names and values; as text `NAME:VALUE;NAME:VALUE`, because values have commas.
impl Setting for BTreeMap<String, String> {
    const SHAPE: Shape = Shape::Map;

    fn parse(text: &str) -> Result<Self, String> {
        let items = text.split(';').map(str::trim).filter(|item| !item.is_empty());
        let pair = |item: &str| {
            let (name, value) = item.split_once(':').unwrap_or((item, ""));
            (name.trim().to_owned(), value.trim().to_owned())
        };
        Ok(items.map(pair).collect())
    }

    fn from_raw(raw: &Raw) -> Result<Self, String> {
        match raw {
            Raw::Map(map) => Ok(map.clone()),
            Raw::Scalar { text, .. } => Self::parse(text),
            Raw::List(_) => Err(format!("must be {}, not a list", Self::SHAPE)),
        }
    }
}

/// Blank text means "not set".
impl<T: Setting> Setting for Option<T> {
    const SHAPE: Shape = T::SHAPE;

    fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() { Ok(None) } else { T::parse(text).map(Some) }
    }
}

impl Setting for Vec<String> {
    const SHAPE: Shape = Shape::List;

    /// Comma-separated, as in environment variables.
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect())
    }

    fn from_raw(raw: &Raw) -> Result<Self, String> {
        match raw {
            Raw::List(items) => Ok(items.clone()),
            Raw::Scalar { text, .. } => Self::parse(text),
            Raw::Map(_) => Err(format!("must be {}, not a section", Self::SHAPE)),
        }
    }
}

/// Declares an enum that is written as one of a few words.
macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum $name { $($variant),+ }

        impl $crate::config::setting::Setting for $name {
            const SHAPE: $crate::config::setting::Shape = $crate::config::setting::Shape::Choice(&[$($word),+]);

            fn parse(text: &str) -> Result<Self, String> {
                match text.trim() {
                    $($word => Ok(Self::$variant),)+
                    other => Err(format!("must be {}, not `{other}`", Self::SHAPE)),
                }
            }
        }
    };
}
pub(crate) use choice;

#[cfg(test)]
mod tests {
    use super::*;

    fn scalar(text: &str, quoted: bool) -> Raw {
        Raw::Scalar { text: text.to_owned(), quoted }
    }

    #[test]
    fn numbers_are_not_quoted_and_keep_their_range() {
        assert_eq!(u16::from_raw(&scalar("7423", false)), Ok(7423));
        assert_eq!(u16::from_raw(&scalar("7423", true)).unwrap_err(), "must be a whole number, not quoted text");
        assert_eq!(u16::parse("70000").unwrap_err(), "must lie between 0 and 65535, not 70000");
        assert_eq!(u64::parse("-1").unwrap_err(), "must lie between 0 and 18446744073709551615, not -1");
        assert_eq!(u64::parse("many").unwrap_err(), "must be a whole number, not `many`");
        assert!(f64::parse("-0.5").is_err() && f64::parse("nan").is_err());
        assert_eq!(f64::parse("0.5"), Ok(0.5));
    }

    #[test]
    fn text_may_look_like_a_number() {
        assert_eq!(String::from_raw(&scalar("007", false)), Ok("007".to_owned()));
    }

    #[test]
    fn lists_come_from_yaml_or_from_commas() {
        assert_eq!(Vec::parse(" a, b ,,c"), Ok(vec!["a".to_owned(), "b".to_owned(), "c".to_owned()]));
        assert_eq!(Vec::from_raw(&Raw::List(vec!["a,b".to_owned()])), Ok(vec!["a,b".to_owned()]));
        assert_eq!(String::from_raw(&Raw::List(vec![])).unwrap_err(), "must be text, not a list");
    }

    #[test]
    fn sizes_and_processors_are_what_docker_takes() {
        for (text, mib) in [("512m", 512), ("1g", 1024), ("256M", 256), ("1024k", 1), (" 2GB ", 2048), ("1048576", 1)] {
            assert_eq!(MemorySize::parse(text), Ok(MemorySize { mib }), "{text}");
        }
        // What is not understood is not unlimited.
        for text in ["", "0", "-1", "512x", "m", "1.5g", "1k", "99999999999g"] {
            assert!(MemorySize::parse(text).unwrap_err().contains("512m"), "{text}");
        }
        assert_eq!(Processors::from_raw(&scalar("1", true)), Ok(Processors(1.0)));
        assert_eq!(Processors::parse("0.5"), Ok(Processors(0.5)));
        assert!(["0", "-1", "nan", "two"].into_iter().all(|text| Processors::parse(text).is_err()));
    }

    #[test]
    fn maps_come_from_yaml_or_from_a_variable() {
        let mounts =
            BTreeMap::from([("/a".to_owned(), "size=1m,mode=1777".to_owned()), ("/b".to_owned(), String::new())]);
        assert_eq!(BTreeMap::parse("/a:size=1m,mode=1777; /b"), Ok(mounts.clone()));
        assert_eq!(BTreeMap::from_raw(&Raw::Map(mounts.clone())), Ok(mounts));
        assert_eq!(BTreeMap::parse(""), Ok(BTreeMap::new()));
    }

    #[test]
    fn secrets_do_not_show() {
        let secret = Option::<Secret>::parse(" hunter2\n").unwrap().unwrap();
        assert_eq!(secret.expose(), "hunter2");
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "Secret(hidden) Some(Secret(hidden))");
        assert_eq!(Option::<Secret>::parse("  "), Ok(None));
    }
}
