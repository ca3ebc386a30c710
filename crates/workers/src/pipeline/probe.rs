//! Asks the public addresses, as a user would: through the gateway, by host name.
//!
//! Workload readiness says that instances run; endpoint readiness says that *this* deployment
//! answers where users are. The two are separate, and so are the workers that find out.

use std::time::Duration;

use async_trait::async_trait;
use daybook_events::deployment::{
    self, Deployment, DeploymentEvent, EndpointObserved, OpenapiFound, Status,
};
use daybook_events::routing::{Routing, Stickiness};
use daybook_events::{
    Actor, AggregateKind, Context, DeploymentId, Digest, EventId, Hostname, Subject, SubjectFilter,
};
use daybook_projections::DeploymentRow;
use jiff::Timestamp;
use reqwest::header::HOST;
use uuid::Uuid;

use super::{Bench, Stop};
use crate::driver::{Activation, Outcome, Worker};

const ROLE: &str = "probe";

/// Largest OpenAPI document that is looked at, in bytes.
const OPENAPI_MAX: usize = 1024 * 1024;

/// Woken when a gateway has applied routes.
#[derive(Debug)]
pub struct ProbeRoutes(pub Probe);

/// Woken when a deployment's workload changes.
#[derive(Debug)]
pub struct ProbeDeployment(pub Probe);

/// How addresses are asked.
#[derive(Debug, Clone)]
pub struct Probe {
    bench: Bench,
    client: reqwest::Client,
    /// Where the gateway answers from here: `http://127.0.0.1:8080`.
    gateway: String,
}

impl Probe {
    /// A probe that asks through the gateway at this URL.
    pub fn new(bench: Bench, gateway: String) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(5))
            .build()?;
        Ok(Self {
            bench,
            client,
            gateway: gateway.trim_end_matches('/').to_owned(),
        })
    }
}

#[async_trait]
impl Worker for ProbeRoutes {
    fn name(&self) -> String {
        "probe-routes".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Routing)
    }
    fn wants(&self, kind: &str) -> bool {
        kind == "routing.applied.v1"
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Some(project) = a.subject.project() else {
            return Outcome::Done;
        };
        let result = async {
            let applied = match a.event.payload::<daybook_events::routing::RoutingEvent>() {
                Ok(daybook_events::routing::RoutingEvent::Applied(applied)) => applied,
                _ => return Ok(true),
            };
            let routing = self
                .0
                .bench
                .ledger
                .projections()
                .folded::<Routing>(&Subject::Routing(project.clone()))?
                .state
                .unwrap_or_default();
            let mut all_ready = true;
            for hostname in &applied.hostnames {
                let Some(route) = routing.routes.get(hostname) else {
                    continue;
                };
                for backend in &route.backends {
                    let id = backend.deployment;
                    let looked = self.0.look(id, hostname, route.stickiness);
                    let bench = &self.0.bench;
                    let traced = bench.in_its_own_trace(ROLE, id, &a.event, looked);
                    all_ready &= Box::pin(traced).await?;
                }
            }
            Ok(all_ready)
        }
        .await;
        conclude(result, a)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::warn!(subject = %a.subject, %why, "addresses were not asked to the end");
        Outcome::Done
    }
}

#[async_trait]
impl Worker for ProbeDeployment {
    fn name(&self) -> String {
        "probe-deployment".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.workload_observed.v1"
                | "deployment.succeeded.v1"
                | "deployment.partially_succeeded.v1"
                | "deployment.started.v1"
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(project, _, id) = &a.subject else {
            return Outcome::Done;
        };
        let result = async {
            let Some(row) = self.0.bench.row(*id)? else {
                return Ok(true);
            };
            if !matches!(row.state.status, Status::Started | Status::PartiallyStarted) {
                return Ok(true);
            }
            let routing = self
                .0
                .bench
                .ledger
                .projections()
                .folded::<Routing>(&Subject::Routing(project.clone()))?
                .state
                .unwrap_or_default();
            let mut all_ready = true;
            for (hostname, route) in routing.hostnames_of(*id) {
                all_ready &= self.0.look(*id, hostname, route.stickiness).await?;
            }
            // Unreachable because it does not run is no reason to ask again: its next change is.
            Ok(all_ready || !row.state.workload_is_ready())
        }
        .await;
        conclude(result, a)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::warn!(subject = %a.subject, %why, "addresses were not asked to the end");
        Outcome::Done
    }
}

/// An address that did not answer is asked a few times more, in case it is only late.
fn conclude(result: Result<bool, Stop>, a: &Activation) -> Outcome {
    match result {
        Ok(true) | Err(Stop::Moved(_)) => Outcome::Done,
        Ok(false) if a.attempt >= 6 => Outcome::Done,
        Ok(false) => Outcome::Wait(Duration::from_millis(250 << a.attempt.min(5))),
        Err(Stop::Retry(why)) => Outcome::Retry(why),
        Err(Stop::Fail(e)) => Outcome::Retry(e.message),
        Err(Stop::Interrupted) => Outcome::Interrupted,
    }
}

