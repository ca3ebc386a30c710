//! Looking for lines of output in all deployments of a project.

use std::collections::HashSet;
use std::collections::hash_map::{Entry, HashMap};
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daybook_events::build::Build;
use daybook_events::lines::{Line, LineSource};
use daybook_events::{
    BuildId, DeploymentId, EnvironmentName, Position, ProjectName, ServiceName, Subject,
};
use daybook_projections::{DeploymentFilter, DeploymentRow, Page, PageOf};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::events::accepts;
use super::history::page;
use super::logs::{LogLine, NDJSON, can_print, plain_response};
use crate::access::Principal;
use crate::answer::Answer;
use crate::extract::{Named, Params};
use crate::line_filter::{Asked, LineFilter};
use crate::problem::Problem;
use crate::state::AppState;

/// How long one answer looks. What it did not get to comes with the next page.
const PATIENCE: Duration = Duration::from_secs(2);
/// Lines that are read at once.
const READ: usize = 500;
/// Lines of a file that are looked for at once.
const BATCH: usize = 500;
/// Sources whose last line is asked for at once.
const ASKED_AT_ONCE: usize = 8;

/// What is looked for.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct SearchQuery {
    /// A text that lines have in them, as it stands; letters of ASCII may be large or small.
    q: Option<String>,
    /// Of deployments to this environment.
    environment: Option<String>,
    /// Of this service.
    service: Option<String>,
    /// `build`, `container`, `status` or `platform`; all if not given.
    #[serde(rename = "type")]
    #[param(rename = "type")]
    kind: Option<String>,
    /// At least this level: `debug`, `info`, `warn` or `error`.
    level: Option<String>,
    /// Printed in this cluster.
    cluster: Option<String>,
    /// Printed by this instance (pod, process).
    instance: Option<String>,
    /// Printed at this time or later (RFC 3339).
    from: Option<String>,
    /// Printed before this time (RFC 3339).
    until: Option<String>,
    /// Most lines on a page: 1 to 500, 50 if not given.
    limit: Option<u32>,
    /// Where the search goes on: `next` of the page before.
    cursor: Option<String>,
    /// The answer is a file with all lines that fit and were there when it was asked for, however many
    /// and however long that takes: as text, or as JSON with a line each
    /// (`Accept: application/x-ndjson`).
    #[serde(default)]
    download: bool,
}

/// Lines that were found.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FoundLines {
    /// The lines: newest deployments first, and the lines of each in their order.
    lines: Vec<FoundLine>,
    /// Where the search goes on; none once everything was looked at. A page may have few lines, or
    /// none, and still not be the last: looking takes its time.
    next: Option<String>,
    /// How many lines were looked at for this page.
    searched: u64,
}

/// A line, and whose it is.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FoundLine {
    /// The deployment.
    deployment: DeploymentId,
    /// The environment.
    environment: EnvironmentName,
    /// The service.
    service: ServiceName,
    /// The line.
    #[serde(flatten)]
    line: LogLine,
}

/// Where a search is: in the deployment that was requested at a position, after a line of its
/// build or of its own. Written `<position>-b<line>` or `<position>-d<line>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    created: Position,
    of_build: bool,
    after: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = if self.of_build { 'b' } else { 'd' };
        write!(f, "{}-{source}{}", self.created, self.after)
    }
}

impl FromStr for Place {
    type Err = Problem;
    fn from_str(text: &str) -> Result<Self, Problem> {
        let number = |t: &str| {
            let digits = !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
            t.parse::<u64>().ok().filter(|_| digits)
        };
        let read = || {
            let (created, rest) = text.split_once('-')?;
            let of_build = rest.starts_with('b');
            let after = rest.strip_prefix(['b', 'd'])?;
            Some(Self {
                created: Position(number(created)?),
                of_build,
                after: number(after)?,
            })
        };
        read().ok_or_else(|| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_cursor",
                "that is no cursor of a search",
                "use `next` of the page before, as it is",
            )
        })
    }
}

