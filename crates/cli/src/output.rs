//! How things are printed: tables and colours for people, JSON for programs.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, Color};
use daybook_secrets::SecretStore;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::{Format as RecordFormat, Json, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use unicode_width::UnicodeWidthChar as _;

use crate::commands::Global;

/// The form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// Tables and sentences.
    #[default]
    Text,
    /// JSON documents; one a line where there are several.
    Json,
}

static FORMAT: OnceLock<(Format, bool)> = OnceLock::new();

/// Whether more is to be said than what matters.
static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Remembers the form, and sets up the log of the program itself.
pub fn init(global: &Global) {
    let colour = is_drawn_over() && std::env::var_os("NO_COLOR").is_none();
    let _ = FORMAT.set((global.output, colour));
    VERBOSE.store(global.verbose > 0, Ordering::Relaxed);
    let default = match global.verbose {
        0 => "warn",
        1 => "info,async_nats=warn",
        2 => "debug,hyper=info,hyper_util=info,async_nats=info,sled=info",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("DAYBOOK_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| MaskedStderr)
        .with_ansi(std::io::stderr().is_terminal() && colour)
        .with_target(false);
    // At this level the client of NATS writes the very bytes that it sends, passwords included.
    let no_bytes = filter_fn(|about| {
        *about.level() != Level::TRACE || !about.target().starts_with("async_nats")
    });
    if global.log_json {
        let builder = builder.json().map_event_format(InTrace);
        builder.finish().with(no_bytes).init();
    } else {
        builder.finish().with(no_bytes).init();
    }
    // What a panic quotes is masked as what is logged.
    std::panic::set_hook(Box::new(|panic| {
        let trace = Backtrace::capture();
        let record = match trace.status() {
            BacktraceStatus::Captured => format!("{panic}\n{trace}\n"),
            _ => format!("{panic}\n"),
        };
        let _ = MaskedStderr.write_all(record.as_bytes());
    }));
}

/// Records as JSON, with the trace that they belong to: `trace_id` and `span_id`, as OpenTelemetry
/// names them in logs.
struct InTrace(RecordFormat<Json>);

impl<S, N> FormatEvent<S, N> for InTrace
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let Some(place) = daybook_trace::current() else {
            return self.0.format_event(context, writer, event);
        };
        let mut record = String::new();
        self.0
            .format_event(context, Writer::new(&mut record), event)?;
        match record.trim_end().strip_suffix('}') {
            Some(open) => writeln!(
                writer,
                r#"{open},"trace_id":"{}","span_id":"{}"}}"#,
                place.trace_id(),
                place.span_id()
            ),
            None => writer.write_str(&record),
        }
    }
}

static SECRETS: OnceLock<Arc<dyn SecretStore>> = OnceLock::new();

/// From now on the secrets in this store are masked in the log of the program itself: what is
/// logged often quotes what others have said. The system writes no file with this process's memory
/// any more, should it crash, and lets no other process of the user read it.
pub fn mask(secrets: Arc<dyn SecretStore>) {
    let _ = SECRETS.set(secrets);
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
            tracing::warn!(%error, "a crash of this process may leave its memory in a file");
        }
    }
}

/// Standard error, for whole records of the log.
struct MaskedStderr;

impl Write for MaskedStderr {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        match SECRETS.get() {
            None => stderr.write_all(record)?,
            Some(secrets) => {
                let text = String::from_utf8_lossy(record);
                let (text, end) = match text.strip_suffix('\n') {
                    Some(text) => (text, "\n"),
                    None => (&*text, ""),
                };
                let shown = secrets.masker_or_withhold(None).mask(text);
                stderr.write_all(shown.as_bytes())?;
                stderr.write_all(end.as_bytes())?;
            }
        }
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Whether JSON is asked for.
pub fn is_json() -> bool {
    FORMAT.get().is_some_and(|(f, _)| *f == Format::Json)
}

/// Colours, where the output is a terminal.
pub fn style() -> Style {
    Style(FORMAT.get().is_some_and(|(_, colour)| *colour))
}

/// Puts text into colours, or leaves it alone.
#[derive(Debug, Clone, Copy)]
pub struct Style(bool);

impl Style {
    fn paint(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
    /// Good news.
    pub fn good(self, text: &str) -> String {
        self.paint("32", text)
    }
    /// Work in progress.
    pub fn busy(self, text: &str) -> String {
        self.paint("36", text)
    }
    /// Something to look at.
    pub fn warn(self, text: &str) -> String {
        self.paint("33", text)
    }
    /// Bad news.
    pub fn error(self, text: &str) -> String {
        self.paint("1;31", text)
    }
    /// What matters less.
    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }
    /// What matters more.
    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }
    /// Whether there are colours, and so a terminal.
    pub fn is_terminal(self) -> bool {
        self.0
    }
}

/// Whether this process looks after things that must be put in order before it ends.
static HOLDS_ON: AtomicBool = AtomicBool::new(false);

/// Says that this process runs parts of a server: it goes on when nobody reads its output.
pub fn hold_on() {
    HOLDS_ON.store(true, Ordering::Relaxed);
}

