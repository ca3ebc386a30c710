//! How rows of the audit are stored: some successive ones in a chunk, written straight from what
//! was read, each text once.
//!
//! A chunk begins with the newest time at which any event up to its end was recorded. Rows
//! follow. A text that several rows may share (a name, an actor, a type) stands where it is used
//! first, and is a number from then on.

use std::hash::{Hash, Hasher};

use daybook_events::subject::PREFIX;
use daybook_events::{
    Actor, AggregateKind as Kind, BuildId, DeploymentId, EnvironmentName, EventId, Position,
    ProjectName, ServiceName, Subject, SubscriptionId,
};
use jiff::Timestamp;
use rustc_hash::FxHasher;
use uuid::Uuid;

use crate::audit::{AuditRow, VoidView};
use crate::table::TableError;
use crate::terms::{Role, family, term};

/// One row on its way into a chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) id: Option<EventId>,
    pub(crate) time: Timestamp,
    pub(crate) recorded: Timestamp,
    /// The actor's kind and id.
    pub(crate) actor: (&'a str, &'a str),
    pub(crate) kind: &'a str,
    pub(crate) subject: &'a Subject,
    pub(crate) revision: u32,
    /// The environment, if it is not the subject's.
    pub(crate) environment: Option<&'a EnvironmentName>,
    pub(crate) service: Option<&'a ServiceName>,
    /// The deployment, if it is not the subject.
    pub(crate) deployment: Option<DeploymentId>,
    pub(crate) summary: &'a str,
    pub(crate) reason: Option<&'a str>,
    pub(crate) cause: Option<EventId>,
    pub(crate) correlation: Option<Uuid>,
}

/// The aggregates of a project. Subjects of others are written as texts.
const KINDS: [Kind; 7] = [
    Kind::Project,
    Kind::Environment,
    Kind::Build,
    Kind::Deployment,
    Kind::Gitops,
    Kind::Routing,
    Kind::Subscription,
];

// What a row has, in the order in which it stands there.
const ID: u8 = 1;
const ENVIRONMENT: u8 = 2;
const SERVICE: u8 = 4;
const DEPLOYMENT: u8 = 8;
const REASON: u8 = 16;
const CAUSE: u8 = 32;
const CORRELATION: u8 = 64;
/// The correlation is the deployment's id.
const RUN: u8 = 128;

/// Slots of the table in which shared texts are found again; a chunk has fewer texts.
const TEXTS: usize = 512;

/// Rows as they are put together.
pub(crate) struct Writer {
    /// The newest time at which an event was recorded, of all that ever were.
    newest: Timestamp,
    body: Vec<u8>,
    /// Where each row ends.
    ends: Vec<usize>,
    texts: Vec<(Role, std::ops::Range<usize>)>,
    /// Numbers of texts by their hash, plus one.
    found: Box<[u16; TEXTS]>,
    terms: Vec<u32>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("rows", &self.ends.len())
            .finish_non_exhaustive()
    }
}

impl Default for Writer {
    fn default() -> Self {
        Self {
            newest: Timestamp::MIN,
            body: Vec::with_capacity(8 << 10),
            ends: Vec::new(),
            texts: Vec::new(),
            found: Box::new([0; TEXTS]),
            terms: Vec::new(),
        }
    }
}

impl Writer {
    /// Goes on with a chunk, or begins one after it if it is full.
    pub(crate) fn resume(chunk: &[u8], first: Position) -> Result<Self, TableError> {
        let mut reader = Reader::new(chunk, first)?;
        let mut writer = Self {
            newest: reader.newest,
            ..Self::default()
        };
        let head = reader.at;
        writer.body.extend_from_slice(&chunk[head..]);
        while let Some(row) = reader.next()? {
            writer.ends.push(reader.at - head);
            add_terms(&mut writer.terms, &row);
        }
        for (role, range) in reader.texts {
            let range = range.start - head..range.end - head;
            let slot = writer.slot(role, &chunk[head..][range.clone()]);
            writer.texts.push((role, range));
            writer.found[slot] = u16::try_from(writer.texts.len()).unwrap_or(0);
        }
        Ok(writer)
    }