impl Probe {
    /// Asks one address, records what was seen if it is new, and says whether it is as it should.
    async fn look(
        &self,
        id: DeploymentId,
        hostname: &Hostname,
        stickiness: Stickiness,
    ) -> Result<bool, Stop> {
        let Some(row) = self.bench.row(id)? else {
            return Ok(true);
        };
        let asked = [Status::Deploying, Status::Started, Status::PartiallyStarted];
        if !asked.contains(&row.state.status) {
            return Ok(true);
        }
        let path = match row.state.request.run.health.path.as_str() {
            "" => "/",
            path => path,
        };
        let seen = self.ask(id, hostname, path).await;
        let ready = seen.ready;
        let public = match url_port(&self.gateway) {
            Some(port) => format!("http://{hostname}:{port}{path}"),
            None => format!("http://{hostname}{path}"),
        };
        let event = DeploymentEvent::EndpointObserved(EndpointObserved {
            url: public,
            ..seen
        });
        self.append(&row, event).await?;
        if ready && stickiness == Stickiness::Deployment && row.state.openapi.is_none() {
            self.scrape(&row, hostname).await?;
        }
        Ok(ready)
    }

    async fn ask(&self, id: DeploymentId, hostname: &Hostname, path: &str) -> EndpointObserved {
        let not = |http_status, message: String| EndpointObserved {
            hostname: hostname.clone(),
            url: String::new(),
            ready: false,
            http_status,
            message: Some(message),
        };
        let url = format!("{}{path}", self.gateway);
        match self
            .client
            .get(url)
            .header(HOST, hostname.as_str())
            .send()
            .await
        {
            Err(error) if error.is_timeout() => not(None, "no answer within 5 seconds".into()),
            Err(_) => not(None, "the gateway does not answer".into()),
            Ok(answer) => {
                let status = answer.status().as_u16();
                let by = answer
                    .headers()
                    .get("x-daybook-deployment")
                    .and_then(|v| v.to_str().ok())
                    .map(str::to_owned);
                match by {
                    Some(by) if by == id.to_string() && status < 500 => EndpointObserved {
                        hostname: hostname.clone(),
                        url: String::new(),
                        ready: true,
                        http_status: Some(status),
                        message: None,
                    },
                    Some(by) if by == id.to_string() => not(
                        Some(status),
                        format!("it answers with HTTP status {status}"),
                    ),
                    Some(by) => not(Some(status), format!("deployment {by} answers instead")),
                    None => not(
                        Some(status),
                        format!("the gateway has nobody to answer (HTTP status {status})"),
                    ),
                }
            }
        }
    }

    /// Looks for an API description on the deployment's own address.
    async fn scrape(&self, row: &DeploymentRow, hostname: &Hostname) -> Result<(), Stop> {
        const PATH: &str = "/openapi.json";
        let request = self
            .client
            .get(format!("{}{PATH}", self.gateway))
            .header(HOST, hostname.as_str());
        let Ok(mut answer) = request.send().await else {
            return Ok(());
        };
        if !answer.status().is_success() {
            return Ok(());
        }
        let mut body = Vec::new();
        while let Ok(Some(chunk)) = answer.chunk().await {
            if body.len() + chunk.len() > OPENAPI_MAX {
                return Ok(());
            }
            body.extend_from_slice(&chunk);
        }
        let Ok(document) = serde_json::from_slice::<serde_json::Value>(&body) else {
            return Ok(());
        };
        if document
            .get("openapi")
            .or(document.get("swagger"))
            .is_none()
        {
            return Ok(());
        }
        let text = |pointer: &str| {
            document
                .pointer(pointer)
                .and_then(serde_json::Value::as_str)
                .map(|s| s.chars().take(200).collect())
        };
        let event = DeploymentEvent::OpenapiFound(OpenapiFound {
            path: PATH.into(),
            digest: Digest::of(&body),
            title: text("/info/title"),
            version: text("/info/version"),
        });
        self.append(row, event).await
    }

    async fn append(&self, row: &DeploymentRow, event: DeploymentEvent) -> Result<(), Stop> {
        let event = self.bench.masked(&row.subject, event);
        let context = Context {
            id: EventId(Uuid::now_v7()),
            time: Timestamp::now(),
            correlation: row.id.0,
            causation: Some(row.state.status_event),
            actor: Actor::system(&format!("worker/{ROLE}")),
            traceparent: None,
            request_digest: None,
        };
        match self
            .bench
            .append::<Deployment>(&row.subject, &context, |state| {
                deployment::decide(state, event.clone())
            })
            .await
        {
            Ok(_) | Err(Stop::Moved(_)) => Ok(()),
            Err(other) => Err(other),
        }
    }
}

fn url_port(url: &str) -> Option<u16> {
    url.parse::<url::Url>().ok().and_then(|u| u.port())
}
