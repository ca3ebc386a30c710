//! The transparency log over HTTP: C2SP `tlog-tiles`, byte for byte as the notary published it.
//!
//! A checkpoint changes with every signature and may be kept for a second; a tile never changes.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use daybook_events::log::ReadError;
use daybook_events::tree::TreeCondition;
use daybook_events::{Digest, Position, PublishedTree};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;

use crate::answer::Answer;
use crate::extract::{NoParams, Params};
use crate::problem::Problem;
use crate::state::AppState;

/// How long the log may take to say what it is: less than a server elsewhere waits for the condition.
const LOG_ANSWERS: Duration = Duration::from_secs(3);
const CHECKPOINT: &str = "text/plain; charset=utf-8";
const TILE: &str = "application/octet-stream";

fn tree(state: &AppState) -> Result<&dyn PublishedTree, Problem> {
    state.tree.as_deref().ok_or_else(|| {
        Problem::new(
            StatusCode::NOT_FOUND,
            "no_transparency_log",
            "this server publishes no transparency log",
            "start it with --tlog DIR, the folder in which the notary publishes",
        )
    })
}

/// The newest signed checkpoint, as a signed note (C2SP `tlog-checkpoint`). The tiles that it
/// covers are at `/tlog/tile/<level>/<index>` and `/tlog/tile/entries/<index>`, as C2SP
/// `tlog-tiles` says.
#[utoipa::path(get, path = "/tlog/checkpoint", tag = "ledger", responses(
    (status = 200, description = "The checkpoint.", body = String, content_type = "text/plain"),
    (status = 404, description = "Nothing is signed yet, or nothing is published here.")))]
pub(crate) async fn checkpoint(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Response, Problem> {
    let head = tree(&state)?.head().ok_or_else(|| {
        Problem::new(
            StatusCode::NOT_FOUND,
            "nothing_signed_yet",
            "there is no checkpoint yet",
            "one is signed within a second of the first event; `daybook ledger status` says what \
             the notary does",
        )
    })?;
    let headers = [
        (header::CONTENT_TYPE, CHECKPOINT),
        (header::CACHE_CONTROL, "public, max-age=1"),
    ];
    Ok((headers, head.note).into_response())
}

/// The public keys that checkpoints are or were signed with, a `vkey` of C2SP `signed-note` a
/// line. An auditor compares them with what was received in another way.
#[utoipa::path(get, path = "/tlog/keys", tag = "ledger", responses(
    (status = 200, description = "The keys.", body = String, content_type = "text/plain"),
    (status = 404, description = "Nothing is published here.")))]
pub(crate) async fn keys(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Response, Problem> {
    let keys = read(&state, "keys").await?;
    let keys = keys.ok_or_else(|| missing("there are no keys yet"))?;
    let headers = [
        (header::CONTENT_TYPE, CHECKPOINT),
        (header::CACHE_CONTROL, "public, max-age=1"),
    ];
    Ok((headers, keys).into_response())
}

/// A tile of the tree, or a bundle of entries: `0/x001/067`, `entries/000.p/17`. C2SP `tlog-tiles`
/// says how the paths are made. They may be kept for ever.
#[utoipa::path(get, path = "/tlog/tile/{path}", tag = "ledger",
    params(("path" = String, Path,
        description = "Level or `entries`, and the index in groups of three digits, with slashes.")),
    responses(
        (status = 200, description = "Its hashes or entries.", body = String,
            content_type = "application/octet-stream"),
        (status = 404, description = "The published tree has no such tile.")))]
pub(crate) async fn tile(
    State(state): State<AppState>,
    Path(rest): Path<String>,
) -> Result<Response, Problem> {
    let Some(tile) = read(&state, &format!("tile/{rest}")).await? else {
        return Err(missing(
            "there is no such tile, or the tree is not that large yet",
        ));
    };
    let headers = [
        (header::CONTENT_TYPE, TILE),
        (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
    ];
    Ok((headers, tile).into_response())
}

async fn read(state: &AppState, path: &str) -> Result<Option<bytes::Bytes>, Problem> {
    tree(state)?.resource(path).await.map_err(|error| {
        tracing::error!(%error, path, "the transparency log could not be read");
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "transparency_log_unreadable",
            "the folder of the transparency log cannot be read",
            "look at the server's log for the cause",
        )
        .retry_after(5)
    })
}

fn missing(what: &str) -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "not_found",
        what,
        "C2SP tlog-tiles says how paths are made from the size in /tlog/checkpoint",
    )
}