    /// How many rows there are.
    pub(crate) fn rows(&self) -> usize {
        self.ends.len()
    }

    /// The chunk, as far as it is.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut chunk = Vec::with_capacity(self.body.len() + 16);
        put_time(&mut chunk, self.newest);
        chunk.extend_from_slice(&self.body);
        chunk
    }

    /// Begins the next chunk, and gives the terms of this one.
    pub(crate) fn turn(&mut self, terms: &mut Vec<u32>) {
        self.body.clear();
        self.ends.clear();
        self.texts.clear();
        self.found.fill(0);
        terms.append(&mut self.terms);
    }

    /// Adds a row, all but why it is void.
    pub(crate) fn begin(&mut self, row: Row<'_>) {
        // What cannot be read says nothing of when it was recorded.
        if row.id.is_some() {
            self.newest = self.newest.max(row.recorded);
        }
        let run = match (row.correlation, row.deployment.or(own(row.subject))) {
            (Some(c), Some(d)) => c == d.0,
            _ => false,
        };
        let flag = |bit: u8, set: bool| if set { bit } else { 0 };
        self.body.push(
            flag(ID, row.id.is_some())
                | flag(ENVIRONMENT, row.environment.is_some())
                | flag(SERVICE, row.service.is_some())
                | flag(DEPLOYMENT, row.deployment.is_some())
                | flag(REASON, row.reason.is_some())
                | flag(CAUSE, row.cause.is_some())
                | flag(CORRELATION, row.correlation.is_some() && !run)
                | flag(RUN, run),
        );
        self.subject(row.subject);
        put_time(&mut self.body, row.time);
        put_time(&mut self.body, row.recorded);
        self.text(Role::Authentication, row.actor.0);
        self.text(Role::Actor, row.actor.1);
        self.text(Role::Kind, row.kind);
        put_number(&mut self.body, row.revision.into());
        put_text(&mut self.body, row.summary);
        if let Some(id) = row.id {
            self.body.extend_from_slice(id.0.as_bytes());
        }
        if let Some(environment) = row.environment {
            self.text(Role::Environment, environment.as_str());
        }
        if let Some(service) = row.service {
            self.text(Role::Service, service.as_str());
        }
        if let Some(deployment) = row.deployment {
            self.body.extend_from_slice(deployment.0.as_bytes());
        }
        if let Some(d) = row.deployment.or(own(row.subject)) {
            self.terms.push(term(Role::Deployment, d.0.as_bytes()));
        }
        if let Some(reason) = row.reason {
            put_text(&mut self.body, reason);
        }
        if let Some(cause) = row.cause {
            self.body.extend_from_slice(cause.0.as_bytes());
        }
        if let Some(c) = row.correlation {
            if !run {
                self.body.extend_from_slice(c.as_bytes());
            }
            self.terms.push(term(Role::Correlation, c.as_bytes()));
        }
    }

    /// Ends the row that was begun.
    pub(crate) fn end(&mut self, void: Option<&VoidView>) {
        self.body.push(void.is_some().into());
        if let Some(void) = void {
            put_text(&mut self.body, &void.code);
            put_text(&mut self.body, &void.message);
            self.terms.push(term(Role::Void, b""));
        }
        self.ends.push(self.body.len());
    }

    fn subject(&mut self, subject: &Subject) {
        let place = |kind| KINDS.iter().position(|k| Some(*k) == kind);
        let tag = place(subject.kind()).unwrap_or(KINDS.len());
        self.body.push(u8::try_from(tag).unwrap_or(u8::MAX));
        if tag == KINDS.len() {
            let text = subject.to_string();
            put_text(&mut self.body, &text);
            let (project, environment) = places(&text);
            for (role, name) in [(Role::Project, project), (Role::Environment, environment)] {
                self.terms.extend(name.map(|n| term(role, n.as_bytes())));
            }
        }
        if let Some(project) = subject.project() {
            self.text(Role::Project, project.as_str());
        }
        if let Some(environment) = subject.environment() {
            self.text(Role::Environment, environment.as_str());
        }
        match subject {
            Subject::Build(_, id) => self.body.extend_from_slice(id.0.as_bytes()),
            Subject::Subscription(_, id) => self.body.extend_from_slice(id.0.as_bytes()),
            Subject::Deployment(_, _, id) => self.body.extend_from_slice(id.0.as_bytes()),
            _ => {}
        }
    }

    /// A text that other rows may share: its number plus one, or 0 and the text itself.
    fn text(&mut self, role: Role, text: &str) {
        let slot = self.slot(role, text.as_bytes());
        let number = self.found[slot];
        if number > 0 {
            put_number(&mut self.body, number.into());
            return;
        }
        self.body.push(0);
        put_text(&mut self.body, text);
        let range = self.body.len() - text.len()..self.body.len();
        // What does not fit in is not shared.
        if self.texts.len() < TEXTS / 2 {
            self.texts.push((role, range));
            self.found[slot] = u16::try_from(self.texts.len()).unwrap_or(0);
        }
        if role != Role::Authentication {
            self.terms.push(term(role, text.as_bytes()));
        }
        if role == Role::Kind {
            self.terms.push(term(role, family(text).as_bytes()));
        }
    }

    /// Where a text's number is, or is to be.
    fn slot(&self, role: Role, text: &[u8]) -> usize {
        let mut hasher = FxHasher::default();
        (role, text).hash(&mut hasher);
        let mut slot = hasher.finish() as usize % TEXTS;
        loop {
            let number = usize::from(self.found[slot]);
            let Some((known, range)) = number.checked_sub(1).and_then(|n| self.texts.get(n)) else {
                return slot;
            };
            if *known == role && self.body.get(range.clone()) == Some(text) {
                return slot;
            }
            slot = (slot + 1) % TEXTS;
        }
    }
}