/// Looks for lines of output in all deployments of a project: of their builds, of their instances,
/// of the workers, and of the platform. Every line that is still kept is looked at; there is no index
/// that could lack any.
#[utoipa::path(get, path = "/api/v1/projects/{project}/logs", tag = "history",
    params(("project" = String, Path, description = "The project."), SearchQuery),
    responses((status = 200, description = "The lines.", content(
        (FoundLines = "application/json"), (String = "text/plain"),
        (FoundLine = "application/x-ndjson")))))]
pub(crate) async fn search_logs(
    State(state): State<AppState>,
    principal: Principal,
    Named(project): Named<ProjectName>,
    Params(query): Params<SearchQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    state.commands.project(&project)?;
    let limit = page(query.limit, None)?.limit();
    let place = query
        .cursor
        .as_deref()
        .map(str::parse::<Place>)
        .transpose()?;
    let deployments = DeploymentFilter {
        project: Some(project.clone()),
        environment: query.environment.map(EnvironmentName::parse).transpose()?,
        service: query.service.map(ServiceName::parse).transpose()?,
        ..DeploymentFilter::default()
    };
    let filter = LineFilter::new(Asked {
        kind: query.kind,
        level: query.level,
        cluster: query.cluster,
        instance: query.instance,
        from: query.from,
        until: query.until,
        text: query.q,
    })?;
    let mut search = Search {
        state: state.clone(),
        deployments,
        filter,
        builds: HashSet::new(),
        added: None,
        ends: None,
    };
    if let Some(place) = place {
        search.pass_over(place.created)?;
    }
    if !query.download {
        let page = search.page(place, limit).await?;
        let next = page.next.map(|p| p.to_string());
        return Ok(Answer::ok(FoundLines { next, ..page.found }).into_response());
    }
    let json = accepts(&headers, NDJSON);
    let media_type = if json {
        NDJSON
    } else {
        "text/plain; charset=utf-8"
    };
    // What is requested from here on is not in it.
    let place = place.unwrap_or(Place {
        created: state.projections().position(),
        of_build: true,
        after: 0,
    });
    let lines = file(search, place, json);
    let mut response = plain_response(&state, &principal, media_type, true, lines);
    let named = HeaderValue::from_str(&format!("attachment; filename=\"{project}.log\""));
    // A name has no character that a header cannot have.
    response
        .headers_mut()
        .extend(named.ok().map(|n| (header::CONTENT_DISPOSITION, n)));
    Ok(response)
}

/// All lines that are found, from a place on. What breaks off says so in its last line.
fn file(
    search: Search,
    place: Place,
    json: bool,
) -> impl stream::Stream<Item = Bytes> + Send + 'static {
    let begin = Some((search, Some(place)));
    stream::unfold(begin, move |at| async move {
        let (mut search, place) = at?;
        let page = match search.ends {
            Some(_) => search.page(place, BATCH).await,
            // The answer has begun, however long it takes to find out where it ends.
            None => search.first_page(place, BATCH).await,
        };
        match page {
            Ok(page) => {
                let lines = page.found.lines.iter();
                let lines: Vec<u8> = lines.flat_map(|l| l.written(json)).collect();
                let rest = page.next.map(|next| (search, Some(next)));
                Some((Bytes::from(lines), rest))
            }
            Err(problem) => {
                tracing::error!(error = ?problem, "a search that is kept as a file broke off");
                let text = "the search broke off here: there may be more lines";
                let last = match json {
                    true => format!("{{\"broken\":\"{text}\"}}\n"),
                    false => format!("{text}\n"),
                };
                Some((Bytes::from(last), None))
            }
        }
    })
    .filter(|lines| std::future::ready(!lines.is_empty()))
}

impl FoundLine {
    /// The line in a file.
    fn written(&self, json: bool) -> Vec<u8> {
        if json {
            // Texts and numbers can always be written.
            let mut written = serde_json::to_vec(self).unwrap_or_default();
            written.push(b'\n');
            return written;
        }
        let from = [
            self.line.cluster.as_ref().map(ToString::to_string),
            self.line.instance.clone(),
        ];
        let from: Vec<_> = from.into_iter().flatten().collect();
        format!(
            "{} {}.{} {} {} {}\n",
            self.line.time,
            self.environment,
            self.service,
            self.deployment,
            if from.is_empty() {
                "-".to_owned()
            } else {
                from.join("/")
            },
            self.line.words()
        )
        .into_bytes()
    }
}

