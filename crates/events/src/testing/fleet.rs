//! A fleet of projects whose ledger grows by legal events, one choice at a time.
//!
//! Every event is decided on its aggregate's folded state, as in earnest. What happens next is
//! up to a source of numbers: a property test hands in its own, a benchmark a generator.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{context, samples};
use crate::aggregate::{Aggregate, At, Decision, Folded, Refusal};
use crate::build::{self, Build, BuildEvent};
use crate::deployment::{self, Deployment, DeploymentEvent, Status, TRANSITIONS, Version};
use crate::envelope::{NewEvent, Payload};
use crate::environment::{self, Environment, EnvironmentEvent};
use crate::gitops::{self, Change, Gitops, GitopsEvent};
use crate::log::Position;
use crate::names::{BuildId, DeploymentId, EventId, InstanceRef, ProjectName};
use crate::project::{self, Project, ProjectEvent};
use crate::routing::{self, Command, Routing, Target};
use crate::subject::Subject;
use crate::trace::TraceParent;

/// How many events a fleet's ledger has, and what they are about.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Projects.
    pub projects: u32,
    /// Services in each, and as many environments at most.
    pub services: u32,
    /// Deployments of a project that are under way or run at the same time.
    pub active: usize,
}

impl Default for Size {
    fn default() -> Self {
        Self {
            projects: 2,
            services: 2,
            active: 8,
        }
    }
}

/// An event to append.
#[derive(Debug, Clone)]
pub struct Happened {
    /// Its aggregate.
    pub subject: Subject,
    /// Its id.
    pub id: EventId,
    /// Its bytes.
    pub bytes: Bytes,
}

/// A fleet.
#[derive(Debug, Default)]
pub struct Fleet {
    size: Size,
    position: u64,
    deployments: u64,
    projects: Vec<Shop>,
}

#[derive(Debug)]
struct Shop {
    name: ProjectName,
    project: Folded<Project>,
    environments: BTreeMap<String, Folded<Environment>>,
    builds: BTreeMap<BuildId, Folded<Build>>,
    active: Vec<(DeploymentId, u64, Folded<Deployment>)>,
    gitops: Folded<Gitops>,
    routing: Folded<Routing>,
}

const ENVIRONMENTS: [&str; 3] = ["production", "staging", "development"];
const SERVICES: [&str; 6] = ["api", "web", "worker", "mail", "search", "admin"];

/// Choices by a linear congruence: for histories that need only be various.
pub fn choices(seed: u64) -> impl FnMut(u32) -> u32 {
    let mut state = seed | 1;
    move |below| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as u32) % below.max(1)
    }
}

impl Fleet {
    /// A fleet to which nothing has happened yet.
    pub fn new(size: Size) -> Self {
        Self {
            size,
            ..Self::default()
        }
    }

    /// Lets the next event happen. `choose(n)` picks a number below `n`.
    pub fn next(&mut self, choose: &mut dyn FnMut(u32) -> u32) -> Happened {
        loop {
            if let Some(happened) = self.try_next(choose) {
                return happened;
            }
        }
    }

    fn try_next(&mut self, choose: &mut dyn FnMut(u32) -> u32) -> Option<Happened> {
        let pick = choose(self.size.projects) as usize;
        if pick >= self.projects.len() {
            let name = ProjectName::parse(format!("shop-{}", self.projects.len())).ok()?;
            self.projects.push(Shop::new(name.clone()));
            let shop = self.projects.last_mut()?;
            let event = ProjectEvent::Created(project::Created {
                name: name.clone(),
                description: None,
            });
            let subject = Subject::Project(name);
            return step(&mut self.position, subject, &mut shop.project, |s| {
                project::decide(s, event)
            });
        }
        let full = self.size.active;
        let environment = ENVIRONMENTS[choose(self.size.services.clamp(1, 3)) as usize];
        let service = SERVICES[choose(self.size.services.clamp(1, 6)) as usize];
        let shop = &mut self.projects[pick];
        let instance = samples::instance(&format!("{}.{environment}.{service}", shop.name));
        if let Some(happened) = shop.prepare(&mut self.position, &instance, choose) {
            return Some(happened);
        }
        if shop.active.is_empty() || (shop.active.len() < full && choose(12) == 0) {
            self.deployments += 1;
            return shop.request(&mut self.position, instance, self.deployments, choose);
        }
        let which = choose(u32::try_from(shop.active.len()).unwrap_or(1)) as usize;
        shop.advance(&mut self.position, which, choose)
    }
}