/// The deployment that a subject names.
fn own(subject: &Subject) -> Option<DeploymentId> {
    match subject {
        Subject::Deployment(_, _, id) => Some(*id),
        _ => None,
    }
}

/// Project and environment as the subject of a newer version seems to name them.
fn places(text: &str) -> (Option<&str>, Option<&str>) {
    let mut tokens = text.split('.').skip(2);
    let project = tokens.next().filter(|p| ProjectName::parse(*p).is_ok());
    let environment = tokens.next().filter(|e| EnvironmentName::parse(*e).is_ok());
    (project, environment)
}

/// The terms of a row that was read.
fn add_terms(terms: &mut Vec<u32>, row: &AuditRow) {
    let mut add = |role: Role, text: &[u8]| terms.push(term(role, text));
    if let Some(p) = &row.project {
        add(Role::Project, p.as_str().as_bytes());
    }
    if let Some(e) = &row.environment {
        add(Role::Environment, e.as_str().as_bytes());
    }
    if let Some(s) = &row.service {
        add(Role::Service, s.as_str().as_bytes());
    }
    if let Some(d) = &row.deployment {
        add(Role::Deployment, d.0.as_bytes());
    }
    if let Some(c) = &row.correlation {
        add(Role::Correlation, c.as_bytes());
    }
    add(Role::Actor, row.actor.id.as_bytes());
    add(Role::Kind, row.kind.as_bytes());
    add(Role::Kind, family(&row.kind).as_bytes());
    if row.void.is_some() {
        add(Role::Void, b"");
    }
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_number(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn put_time(out: &mut Vec<u8>, time: Timestamp) {
    out.extend_from_slice(&time.as_second().to_le_bytes());
    out.extend_from_slice(&time.subsec_nanosecond().to_le_bytes());
}

/// The rows of a chunk, one after the other.
pub(crate) struct Reader<'a> {
    chunk: &'a [u8],
    at: usize,
    next: Position,
    texts: Vec<(Role, std::ops::Range<usize>)>,
    /// The newest time at which any event up to the end of this chunk was recorded.
    pub(crate) newest: Timestamp,
}

fn damaged() -> TableError {
    TableError::Row("a chunk of the audit".to_owned())
}

impl<'a> Reader<'a> {
    /// A chunk whose first row is of this position.
    pub(crate) fn new(chunk: &'a [u8], first: Position) -> Result<Self, TableError> {
        let mut reader = Self {
            chunk,
            at: 0,
            next: first,
            texts: Vec::new(),
            newest: Timestamp::MIN,
        };
        reader.newest = reader.time()?;
        Ok(reader)
    }

    /// The next row; none at the end.
    pub(crate) fn next(&mut self) -> Result<Option<AuditRow>, TableError> {
        Ok(self.read()?.map(|(subject, mut row)| {
            row.subject = readable(&subject.to_string());
            row
        }))
    }

    /// The position and the subject of the next row.
    pub(crate) fn next_subject(&mut self) -> Result<Option<(Position, Subject)>, TableError> {
        Ok(self.read()?.map(|(subject, row)| (row.position, subject)))
    }

    /// The next row but for the text of its subject.
    fn read(&mut self) -> Result<Option<(Subject, AuditRow)>, TableError> {
        if self.at == self.chunk.len() {
            return Ok(None);
        }
        let flags = self.take(1)?[0];
        let has = |bit: u8| flags & bit != 0;
        let (subject, mut row) = self.subject()?;
        row.position = self.next;
        self.next = self.next.next();
        row.time = self.time()?;
        row.recorded = self.time()?;
        row.actor = Actor {
            kind: self.shared(Role::Authentication)?.to_owned(),
            id: self.shared(Role::Actor)?.to_owned(),
        };
        row.kind = self.shared(Role::Kind)?.to_owned();
        row.revision = u32::try_from(self.number()?).map_err(|_| damaged())?;
        row.summary = self.text()?.to_owned();
        if has(ID) {
            row.id = Some(EventId(self.uuid()?));
        }
        if has(ENVIRONMENT) {
            let name = self.shared(Role::Environment)?;
            row.environment = Some(EnvironmentName::parse(name).map_err(|_| damaged())?);
        }
        if has(SERVICE) {
            let name = self.shared(Role::Service)?;
            row.service = Some(ServiceName::parse(name).map_err(|_| damaged())?);
        }
        if has(DEPLOYMENT) {
            row.deployment = Some(DeploymentId(self.uuid()?));
        }
        if has(REASON) {
            row.reason = Some(self.text()?.to_owned());
        }
        if has(CAUSE) {
            row.cause = Some(EventId(self.uuid()?));
        }
        if has(CORRELATION) {
            row.correlation = Some(self.uuid()?);
        }
        if has(RUN) {
            row.correlation = row.deployment.map(|d| d.0);
        }
        if self.take(1)?[0] != 0 {
            row.void = Some(VoidView {
                code: self.text()?.to_owned(),
                message: self.text()?.to_owned(),
            });
        }
        Ok(Some((subject, row)))
    }

    /// The subject, and a row with what it says.
    fn subject(&mut self) -> Result<(Subject, AuditRow), TableError> {
        let mut row = AuditRow {
            position: Position::ZERO,
            id: None,
            time: Timestamp::MIN,
            recorded: Timestamp::MIN,
            actor: Actor::unauthenticated(""),
            kind: String::new(),
            subject: String::new(),
            revision: 0,
            project: None,
            environment: None,
            service: None,
            deployment: None,
            summary: String::new(),
            reason: None,
            cause: None,
            correlation: None,
            void: None,
        };
        let tag = usize::from(self.take(1)?[0]);
        let Some(kind) = KINDS.get(tag) else {
            let text = self.text()?;
            let (project, environment) = places(text);
            row.project = project.and_then(|p| ProjectName::parse(p).ok());
            row.environment = environment.and_then(|e| EnvironmentName::parse(e).ok());
            let subject = text.parse();
            let subject = subject.unwrap_or_else(|_| Subject::Other(text.to_owned()));
            return Ok((subject, row));
        };
        let project = ProjectName::parse(self.shared(Role::Project)?).map_err(|_| damaged())?;
        row.project = Some(project.clone());
        if matches!(kind, Kind::Environment | Kind::Deployment) {
            let name = self.shared(Role::Environment)?;
            row.environment = Some(EnvironmentName::parse(name).map_err(|_| damaged())?);
        }
        let subject = match (kind, row.environment.clone()) {
            (Kind::Project, _) => Subject::Project(project),
            (Kind::Gitops, _) => Subject::Gitops(project),
            (Kind::Routing, _) => Subject::Routing(project),
            (Kind::Build, _) => Subject::Build(project, BuildId(self.uuid()?)),
            (Kind::Subscription, _) => Subject::Subscription(project, SubscriptionId(self.uuid()?)),
            (Kind::Environment, Some(e)) => Subject::Environment(project, e),
            (Kind::Deployment, Some(e)) => {
                let id = DeploymentId(self.uuid()?);
                row.deployment = Some(id);
                Subject::Deployment(project, e, id)
            }
            (Kind::Environment | Kind::Deployment, None)
            | (Kind::Domain | Kind::Ledger | Kind::Access, _) => {
                return Err(damaged());
            }
        };
        Ok((subject, row))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], TableError> {
        let end = self.at.checked_add(length).ok_or_else(damaged)?;
        let bytes = self.chunk.get(self.at..end).ok_or_else(damaged)?;
        self.at = end;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64, TableError> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(damaged())
    }

    fn range(&mut self) -> Result<std::ops::Range<usize>, TableError> {
        let length = usize::try_from(self.number()?).map_err(|_| damaged())?;
        self.take(length)?;
        Ok(self.at - length..self.at)
    }

    fn text(&mut self) -> Result<&'a str, TableError> {
        let range = self.range()?;
        std::str::from_utf8(&self.chunk[range]).map_err(|_| damaged())
    }

    fn shared(&mut self, role: Role) -> Result<&'a str, TableError> {
        let number = usize::try_from(self.number()?).map_err(|_| damaged())?;
        let range = if number == 0 {
            let range = self.range()?;
            if self.texts.len() < TEXTS / 2 {
                self.texts.push((role, range.clone()));
            }
            range
        } else {
            let (_, range) = self.texts.get(number - 1).ok_or_else(damaged)?;
            range.clone()
        };
        std::str::from_utf8(&self.chunk[range]).map_err(|_| damaged())
    }

    fn uuid(&mut self) -> Result<Uuid, TableError> {
        Uuid::from_slice(self.take(16)?).map_err(|_| damaged())
    }

    fn time(&mut self) -> Result<Timestamp, TableError> {
        let (seconds, nanoseconds) = (self.take(8)?, self.take(4)?);
        let seconds = i64::from_le_bytes(seconds.try_into().map_err(|_| damaged())?);
        let nanoseconds = i32::from_le_bytes(nanoseconds.try_into().map_err(|_| damaged())?);
        Timestamp::new(seconds, nanoseconds).map_err(|_| damaged())
    }
}

/// A subject as `shop/production/deployment/<id>`.
fn readable(subject: &str) -> String {
    subject
        .strip_prefix(PREFIX)
        .map_or(subject, |s| s.trim_start_matches('.'))
        .replace('.', "/")
}