/// The build and the deployment whose lines are looked at.
type Sources = (Option<LineSource>, Option<LineSource>);

/// A search under way.
struct Search {
    state: AppState,
    deployments: DeploymentFilter,
    filter: LineFilter,
    /// Builds that newer deployments have: their lines are found with the newest one that has them.
    builds: HashSet<BuildId>,
    /// The one of them that the deployment has that was looked at last, and no newer one.
    added: Option<BuildId>,
    /// Where a file ends: the last line of what could grow when it was asked for, and of what is being
    /// looked at. A page has its own end.
    ends: Option<HashMap<LineSource, u64>>,
}

/// What was found at once.
struct FoundPage {
    found: FoundLines,
    limit: usize,
    until: Instant,
    /// Where the search goes on.
    next: Option<Place>,
}

impl Search {
    /// The first lines of a file, which ends with what is there now.
    async fn first_page(
        &mut self,
        place: Option<Place>,
        limit: usize,
    ) -> Result<FoundPage, Problem> {
        let ends = match place {
            Some(place) => self.what_can_grow(place).await?,
            None => HashMap::new(),
        };
        self.ends = Some(ends);
        self.page(place, limit).await
    }

    /// Lines from a place on, as many as are wanted at most, and as are found in time.
    async fn page(&mut self, place: Option<Place>, limit: usize) -> Result<FoundPage, Problem> {
        let mut page = FoundPage {
            found: FoundLines {
                lines: Vec::new(),
                next: None,
                searched: 0,
            },
            limit,
            until: Instant::now() + PATIENCE,
            next: None,
        };
        self.run(place, &mut page).await?;
        // The deployment that is gone on with has its build still.
        if let Some(build) = self.added.take().filter(|_| page.next.is_some()) {
            self.builds.remove(&build);
        }
        Ok(page)
    }

    async fn run(
        &mut self,
        mut place: Option<Place>,
        found: &mut FoundPage,
    ) -> Result<(), Problem> {
        let mut page = Page::default();
        let mut looked = false;
        if let Some(place) = place {
            page = page.beginning(place.created);
        }
        loop {
            let listed = self.listed(page)?;
            for row in &listed.items {
                let from = place.take().filter(|p| p.created == row.created);
                let sources = self.sources(row)?;
                if sources == (None, None) {
                    continue;
                }
                let from = from.unwrap_or(Place {
                    created: row.created,
                    of_build: true,
                    after: 0,
                });
                if looked && Instant::now() >= found.until {
                    found.next = Some(from);
                    return Ok(());
                }
                looked = true;
                found.next = self.look(row, sources, from, found).await?;
                if found.next.is_some() {
                    return Ok(());
                }
            }
            match listed.next {
                Some(cursor) => page = page.starting(cursor),
                None => return Ok(()),
            }
        }
    }

    /// The last lines of the deployments that can print more, and of their builds, from a place on.
    async fn what_can_grow(&self, place: Place) -> Result<HashMap<LineSource, u64>, Problem> {
        let (of_build, of_deployment) = self.filter.sources();
        let mut ends = HashMap::new();
        let mut page = Page::largest().beginning(place.created);
        loop {
            let listed = self.listed(page)?;
            let growing = listed.items.iter().filter(|r| can_print(r.state.status));
            let sources: HashSet<LineSource> = growing
                .flat_map(|row| {
                    let build = row.state.build.map(LineSource::Build);
                    let own = of_deployment.then_some(LineSource::Deployment(row.id));
                    build.filter(|_| of_build).into_iter().chain(own)
                })
                .filter(|source| !ends.contains_key(source))
                .collect();
            let lines = &self.state.lines;
            let found = stream::iter(sources)
                .map(async |source| lines.last(source).await.map(|last| (source, last)))
                .buffer_unordered(ASKED_AT_ONCE);
            ends.extend(found.try_collect::<Vec<_>>().await?);
            tokio::task::yield_now().await;
            match listed.next {
                Some(cursor) => page = page.starting(cursor),
                None => return Ok(ends),
            }
        }
    }