/// Prints a line. When the reader has gone away (`daybook events | head`) a client ends quietly.
#[allow(
    clippy::disallowed_methods,
    reason = "a client holds nothing that must be put in order"
)]
pub fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let written = writeln!(out, "{text}").and_then(|()| out.flush());
    if written.is_err() && !HOLDS_ON.load(Ordering::Relaxed) {
        std::process::exit(0);
    }
}

/// Prints a value as JSON: a document for people's eyes on a terminal, else one line.
pub fn json(value: &impl serde::Serialize) {
    let text = if std::io::stdout().is_terminal() {
        serde_json::to_string_pretty(value)
    } else {
        serde_json::to_string(value)
    };
    match text {
        Ok(text) => line(&text),
        Err(error) => eprintln!("error: the answer cannot be printed: {error}"),
    }
}

/// A table of text.
#[derive(Debug)]
pub struct Table(comfy_table::Table);

/// One row of a table.
#[derive(Debug)]
pub struct Row(Vec<String>);

impl Row {
    /// A row of cells.
    pub fn new(cells: impl IntoIterator<Item = String>) -> Self {
        Self(cells.into_iter().collect())
    }
}

impl Table {
    /// A table with these headings.
    pub fn new<const N: usize>(headings: [&str; N]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        table.style_text_only();
        let style = style();
        table.set_header(headings.map(|h| cell(&style.dim(h))));
        if let Some(first) = table.column_mut(0) {
            first.set_padding((0, 1));
        }
        // Without a terminal nothing is wrapped: programs read whole lines.
        if let Some(width) = width() {
            table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
            table.set_width(width);
        }
        Self(table)
    }

    /// Adds a row.
    pub fn row(&mut self, row: Row) {
        self.0
            .add_row(row.0.iter().map(|text| cell(text)).collect::<Vec<_>>());
    }

    /// Prints it.
    pub fn print(&self) {
        for text in self.0.lines() {
            line(text.trim_end());
        }
    }
}

/// Columns of the terminal that is printed to; none where there is no terminal.
pub fn width() -> Option<u16> {
    let stdout = io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&stdout).ok()?;
    Some(size.ws_col).filter(|columns| *columns > 0)
}

