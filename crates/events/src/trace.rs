//! To which trace an event belongs: the `traceparent` of W3C Trace Context, which CloudEvents has as
//! an extension.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A place in a trace: the trace, and the span under which what follows belongs.
///
/// It is always a valid one of version 00. One of a later version is read as far as this version
/// goes, as the recommendation asks for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceParent {
    trace: [u8; 16],
    span: [u8; 8],
    flags: u8,
}

/// Why a text is no `traceparent`. Whoever meets one ignores it: it is not worth refusing a request
/// for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent of W3C Trace Context, such as 00-<32 hex digits>-<16 hex digits>-01")]
pub struct InvalidTraceParent;

/// What the first version says of flags: nothing but whether the trace is recorded.
const SAMPLED: u8 = 1;
/// Length of a `traceparent` of version 00.
const LENGTH: usize = 55;

impl TraceParent {
    /// The place of a span, unless one of the ids is zero, which stands for none.
    pub fn new(trace: [u8; 16], span: [u8; 8], is_sampled: bool) -> Option<Self> {
        let valid = trace != [0; 16] && span != [0; 8];
        valid.then_some(Self {
            trace,
            span,
            flags: if is_sampled { SAMPLED } else { 0 },
        })
    }

    /// Reads a `traceparent`.
    pub fn parse(text: &str) -> Result<Self, InvalidTraceParent> {
        let bytes = text.as_bytes();
        let of_form = bytes.len() >= LENGTH
            && bytes.is_ascii()
            && [2, 35, 52].iter().all(|at| bytes[*at] == b'-');
        if !of_form {
            return Err(InvalidTraceParent);
        }
        let version = number(&bytes[..2])?;
        let ends = match version {
            0xff => return Err(InvalidTraceParent),
            0 => bytes.len() == LENGTH,
            _ => bytes.get(LENGTH).is_none_or(|next| *next == b'-'),
        };
        let mut trace = [0; 16];
        let mut span = [0; 8];
        read(&bytes[3..35], &mut trace)?;
        read(&bytes[36..52], &mut span)?;
        let flags = number(&bytes[53..55])?;
        match Self::new(trace, span, flags & SAMPLED != 0) {
            Some(read) if ends => Ok(read),
            _ => Err(InvalidTraceParent),
        }
    }

    /// The id of the trace.
    pub fn trace(&self) -> [u8; 16] {
        self.trace
    }

    /// The id of the span.
    pub fn span(&self) -> [u8; 8] {
        self.span
    }

    /// The id of the trace as text, as logs have it.
    pub fn trace_id(&self) -> String {
        self.to_string()[3..35].to_owned()
    }

    /// The id of the span as text, as logs have it.
    pub fn span_id(&self) -> String {
        self.to_string()[36..52].to_owned()
    }

    /// Whether whoever began the trace records it.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }
}

fn digit(byte: u8) -> Result<u8, InvalidTraceParent> {
    match byte {
        b'0'..=b'9' => Ok(byte - b'0'),
        b'a'..=b'f' => Ok(byte - b'a' + 10),
        _ => Err(InvalidTraceParent),
    }
}

fn number(pair: &[u8]) -> Result<u8, InvalidTraceParent> {
    Ok(digit(pair[0])? << 4 | digit(pair[1])?)
}

fn read(digits: &[u8], into: &mut [u8]) -> Result<(), InvalidTraceParent> {
    for (pair, byte) in digits.chunks_exact(2).zip(into) {
        *byte = number(pair)?;
    }
    Ok(())
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("00-")?;
        self.trace.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        f.write_str("-")?;
        self.span.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        write!(f, "-{:02x}", self.flags)
    }
}

impl fmt::Debug for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TraceParent {
    type Err = InvalidTraceParent;
    fn from_str(text: &str) -> Result<Self, InvalidTraceParent> {
        Self::parse(text)
    }
}

/// As text where people read it, and in 25 bytes where they do not.
impl Serialize for TraceParent {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        if out.is_human_readable() {
            out.collect_str(self)
        } else {
            (self.trace, self.span, self.flags).serialize(out)
        }
    }
}

impl<'de> Deserialize<'de> for TraceParent {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        if from.is_human_readable() {
            let text = std::borrow::Cow::<str>::deserialize(from)?;
            return Self::parse(&text).map_err(D::Error::custom);
        }
        let (trace, span, flags) = <([u8; 16], [u8; 8], u8)>::deserialize(from)?;
        Self::new(trace, span, flags & SAMPLED != 0)
            .ok_or_else(|| D::Error::custom(InvalidTraceParent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn what_is_read_is_written_again() {
        for text in [
            GOOD,
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        ] {
            let read = TraceParent::parse(text).unwrap();
            assert_eq!(read.to_string(), text);
            assert_eq!(read.is_sampled(), text.ends_with('1'));
            assert_eq!(read.trace_id(), "0af7651916cd43dd8448eb211c80319c");
            assert_eq!(read.span_id(), "b7ad6b7169203331");
            let json = serde_json::to_string(&read).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<TraceParent>(&json).unwrap(), read);
        }
    }

    #[test]
    fn a_row_has_it_in_few_bytes() {
        let read = TraceParent::parse(GOOD).unwrap();
        let row = bincode::serde::encode_to_vec(Some(read), bincode::config::standard()).unwrap();
        assert_eq!(row.len(), 26);
        let (back, _): (Option<TraceParent>, _) =
            bincode::serde::decode_from_slice(&row, bincode::config::standard()).unwrap();
        assert_eq!(back, Some(read));
    }

    #[test]
    fn later_versions_are_read_as_far_as_they_are_known() {
        let read = TraceParent::parse(GOOD).unwrap();
        let later = GOOD.replacen("00", "cc", 1);
        assert_eq!(TraceParent::parse(&later), Ok(read));
        assert_eq!(TraceParent::parse(&format!("{later}-what-next")), Ok(read));
        assert_eq!(
            TraceParent::parse(&format!("{}ff", &later[..53])),
            Ok(read),
            "flags of later versions are not carried on"
        );
    }

    #[test]
    fn what_is_none_is_refused() {
        let longer = format!("{GOOD}-00");
        let mut all = vec![
            String::new(),
            longer,
            GOOD.to_uppercase(),
            GOOD.replacen("00", "ff", 1),
            GOOD.replacen("00", "cc", 1) + "x",
            GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
            GOOD.replace('-', "_"),
            GOOD.replace('1', "é"),
        ];
        all.extend((0..GOOD.len()).map(|n| GOOD[..n].to_owned()));
        for text in all {
            assert_eq!(
                TraceParent::parse(&text),
                Err(InvalidTraceParent),
                "{text:?}"
            );
        }
    }
}