/// What the ledger is, how far it is signed, and whether it still is what was signed.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct LedgerReport {
    /// `embedded` or `jetstream`, with its version; none while the log cannot be asked.
    pub(crate) backend: Option<String>,
    /// Identifies the very log; it changes when the log is made anew.
    pub(crate) identity: Option<String>,
    /// Position of its last event.
    pub(crate) head: Option<Position>,
    /// Why the log cannot be asked.
    pub(crate) unavailable: Option<String>,
    /// The events up to here are folded.
    pub(crate) position: Position,
    /// How many of them cannot be read and are set aside. `GET /api/v1/audit?void=true` lists them.
    pub(crate) set_aside: u64,
    /// What an acknowledged event survives: `synced` (the loss of power), `buffered` (the death of
    /// the process), `unknown`.
    pub(crate) durability: String,
    /// What an operator should know.
    pub(crate) warnings: Vec<String>,
    /// The newest signed head; none before the first.
    pub(crate) signed: Option<SignedReport>,
    /// Whether the log still is what was signed.
    pub(crate) condition: ConditionReport,
}

/// A signed head.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SignedReport {
    /// How many events it covers.
    pub(crate) size: u64,
    /// The root of the tree over them.
    pub(crate) root: Digest,
    /// When it was published.
    pub(crate) published_at: Timestamp,
}

/// Whether the log still is what was signed.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum ConditionReport {
    /// It is, as far as was looked.
    Sound {},
    /// It is not known.
    Unknown {
        /// Why.
        reason: String,
    },
    /// It looks shorter: appends wait, for two seconds or so, until it is clear whether it is.
    Doubted {
        /// What was seen.
        reason: String,
    },
    /// It is not: nothing is appended or signed any more.
    Broken {
        /// A stable code.
        code: String,
        /// The first position concerned, where one can be named.
        position: Option<Position>,
        /// What was found.
        message: String,
        /// What to do about it.
        remedy: String,
    },
}

impl ConditionReport {
    pub(crate) fn of(tree: Option<&dyn PublishedTree>) -> Self {
        match tree.map(PublishedTree::condition) {
            None => Self::Unknown {
                reason: "this server has no transparency log to compare with".into(),
            },
            Some(TreeCondition::Sound) => Self::Sound {},
            Some(TreeCondition::Unknown(reason)) => Self::Unknown { reason },
            Some(TreeCondition::Doubted(reason)) => Self::Doubted { reason },
            Some(TreeCondition::Broken(breach)) => Self::Broken {
                code: breach.code.into(),
                position: breach.position,
                message: breach.message,
                remedy: breach.remedy,
            },
        }
    }
}

/// What the ledger is, how far it is signed, and whether it still is what was signed.
#[utoipa::path(get, path = "/api/v1/ledger", tag = "ledger", responses(
    (status = 200, description = "The ledger.", body = LedgerReport)))]
pub(crate) async fn ledger(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
) -> Answer<LedgerReport> {
    let log = state.commands.ledger().log();
    // Whoever asks wants to know of the condition, above all while the log does not answer.
    let asked = async { Ok((log.info().await?, log.head().await?)) };
    let asked = match tokio::time::timeout(LOG_ANSWERS, asked).await {
        Ok(asked) => asked.map_err(|error: ReadError| error.to_string()),
        Err(_) => Err("the log does not answer in time".to_owned()),
    };
    // What is known of the ledger is said also while its log cannot be asked, or is gone.
    let (info, head, unavailable) = match asked {
        Ok((info, head)) => (Some(info), Some(head), None),
        Err(why) => (None, None, Some(why)),
    };
    let signed = state.tree.as_ref().and_then(|tree| tree.head());
    let durability = serde_json::to_value(info.as_ref().map(|i| i.durability))
        .ok()
        .and_then(|v| v.as_str().map(str::to_owned))
        .unwrap_or_else(|| "unknown".to_owned());
    Answer::ok(LedgerReport {
        backend: info
            .as_ref()
            .map(|i| format!("{} {}", i.backend, i.version)),
        identity: info.as_ref().map(|i| i.identity.clone()),
        head,
        unavailable,
        position: state.projections().position(),
        set_aside: state.projections().counters().unreadable,
        durability,
        warnings: info.map(|i| i.warnings).unwrap_or_default(),
        signed: signed.map(|s| SignedReport {
            size: s.head.size,
            root: Digest::from_sha256(&s.head.root),
            published_at: s.published_at,
        }),
        condition: ConditionReport::of(state.tree.as_deref()),
    })
}
