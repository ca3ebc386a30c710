//! The page in a real browser that has nothing of it in its memory, on the real program with a ledger: when something is
//! painted first, when what runs where stands there, and what came over the line until then.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use daybook_testkit::browser::Browser;
use daybook_testkit::nats::{NatsBinary, NatsServer};

use crate::report::{Comparison, Report};
use crate::{Failure, idle, logs, past, temporary_folder};

/// What is promised: milliseconds until something of the content is painted first.
const PAINTED_MS: f64 = 300.0;
/// What is promised: kilobytes that come over the line until the page stands.
const SENT_KB: f64 = 150.0;
const MS_PER_HOUR: f64 = idle::SECONDS_PER_HOUR * 1000.0;
const KB_PER_GB: f64 = 1_000_000.0;
const PATIENCE: Duration = Duration::from_secs(60);
/// What the page begins with once it has what it asked for.
const STANDS: &str = "document.querySelector('#content h1')?.textContent === 'What runs where'
    ? performance.now() : null";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Events in the ledger, which is of 20 projects
    #[arg(long, default_value_t = 10_000)]
    events: u32,
    /// Browsers, one after the other
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The program; the one beside this one if it is not named
    #[arg(long, value_name = "FILE")]
    daybook: Option<PathBuf>,
    /// Where its data folder is meanwhile
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// What one browser saw.
struct Seen {
    painted_ms: f64,
    stands_ms: f64,
    files_kb: f64,
    sent_kb: f64,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let program = idle::program(options.daybook.as_deref())?;
    let folder = temporary_folder(options.folder.as_deref())?;
    let nats = NatsBinary::newest().or_else(|| NatsBinary::installed().into_iter().next());
    let nats = nats.ok_or("there is no nats-server")?;
    let broker = NatsServer::start(&nats).await;
    let log = logs::jetstream(&broker.url()).await?;
    past::History::new().write(&log, options.events).await?;
    drop(log);
    // Nothing but the interface: workers would take up what the ledger says is under way.
    let arguments = ["serve", "--role", "api", "--nats", &broker.url()];
    let (mut server, _, address) = idle::start(&program, folder.path(), &arguments).await?;
    let mut seen = Vec::new();
    for _ in 0..options.rounds {
        let url = format!("http://{address}/");
        let looked = tokio::task::spawn_blocking(move || look(&url)).await??;
        seen.push(looked);
    }
    idle::stop(&mut server).await?;

    let figures = |of: fn(&Seen) -> f64| -> Vec<f64> { seen.iter().map(of).collect() };
    let (painted, stands) = (figures(|s| s.painted_ms), figures(|s| s.stands_ms));
    let (files, sent) = (figures(|s| s.files_kb), figures(|s| s.sent_kb));
    let stands = Comparison {
        limit: None,
        ..idle::against(
            format!(
                "what runs where stands there after {}",
                idle::listed(&stands, "ms")
            ),
            "300 ms, which is of the first paint",
            &stands,
            MS_PER_HOUR,
            PAINTED_MS,
        )
    };
    Ok(Report {
        title: format!(
            "The page in Chromium, with nothing in its memory, on a ledger of {} events: how many \
             an hour, or in a GB",
            options.events
        ),
        unit: "of them",
        notes: Vec::new(),
        comparisons: vec![
            idle::against(
                format!("painted first after {}", idle::listed(&painted, "ms")),
                "300 ms",
                &painted,
                MS_PER_HOUR,
                PAINTED_MS,
            ),
            stands,
            idle::against(
                format!(
                    "fetched until then {}, of which its own files {}",
                    idle::listed(&sent, "KB"),
                    idle::listed(&files, "KB")
                ),
                "150 KB",
                &sent,
                KB_PER_GB,
                SENT_KB,
            ),
        ],
    })
}

/// Opens the page in a new browser, and waits until it stands.
fn look(url: &str) -> Result<Seen, Failure> {
    let mut page = Browser::open(url, (1200, 900)).ok_or("there is no Chromium")?;
    let begun = Instant::now();
    let stands_ms = loop {
        if let Some(millis) = page.evaluate(STANDS).as_f64() {
            break millis;
        }
        if begun.elapsed() > PATIENCE {
            return Err("the page does not show what runs where".into());
        }
        // Its figure is up to so much too large; that of the first paint is the browser's own.
        std::thread::sleep(Duration::from_millis(5));
    };
    let painted_ms = page.painted().as_secs_f64() * 1000.0;
    let fetched = page.fetched();
    let kilobytes = |bytes: u64| bytes as f64 / 1000.0;
    let own = |url: &str| url.contains("/page/") || url.ends_with('/');
    let files = fetched.iter().filter(|one| own(&one.url));
    Ok(Seen {
        painted_ms,
        stands_ms,
        files_kb: kilobytes(files.map(|one| one.sent).sum()),
        sent_kb: kilobytes(fetched.iter().map(|one| one.sent).sum()),
    })
}
