//! Failpoints that kill.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Signal, getpid, kill_process};

/// What the environment asks for.
struct Orders {
    /// Where to die, and at which time.
    die: Option<(String, u32)>,
    /// How often that place was reached.
    times: AtomicU32,
    trace: Option<File>,
}

static ORDERS: LazyLock<Orders> = LazyLock::new(|| Orders {
    die: std::env::var("DAYBOOK_FAILPOINT")
        .ok()
        .filter(|wanted| !wanted.is_empty())
        .map(|wanted| parse(&wanted)),
    times: AtomicU32::new(0),
    trace: std::env::var_os("DAYBOOK_FAILPOINTS_TRACE").and_then(|path| {
        let opened = OpenOptions::new().create(true).append(true).open(path);
        opened
            .inspect_err(|e| eprintln!("failpoints are not traced: {e}"))
            .ok()
    }),
});

/// `place#time`, or `place` for the first time.
fn parse(wanted: &str) -> (String, u32) {
    let (place, time) = wanted.rsplit_once('#').unwrap_or((wanted, "1"));
    (place.to_owned(), time.parse().unwrap_or(1))
}

/// Dies here, if that was asked for.
pub fn reached(place: &str) {
    let orders = &*ORDERS;
    if let Some(mut trace) = orders.trace.as_ref() {
        // One write of one line: several processes and threads share the file.
        let _ = trace.write_all(format!("{place}\n").as_bytes());
    }
    let Some((wanted, time)) = &orders.die else {
        return;
    };
    if wanted != place || orders.times.fetch_add(1, Ordering::SeqCst) + 1 != *time {
        return;
    }
    let _ = kill_process(getpid(), Signal::KILL);
    // The signal ends all threads; this one does not get beyond the place.
    loop {
        std::thread::park();
    }
}

/// Dies here, if that was asked for; `reason` tells this time from others.
pub fn reached_for(place: &str, reason: impl FnOnce() -> String) {
    let orders = &*ORDERS;
    if orders.trace.is_some() || orders.die.is_some() {
        reached(&format!("{place}({})", reason()));
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_place_and_a_time_are_told_apart() {
        assert_eq!(parse("append.after"), ("append.after".into(), 1));
        assert_eq!(
            parse("append.after(build.started)#7"),
            ("append.after(build.started)".into(), 7)
        );
    }
}