/// Decides, applies and encodes one event.
fn step<A: Aggregate>(
    position: &mut u64,
    subject: Subject,
    folded: &mut Folded<A>,
    decide: impl FnOnce(Option<&A>) -> Result<Decision<A::Event>, Refusal>,
) -> Option<Happened> {
    let Ok(Decision::Append(payload)) = decide(folded.state.as_ref()) else {
        return None;
    };
    *position += 1;
    let mut context = context(*position);
    if payload.kind() == "deployment.requested.v1" {
        context.request_digest = Some(format!("{:064x}", *position));
    }
    // Some are in a trace.
    if *position % 2 == 1 {
        let number = u128::from(*position);
        let span = position.to_be_bytes();
        context.traceparent = TraceParent::new(number.to_be_bytes(), span, true);
    }
    let trace = context.traceparent;
    let (id, time) = (context.id, context.time);
    let event = NewEvent {
        subject: subject.clone(),
        revision: folded.revision + 1,
        context,
        payload,
    };
    let bytes = event.to_bytes(time).ok()?;
    let at = At {
        position: Position(*position),
        id,
        time,
        trace,
    };
    let legal = folded.step(at, event.revision, Ok(event.payload));
    assert_eq!(legal, Ok(()), "what was decided must apply");
    Some(Happened { subject, id, bytes })
}

impl Shop {
    fn new(name: ProjectName) -> Self {
        Self {
            name,
            project: Folded::default(),
            environments: BTreeMap::new(),
            builds: BTreeMap::new(),
            active: Vec::new(),
            gitops: Folded::default(),
            routing: Folded::default(),
        }
    }

    /// What an instance needs before anything can be deployed to it, and now and then a change
    /// of it.
    fn prepare(
        &mut self,
        position: &mut u64,
        instance: &InstanceRef,
        choose: &mut dyn FnMut(u32) -> u32,
    ) -> Option<Happened> {
        let change = choose(200);
        let project = self.project.state.as_ref()?;
        if !project.services.contains_key(&instance.service) || change == 0 {
            let mut spec = crate::spec::ServiceSpec::default();
            spec.run.replicas = 1 + choose(3);
            let event = ProjectEvent::ServiceDefined(Box::new(project::ServiceDefined {
                name: instance.service.clone(),
                spec,
            }));
            let subject = Subject::Project(self.name.clone());
            return step(position, subject, &mut self.project, |s| {
                project::decide(s, event)
            });
        }
        let known = self
            .environments
            .entry(instance.environment.to_string())
            .or_default();
        let mut event = samples::environment_events().swap_remove(usize::from(known.revision > 0));
        if let EnvironmentEvent::Created(e) = &mut event {
            e.project = self.name.clone();
            e.name = instance.environment.clone();
        }
        if known.revision == 0 || change == 1 {
            let subject = Subject::Environment(self.name.clone(), instance.environment.clone());
            return step(position, subject, known, |s| environment::decide(s, event));
        }
        if self.gitops.revision == 0 || change == 2 {
            let foreign = usize::from(self.gitops.revision > 0) * 2;
            let event =
                samples::gitops_events(instance, samples::deployment_id(0)).swap_remove(foreign);
            let subject = Subject::Gitops(self.name.clone());
            return step(position, subject, &mut self.gitops, |s| {
                gitops::decide(s, event)
            });
        }
        None
    }

    fn request(
        &mut self,
        position: &mut u64,
        instance: InstanceRef,
        number: u64,
        choose: &mut dyn FnMut(u32) -> u32,
    ) -> Option<Happened> {
        let id = samples::deployment_id(number);
        let subject = Subject::Deployment(self.name.clone(), instance.environment.clone(), id);
        let mut request = samples::request(instance);
        if choose(4) == 0 {
            request.version = Version::Image {
                reference: format!("registry.example.com/shop/api:v{number}")
                    .parse()
                    .ok()?,
            };
        }
        let mut folded = Folded::default();
        let event = DeploymentEvent::Requested(Box::new(request));
        let happened = step(position, subject, &mut folded, |s| {
            deployment::decide(s, event)
        })?;
        self.active.push((id, number, folded));
        Some(happened)
    }

    /// Lets something happen around one of the active deployments.
    fn advance(
        &mut self,
        position: &mut u64,
        which: usize,
        choose: &mut dyn FnMut(u32) -> u32,
    ) -> Option<Happened> {
        let (id, number, folded) = &mut self.active[which];
        let (id, number) = (*id, *number);
        let state = folded.state.as_ref()?;
        let instance = state.request.instance.clone();
        let status = state.status;
        match choose(8) {
            0 => return self.build(position, number, choose),
            1 => return self.commit(position, &instance, id, choose),
            2 | 3 => {
                let target = Target {
                    deployment: id,
                    instance: instance.clone(),
                    status,
                    ready: true,
                };
                return self.route(position, target, choose);
            }
            _ => {}
        }
        let mut events = samples::deployment_events(instance.clone(), number / 2);
        events.push(samples::observed(
            "oslo",
            number,
            1 + choose(2),
            choose(2) == 0,
        ));
        events.push(samples::observed(
            "berlin",
            number,
            choose(2),
            choose(2) == 0,
        ));
        events.retain(|e| {
            let row = TRANSITIONS.iter().find(|t| t.kind == e.kind());
            row.is_some_and(|t| t.from.contains(&status))
        });
        // What leads on happens more often than what ends it.
        let forward: Vec<_> = events
            .iter()
            .filter(|e| !e.kind().contains("fail") && !e.kind().contains("cancel"))
            .cloned()
            .collect();
        if !forward.is_empty() && choose(10) != 0 {
            events = forward;
        }
        let count = u32::try_from(events.len()).ok().filter(|n| *n > 0)?;
        let event = events.swap_remove(choose(count) as usize);
        let subject = Subject::Deployment(self.name.clone(), instance.environment, id);
        let happened = step(position, subject, folded, |s| deployment::decide(s, event));
        if folded
            .state
            .as_ref()
            .is_some_and(|s| s.status == Status::Deleted)
        {
            self.active.swap_remove(which);
        }
        happened
    }

