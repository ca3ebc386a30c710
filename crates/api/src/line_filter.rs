//! Which lines of output are wanted.

use aho_corasick::AhoCorasick;
use axum::http::StatusCode;
use daybook_events::lines::{LineKind, NewLine};
use daybook_events::{ClusterName, Refusal};
use jiff::Timestamp;

use crate::problem::Problem;
use crate::routes::history::time;

/// The longest text that is looked for.
const LONGEST: usize = 1024;

/// How bad it is, as far as a line says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    /// The level that a line names among its first words; `INFO` if it names none.
    pub(crate) fn of(text: &str) -> Self {
        let words = text
            .split(|c: char| !c.is_ascii_alphabetic())
            .filter(|w| !w.is_empty())
            .take(4);
        for word in words {
            match word {
                "ERROR" | "FATAL" | "CRITICAL" | "error" | "Error" => return Self::Error,
                "WARN" | "WARNING" | "warn" | "warning" | "Warning" => return Self::Warn,
                "DEBUG" | "TRACE" | "debug" | "trace" => return Self::Debug,
                "INFO" | "info" => return Self::Info,
                _ => {}
            }
        }
        Self::Info
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warn => "WARN",
            Self::Error => "ERROR",
        }
    }

    fn parse(word: &str) -> Result<Self, Problem> {
        Ok(match word.to_ascii_lowercase().as_str() {
            "debug" => Self::Debug,
            "info" => Self::Info,
            "warn" => Self::Warn,
            "error" => Self::Error,
            _ => {
                return Err(Refusal::new(
                    "unknown_log_level",
                    "there is no such level of log lines",
                    "use one of: debug, info, warn, error",
                )
                .into());
            }
        })
    }
}

/// What a filter is made from: the words of a query.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) kind: Option<String>,
    pub(crate) level: Option<String>,
    pub(crate) cluster: Option<String>,
    pub(crate) instance: Option<String>,
    pub(crate) from: Option<String>,
    pub(crate) until: Option<String>,
    pub(crate) text: Option<String>,
}

/// Which lines are wanted; all that is given must fit.
#[derive(Debug, Clone, Default)]
pub(crate) struct LineFilter {
    kind: Option<LineKind>,
    level: Option<Level>,
    cluster: Option<ClusterName>,
    instance: Option<String>,
    from: Option<Timestamp>,
    until: Option<Timestamp>,
    text: Option<AhoCorasick>,
}

impl LineFilter {
    /// Reads what is asked for.
    pub(crate) fn new(asked: Asked) -> Result<Self, Problem> {
        Ok(Self {
            kind: asked.kind.as_deref().map(line_kind).transpose()?,
            level: asked.level.as_deref().map(Level::parse).transpose()?,
            cluster: asked.cluster.map(ClusterName::parse).transpose()?,
            instance: asked.instance,
            from: time("from", asked.from)?,
            until: time("until", asked.until)?,
            text: asked.text.as_deref().map(finder).transpose()?,
        })
    }

    /// Whether lines of a build may fit, and those of a deployment: whatever a builder prints is of
    /// the build.
    pub(crate) fn sources(&self) -> (bool, bool) {
        match self.kind {
            None => (true, true),
            Some(LineKind::Build) => (true, false),
            Some(_) => (false, true),
        }
    }

    /// Whether a line fits, of a build or of a deployment.
    pub(crate) fn wants(&self, of_build: bool, line: &NewLine) -> bool {
        (of_build || self.kind.is_none_or(|k| k == line.kind))
            && self.from.is_none_or(|t| line.time >= t)
            && self.until.is_none_or(|t| line.time < t)
            && (self.cluster.is_none() || self.cluster == line.cluster)
            && (self.instance.is_none() || self.instance == line.instance)
            && self.level.is_none_or(|l| Level::of(&line.text) >= l)
            && self.text.as_ref().is_none_or(|t| t.is_match(&line.text))
    }

    /// Whether it is about what instances print, and nothing else.
    pub(crate) fn is_of_containers(&self) -> bool {
        self.kind == Some(LineKind::Container)
    }

    /// Nothing later is wanted.
    pub(crate) fn until(&self) -> Option<Timestamp> {
        self.until
    }
}

/// Looks for a text as it stands, but that letters of ASCII may be large or small.
fn finder(text: &str) -> Result<AhoCorasick, Problem> {
    let unfit = |detail: &str| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid_search",
            detail,
            format!("give a text of 1 to {LONGEST} bytes"),
        )
    };
    if text.is_empty() || text.len() > LONGEST {
        return Err(unfit("that cannot be looked for"));
    }
    AhoCorasick::builder()
        .ascii_case_insensitive(true)
        .build([text])
        .map_err(|e| unfit(&e.to_string()))
}

fn line_kind(word: &str) -> Result<LineKind, Problem> {
    Ok(match word {
        "build" => LineKind::Build,
        "container" => LineKind::Container,
        "status" => LineKind::Status,
        "platform" => LineKind::Platform,
        _ => {
            return Err(Refusal::new(
                "unknown_log_type",
                "there is no such type of log lines",
                "use one of: build, container, status, platform",
            )
            .into());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> NewLine {
        NewLine {
            time: "2026-01-01T00:00:10Z".parse().unwrap(),
            kind: LineKind::Container,
            cluster: Some(ClusterName::parse("oslo").unwrap()),
            instance: Some("web-1".into()),
            text: text.into(),
        }
    }

    #[test]
    fn the_level_is_taken_from_the_text() {
        let level = |text| Level::of(text).as_str();
        assert_eq!(level("Listening on 8080"), "INFO");
        assert_eq!(level("2024-01-15 WARNING: disk"), "WARN");
        assert_eq!(level("[ERROR] no database"), "ERROR");
        assert_eq!(level("debug: x"), "DEBUG");
    }

    #[test]
    fn all_that_is_given_must_fit() {
        let some = |text: &str| Some(text.to_owned());
        let text = "WARN: Disk (full)";
        let wants = |asked| LineFilter::new(asked).unwrap().wants(false, &line(text));
        assert!(wants(Asked::default()));
        let asked = |change: fn(&mut Asked)| {
            let mut asked = Asked {
                kind: some("container"),
                level: some("warn"),
                cluster: some("oslo"),
                instance: some("web-1"),
                from: some("2026-01-01T00:00:10Z"),
                until: some("2026-01-01T00:00:11Z"),
                text: some("disk (FULL)"),
            };
            change(&mut asked);
            wants(asked)
        };
        assert!(asked(|_| {}));
        assert!(!asked(|a| a.kind = Some("status".into())));
        assert!(!asked(|a| a.level = Some("error".into())));
        assert!(!asked(|a| a.cluster = Some("rome".into())));
        assert!(!asked(|a| a.instance = Some("web-2".into())));
        assert!(!asked(|a| a.from = Some("2026-01-01T00:00:11Z".into())));
        assert!(!asked(|a| a.until = Some("2026-01-01T00:00:10Z".into())));
        // It is no pattern.
        assert!(!asked(|a| a.text = Some("disk.*full".into())));
    }
}
