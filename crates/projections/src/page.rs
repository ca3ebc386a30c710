//! Pages of listings. A cursor names a position of the log, so that a page is the same however
//! much is appended meanwhile: nothing is skipped and nothing repeated.

use std::fmt;
use std::str::FromStr;

use daybook_events::Position;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most rows on a page.
pub const MAX_LIMIT: u32 = 500;

/// Rows on a page if nobody says how many.
pub const DEFAULT_LIMIT: u32 = 50;

/// Where a listing goes on: text that only this server reads, but safe to put in a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor(pub(crate) Position);

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c1-{:x}", self.0.0)
    }
}

impl FromStr for Cursor {
    type Err = InvalidPage;
    fn from_str(s: &str) -> Result<Self, InvalidPage> {
        let position = s
            .strip_prefix("c1-")
            .filter(|hex| hex.len() <= 16 && !hex.starts_with('+'))
            .and_then(|hex| u64::from_str_radix(hex, 16).ok())
            .ok_or(InvalidPage::Cursor)?;
        Ok(Self(Position(position)))
    }
}

impl Serialize for Cursor {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cursor {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Cursor {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Cursor".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "description": "Where the listing goes on." })
    }
}

/// A page that cannot be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPage {
    /// The limit is out of bounds.
    #[error("limit must be a number from 1 to {MAX_LIMIT}")]
    Limit,
    /// The cursor was not made here.
    #[error("the cursor is not one that this server gave; leave it out to start from the newest")]
    Cursor,
}

impl InvalidPage {
    /// A stable code for programs.
    pub fn code(self) -> &'static str {
        match self {
            Self::Limit => "invalid_limit",
            Self::Cursor => "invalid_cursor",
        }
    }
}

/// Which part of a listing is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    limit: usize,
    pub(crate) after: Option<Position>,
}

impl Default for Page {
    fn default() -> Self {
        Self {
            limit: DEFAULT_LIMIT as usize,
            after: None,
        }
    }
}

impl Page {
    /// The page that begins with the row at a position, and has no other.
    pub(crate) fn just(position: Position) -> Self {
        Self {
            limit: 1,
            after: Some(position.next()),
        }
    }

    /// A page, as a request asks for it.
    pub fn new(limit: Option<u32>, cursor: Option<&str>) -> Result<Self, InvalidPage> {
        let limit = limit.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(InvalidPage::Limit);
        }
        let after = cursor.map(Cursor::from_str).transpose()?.map(|c| c.0);
        Ok(Self {
            limit: limit as usize,
            after,
        })
    }

    /// The largest first page.
    pub fn largest() -> Self {
        Self {
            limit: MAX_LIMIT as usize,
            after: None,
        }
    }

    /// The page that begins with the row at a position, or with the one after where there is none.
    pub fn beginning(self, position: Position) -> Self {
        Self {
            after: Some(position.next()),
            ..self
        }
    }

    /// The page that begins where another one ended.
    pub fn starting(self, cursor: Cursor) -> Self {
        Self {
            after: Some(cursor.0),
            ..self
        }
    }

    /// Most rows on it: 1 to [`MAX_LIMIT`].
    pub fn limit(self) -> usize {
        self.limit
    }
}

/// One page of a listing, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PageOf<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Where the listing goes on; none at its end.
    pub next: Option<Cursor>,
    /// The page shows the ledger up to here.
    pub position: Position,
}

impl<T> PageOf<T> {
    /// The same page with other rows.
    pub fn map<U>(self, f: impl FnMut(T) -> U) -> PageOf<U> {
        PageOf {
            items: self.items.into_iter().map(f).collect(),
            next: self.next,
            position: self.position,
        }
    }
}
