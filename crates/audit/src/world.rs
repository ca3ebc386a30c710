//! What ran where, and how everything was set, at a position: folded from verified events alone.

use std::collections::BTreeMap;
use std::str::FromStr;

use daybook_events::deployment::{Deployment, Status};
use daybook_events::environment::Environment;
use daybook_events::project::Project;
use daybook_events::routing::Routing;
use daybook_events::subject::PREFIX;
use daybook_events::{Aggregate, AggregateKind, Event, Folded, Position, Subject};
use serde::Serialize;

use crate::verify::{Effect, Observe};

/// Everything that could be set or run, by what it is called, in words.
pub type Facts = BTreeMap<String, String>;

/// The state of everything, as it follows from the events that were observed so far. What has
/// ended is forgotten, so that memory grows with what runs and not with what ever ran.
#[derive(Debug, Default)]
pub struct World {
    projects: BTreeMap<Subject, Folded<Project>>,
    environments: BTreeMap<Subject, Folded<Environment>>,
    deployments: BTreeMap<Subject, Folded<Deployment>>,
    routings: BTreeMap<Subject, Folded<Routing>>,
}

fn fold<A: Aggregate>(
    all: &mut BTreeMap<Subject, Folded<A>>,
    subject: Subject,
    position: Position,
    event: &Event,
) {
    let folded = all.entry(subject).or_default();
    // Void events change nothing, here as in every fold.
    let _ = folded.apply(position, event);
}

impl World {
    fn take(&mut self, position: Position, bytes: &[u8]) {
        let Ok(event) = Event::from_bytes(bytes) else {
            return;
        };
        let subject = format!("{PREFIX}.{}", event.subject.replace('/', "."));
        let Ok(subject) = Subject::from_str(&subject) else {
            return;
        };
        match subject.kind() {
            Some(AggregateKind::Project) => fold(&mut self.projects, subject, position, &event),
            Some(AggregateKind::Environment) => {
                fold(&mut self.environments, subject, position, &event);
            }
            Some(AggregateKind::Routing) => fold(&mut self.routings, subject, position, &event),
            Some(AggregateKind::Deployment) => {
                fold(&mut self.deployments, subject.clone(), position, &event);
                let over = |d: &Deployment| {
                    matches!(
                        d.status,
                        Status::Terminated | Status::Deleted | Status::Failed | Status::Cancelled
                    )
                };
                if let Some(folded) = self.deployments.get_mut(&subject)
                    && folded.state.as_ref().is_some_and(over)
                {
                    // Only whether later events count is still asked.
                    if let Some(state) = &folded.state
                        && state.status == Status::Deleted
                    {
                        self.deployments.remove(&subject);
                    }
                }
            }
            _ => {}
        }
    }

    /// What runs or is on its way: the deployments that are not over, with their images.
    pub fn running(&self) -> impl Iterator<Item = (&Deployment, &Subject)> {
        self.deployments.iter().filter_map(|(subject, folded)| {
            let state = folded.state.as_ref()?;
            let over = [
                Status::Terminated,
                Status::Deleted,
                Status::Failed,
                Status::Cancelled,
            ];
            (!over.contains(&state.status)).then_some((state, subject))
        })
    }

    /// Everything in words.
    pub fn facts(&self) -> Facts {
        let mut facts = Facts::new();
        for project in self.projects.values().filter_map(|f| f.state.as_ref()) {
            let name = &project.name;
            let description = project.description.clone().unwrap_or_default();
            facts.insert(format!("project {name}"), description);
            for (service, spec) in &project.services {
                facts.insert(format!("service {name}/{service}"), words(spec));
            }
        }
        for environment in self.environments.values().filter_map(|f| f.state.as_ref()) {
            let name = format!("environment {}/{}", environment.project, environment.name);
            facts.insert(name, words(&environment.spec));
        }
        for (deployment, subject) in self.running() {
            let Subject::Deployment(_, _, id) = subject else {
                continue;
            };
            let image = deployment.image.as_ref();
            let image = image.map(|i| format!("{}@{}", i.repository, i.digest));
            let chart = || deployment.chart.as_ref().map(ToString::to_string);
            let image = image.or_else(chart);
            let image = image.unwrap_or_else(|| "no image yet".to_owned());
            let commit = deployment.commit.as_ref();
            let commit = commit.map_or("no commit yet".to_owned(), |c| format!("commit {c}"));
            let name = format!("deployment {} {id}", deployment.request.instance);
            let status = deployment.status.as_str();
            facts.insert(name, format!("{status}, {image}, {commit}"));
        }
        for routing in self.routings.values().filter_map(|f| f.state.as_ref()) {
            for (hostname, route) in &routing.routes {
                let backends: Vec<String> = route
                    .backends
                    .iter()
                    .map(|b| format!("{} ({})", b.deployment, b.weight))
                    .collect();
                facts.insert(format!("route {hostname}"), backends.join(", "));
            }
            for (instance, traffic) in &routing.instances {
                let main = traffic.main.map_or("nothing".to_owned(), |d| d.to_string());
                let pinned = if traffic.rolled_back {
                    ", rolled back"
                } else {
                    ""
                };
                facts.insert(format!("main {instance}"), format!("{main}{pinned}"));
            }
        }
        facts
    }
}

impl Observe for World {
    fn event(&mut self, position: Position, bytes: &[u8], _: Effect) {
        self.take(position, bytes);
    }
}

/// Settings in one line.
fn words(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Takes the facts at some positions, on one walk over a ledger.
#[derive(Debug)]
pub struct Snapshots {
    world: World,
    at: Vec<Position>,
    taken: BTreeMap<Position, Facts>,
}

impl Snapshots {
    /// Takes them after the events at these positions.
    pub fn new(at: impl IntoIterator<Item = Position>) -> Self {
        Self {
            world: World::default(),
            at: at.into_iter().collect(),
            taken: BTreeMap::new(),
        }
    }

    /// The facts at a position; those at the end for one that was not reached.
    pub fn facts(&self, at: Position) -> Facts {
        let taken = self.taken.get(&at).cloned();
        taken.unwrap_or_else(|| self.world.facts())
    }
}

impl Observe for Snapshots {
    fn event(&mut self, position: Position, bytes: &[u8], _: Effect) {
        // Positions at which no event is have the facts of those before.
        for at in &self.at {
            if *at < position && !self.taken.contains_key(at) {
                self.taken.insert(*at, self.world.facts());
            }
        }
        self.world.take(position, bytes);
    }
}

/// One difference between two states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// What it is about: `route web.example.org`.
    pub what: String,
    /// How it was; none if it was not there.
    pub before: Option<String>,
    /// How it is; none if it is gone.
    pub after: Option<String>,
}

/// How one state differs from another, in the order of what it is about.
pub fn differences(before: &Facts, after: &Facts) -> Vec<Change> {
    let names: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    names
        .into_iter()
        .filter(|name| before.get(*name) != after.get(*name))
        .map(|name| Change {
            what: name.clone(),
            before: before.get(name).cloned(),
            after: after.get(name).cloned(),
        })
        .collect()
}