/// Whether the new can take the place of what is shown: on a terminal that knows how.
pub fn is_drawn_over() -> bool {
    io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// Empties a terminal that can be drawn over.
pub fn clear() {
    let mut out = io::stdout().lock();
    // Whoever has gone away is noticed with the next line.
    let _ = out.write_all(b"\x1b[2J\x1b[H");
}

/// Whether what goes on is shown in one line that changes: on a terminal, unless all of it is wanted.
pub fn is_live() -> bool {
    let all = is_json() || VERBOSE.load(Ordering::Relaxed);
    !all && is_drawn_over() && width().is_some()
}

/// Shows this in the line that changes, as much of it as there is room for.
pub fn live(text: &str) {
    let columns = width().map_or(80, usize::from).saturating_sub(1);
    let text = cut(text, columns);
    let mut out = io::stdout().lock();
    // Whoever has gone away is noticed with the next whole line.
    let _ = write!(out, "\r\x1b[2K{text}").and_then(|()| out.flush());
}

/// Takes the line that changes away.
pub fn end_live() {
    let mut out = io::stdout().lock();
    let _ = out.write_all(b"\r\x1b[2K").and_then(|()| out.flush());
}

/// Others' text in one line, without what a terminal would act upon.
pub fn plain(text: &str) -> String {
    let spaced = text.chars().map(|c| match c {
        '\n' | '\t' => ' ',
        c => c,
    });
    spaced.filter(|c| !c.is_control()).collect()
}

/// The beginning of a text, so many columns at most; its colours are whole and do not count.
fn cut(text: &str, columns: usize) -> String {
    let mut shown = String::with_capacity(text.len());
    let (mut left, mut in_code, mut is_full) = (columns, false, false);
    for c in text.chars() {
        in_code |= c == '\x1b';
        if in_code {
            shown.push(c);
            in_code = c != 'm';
            continue;
        }
        let width = match c {
            // It makes an emoji of what is before it, which may take one column more for that.
            '\u{fe0f}' => 1,
            c => c.width().unwrap_or_default(),
        };
        // What follows has no place either, and be it an accent on what was left out.
        is_full |= width > left;
        if !is_full {
            shown.push(c);
            left -= width;
        }
    }
    shown
}

/// A cell of a table. It has one colour, the first one in its text: the table puts it around each
/// line that is left of the text once it is wrapped, and would count and break codes within it.
fn cell(text: &str) -> Cell {
    if !style().is_terminal() {
        return Cell::new(text);
    }
    let (text, code) = without_codes(text);
    let cell = Cell::new(text);
    match code {
        Some("32") => cell.fg(Color::DarkGreen),
        Some("36") => cell.fg(Color::DarkCyan),
        Some("33") => cell.fg(Color::DarkYellow),
        Some("1;31") => cell.fg(Color::DarkRed).add_attribute(Attribute::Bold),
        Some("2") => cell.add_attribute(Attribute::Dim),
        Some("1") => cell.add_attribute(Attribute::Bold),
        _ => cell,
    }
}

/// Text without the codes of [`Style`], and the first of them.
fn without_codes(text: &str) -> (String, Option<&str>) {
    let mut parts = text.split("\x1b[");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    let mut first = None;
    for part in parts {
        let (code, rest) = part.split_once('m').unwrap_or(("", part));
        if first.is_none() {
            first = Some(code);
        }
        plain.push_str(rest);
    }
    (plain, first)
}

/// A status in its colour.
pub fn status_word(status: &str) -> String {
    let style = style();
    match status {
        "started" | "SUCCEEDED" | "succeeded" => style.good(status),
        "queued" | "starting" | "stopping" | "terminating" => style.busy(status),
        "partially_started" => style.warn("partially started"),
        "stopped" | "terminated" | "cancelled" => style.dim(status),
        s if s.ends_with("error") || s.eq_ignore_ascii_case("failed") => style.error(status),
        _ => status.to_owned(),
    }
}

/// One of the readiness answers in its colour.
pub fn readiness_word(state: &str) -> String {
    let style = style();
    match state {
        "ready" => style.good(state),
        "pending" => style.busy(state),
        "not_ready" => style.warn("not ready"),
        "failed" => style.error(state),
        other => other.to_owned(),
    }
}

/// A readiness answer, with its reason unless it is plain.
pub fn readiness(r: &daybook_events::deployment::Readiness) -> String {
    use daybook_events::deployment::ReadinessState::{Failed, NotReady, Pending, Ready};
    let word = match r.state {
        Ready => return readiness_word("ready"),
        Pending => readiness_word("pending"),
        NotReady => readiness_word("not_ready"),
        Failed => readiness_word("failed"),
    };
    format!("{word} ({})", r.reason)
}

/// A time as people on this machine read it, to the second.
pub fn time(at: jiff::Timestamp) -> String {
    at.to_zoned(jiff::tz::TimeZone::system())
        .strftime("%Y-%m-%d %H:%M:%S")
        .to_string()
}

/// A version as a table has room for it: of an image with a digest its name, its tag and twelve
/// digits, `web:a1b2c3d@77b362ef137b`; of a full commit id seven; anything else whole.
pub fn version(version: &str) -> String {
    let Some((image, digest)) = version.split_once("@sha256:") else {
        let commit = version.len() == 40 && version.bytes().all(|b| b.is_ascii_hexdigit());
        return version[..if commit { 7 } else { version.len() }].to_owned();
    };
    let name = image.rsplit('/').next().unwrap_or(image);
    format!("{name}@{}", digest.get(..12).unwrap_or(digest))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_cell_has_one_colour() {
        use super::without_codes;

        assert_eq!(without_codes("web *"), ("web *".to_owned(), None));
        let text = "\x1b[33mnot ready\x1b[0m (Crash\x1b[2mLoop\x1b[0m)";
        let expected = "not ready (CrashLoop)".to_owned();
        assert_eq!(without_codes(text), (expected, Some("33")));
    }

    #[test]
    fn a_text_is_cut_and_its_colours_are_not() {
        let text = "\x1b[2m  0.10s\x1b[0m building \x1b[36mstarted\x1b[0m";
        let cut = "\x1b[2m  0.10s\x1b[0m bui\x1b[36m\x1b[0m";
        assert_eq!(super::cut(text, 11), cut);
        assert_eq!(super::cut(text, 80), text);
        // Characters take two columns, or none.
        assert_eq!(super::cut("部署完成", 5), "部署");
        assert_eq!(super::cut("部署完成", 8), "部署完成");
        assert_eq!(super::cut("cafe\u{301}s", 4), "cafe\u{301}");
        assert_eq!(super::cut("ab\u{301}", 1), "a");
        assert_eq!(super::cut("部a", 1), "");
        assert_eq!(super::cut("\u{2764}\u{fe0f}ab", 3), "\u{2764}\u{fe0f}a");
    }

    #[test]
    fn others_text_is_one_line_without_what_a_terminal_acts_upon() {
        let text = "a\x1b[2Jb\tc\r\nd\u{9b}31m\x07";
        assert_eq!(super::plain(text), "a[2Jb c d31m");
        assert_eq!(super::plain("部署 é"), "部署 é");
    }

    #[test]
    fn images_are_short_in_tables() {
        let digest = "77b362ef137b1669ce9d39b265d4639f63dfbd09f33b940e726d0c88b5674f89";
        let image = format!("registry.example.com:5000/shop/web:a1b2c3d@sha256:{digest}");
        assert_eq!(super::version(&image), "web:a1b2c3d@77b362ef137b");
        assert_eq!(super::version("feature/x"), "feature/x");
        let commit = "f65cf71b599889657704e58fe5a9eeccac48e3f5";
        assert_eq!(super::version(commit), "f65cf71");
        assert_eq!(super::version(&commit[1..]), &commit[1..]);
        assert_eq!(super::version("web@sha256:\u{e9}"), "web@\u{e9}");
    }
}