    fn build(
        &mut self,
        position: &mut u64,
        number: u64,
        choose: &mut dyn FnMut(u32) -> u32,
    ) -> Option<Happened> {
        let id = samples::build_id(number / 2);
        if self.builds.len() > 64 && !self.builds.contains_key(&id) {
            // Ended builds are forgotten here; their ids are never used again.
            self.builds
                .retain(|_, b| b.state.as_ref().is_some_and(|s| !s.status.is_final()));
        }
        let folded = self.builds.entry(id).or_default();
        let attempt = folded.state.as_ref().map_or(0, |b| b.attempt);
        let waits = |b: &Build| b.status == build::BuildStatus::Requested;
        let begun = if folded.state.as_ref().is_some_and(waits) {
            0
        } else {
            attempt
        };
        let mut events = samples::build_events(number / 2);
        let mut event = events.swap_remove(choose(7) as usize);
        match &mut event {
            BuildEvent::Requested(e) => e.project = self.name.clone(),
            BuildEvent::Started(e) => e.attempt = attempt + 1,
            BuildEvent::BuilderStarted(e) => e.attempt = attempt,
            BuildEvent::PushStarted(e) => e.attempt = attempt,
            BuildEvent::Succeeded(e) => e.attempt = attempt,
            BuildEvent::Failed(e) => e.attempt = begun,
            BuildEvent::Cancelled(e) => e.attempt = begun,
        }
        let subject = Subject::Build(self.name.clone(), id);
        step(position, subject, folded, |s| build::decide(s, event))
    }

    fn commit(
        &mut self,
        position: &mut u64,
        instance: &InstanceRef,
        deployment: DeploymentId,
        choose: &mut dyn FnMut(u32) -> u32,
    ) -> Option<Happened> {
        let service = instance.service.clone();
        let change = match choose(4) {
            0 => Change::Scale {
                service,
                deployment,
                replicas: choose(3),
            },
            1 => Change::Remove {
                service,
                deployment,
            },
            _ => Change::Deploy {
                service,
                deployment,
                from: None,
            },
        };
        let commit = samples::committed(instance, deployment, *position, change);
        let subject = Subject::Gitops(self.name.clone());
        step(position, subject, &mut self.gitops, |s| {
            gitops::decide(s, GitopsEvent::Committed(Box::new(commit)))
        })
    }

    fn route(
        &mut self,
        position: &mut u64,
        target: Target,
        choose: &mut dyn FnMut(u32) -> u32,
    ) -> Option<Happened> {
        let hostnames = samples::hostnames(&target.instance, target.deployment);
        let table = self.routing.state.as_ref().map_or(0, |r| r.table);
        let command = match choose(10) {
            // What is being removed has no traffic left.
            _ if target.status > Status::Starting => Command::Withdraw {
                deployment: target.deployment,
                instance: target.instance,
                heir: None,
            },
            0..=2 => Command::Assign {
                take_over: choose(4) != 0,
                target,
                hostnames,
            },
            3 => Command::MarkMain {
                target,
                hostnames,
                expected_main: None,
                note: None,
            },
            4 => Command::Rollback {
                target,
                hostnames,
                note: Some("back".to_owned()),
            },
            6 => Command::Compensate {
                table: table.saturating_sub(choose(2)),
                note: "a gateway refused it".to_owned(),
            },
            7 => Command::ReportRejected(routing::Rejected {
                gateway: "oslo".to_owned(),
                table,
                code: "port_in_use".to_owned(),
                message: format!("port {} is taken", 7000 + choose(3)),
            }),
            _ => Command::ReportApplied(routing::Applied {
                gateway: "berlin".to_owned(),
                table,
                hostnames: Vec::new(),
                addresses: match choose(3) {
                    0 => None,
                    n => Some(vec![routing::GatewayAddress::Ip(
                        [203, 0, 113, n as u8].into(),
                    )]),
                },
                ingresses: (choose(4) == 0)
                    .then(|| routing::Ingresses::Unread(format!("said {}", choose(2)))),
            }),
        };
        let subject = Subject::Routing(self.name.clone());
        step(position, subject, &mut self.routing, |s| {
            routing::decide(s, command)
        })
    }
}