    /// The last line of a source that is wanted; none if that is whatever is the last one.
    async fn end(&mut self, source: LineSource) -> Result<Option<u64>, Problem> {
        let Some(ends) = &mut self.ends else {
            return Ok(None);
        };
        let end = match ends.entry(source) {
            Entry::Occupied(known) => *known.get(),
            // It had printed all, or was thought to have: then it is not followed either.
            Entry::Vacant(new) => *new.insert(self.state.lines.last(source).await?),
        };
        Ok(Some(end))
    }

    fn listed(&self, page: Page) -> Result<PageOf<DeploymentRow>, Problem> {
        let projections = self.state.projections();
        Ok(projections.deployments(&self.deployments, page)?)
    }

    /// Notes the builds of the deployments that were requested after a position, which earlier pages
    /// have looked at.
    fn pass_over(&mut self, until: Position) -> Result<(), Problem> {
        let mut page = Page::largest();
        loop {
            let listed = self.listed(page)?;
            for row in &listed.items {
                if row.created <= until {
                    return Ok(());
                }
                self.builds.extend(row.state.build);
            }
            match listed.next {
                Some(cursor) => page = page.starting(cursor),
                None => return Ok(()),
            }
        }
    }

    /// What there is to look at of a deployment: its build, unless a newer one has it too, and
    /// itself. What began too late has no line in time.
    fn sources(&mut self, row: &DeploymentRow) -> Result<Sources, Problem> {
        let (of_build, of_deployment) = self.filter.sources();
        let until = self.filter.until();
        let in_time = |began| until.is_none_or(|until| began < until);
        let mut build = row.state.build.filter(|_| of_build);
        build = build.filter(|build| self.builds.insert(*build));
        self.added = build;
        if let (Some(id), Some(_)) = (build, until) {
            let project = row.state.request.instance.project.clone();
            let subject = Subject::Build(project, id);
            let folded = self.state.projections().folded::<Build>(&subject)?;
            // One that was tried again has older lines too.
            let fits = |b: Build| b.requests > 1 || in_time(b.created_at);
            build = build.filter(|_| folded.state.is_none_or(fits));
        }
        let own = of_deployment && in_time(row.state.created_at);
        let own = own.then_some(LineSource::Deployment(row.id));
        Ok((build.map(LineSource::Build), own))
    }

    /// Looks at the lines of one deployment. Returns where the search goes on if the page is done.
    async fn look(
        &mut self,
        row: &DeploymentRow,
        (build, own): Sources,
        from: Place,
        page: &mut FoundPage,
    ) -> Result<Option<Place>, Problem> {
        let build = build.filter(|_| from.of_build);
        for (of_build, source) in [(true, build), (false, own)] {
            let Some(source) = source else { continue };
            let mut after = if from.of_build == of_build {
                from.after
            } else {
                0
            };
            let end = self.end(source).await?;
            while end.is_none_or(|end| after < end) {
                let mut lines = self.state.lines.read(source, after, READ).await?;
                lines.retain(|line| end.is_none_or(|end| line.seq <= end));
                if lines.is_empty() {
                    break;
                }
                for line in lines {
                    after = line.seq;
                    page.found.searched += 1;
                    if self.filter.wants(of_build, &line.line) {
                        page.found.lines.push(FoundLine::new(row, of_build, line));
                    }
                    let enough = page.found.lines.len() >= page.limit;
                    if enough || Instant::now() >= page.until {
                        return Ok(Some(Place {
                            created: row.created,
                            of_build,
                            after,
                        }));
                    }
                }
            }
            if let Some(ends) = &mut self.ends {
                ends.remove(&source);
            }
        }
        Ok(None)
    }
}

impl FoundLine {
    fn new(row: &DeploymentRow, of_build: bool, line: Line) -> Self {
        let instance = &row.state.request.instance;
        Self {
            deployment: row.id,
            environment: instance.environment.clone(),
            service: instance.service.clone(),
            line: LogLine::standing_alone(of_build, line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_they_are_written() {
        for text in ["1-b0", "12-d40"] {
            assert_eq!(text.parse::<Place>().unwrap().to_string(), text);
        }
        for bad in [
            "", "-", "1", "1-", "1-b", "1-x4", "-b4", "+1-b4", "1-b-4", "1-b4-5",
        ] {
            assert!(bad.parse::<Place>().is_err(), "{bad:?}");
        }
    }
}
