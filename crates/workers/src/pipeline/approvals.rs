//! Holds deployments whose environment asks for approvals, until their plan is allowed.
//!
//! Everything that a plan depends on wakes a worker here, which makes the plan anew: from the
//! environment, the route table, the GitOps repository. If it is another one, what was granted is
//! void. It is made anew once more right before the commit.

use async_trait::async_trait;
use daybook_events::approval::{Approval, ApprovalRequested, ApprovalRule, ApprovalsVoided, Plan};
use daybook_events::deployment::{Deployment, DeploymentEvent, Status};
use daybook_events::routing::Hostnames;
use daybook_events::{AggregateKind, DeploymentId, Digest, EventId, Subject, SubjectFilter};
use daybook_projections::DeploymentRow;

use super::{Bench, Stop, give_up, outcome, settle};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::StepError;

const ROLE: &str = "approvals";

/// The kinds of aggregates, beside the deployment's own, that a plan depends on.
pub const CAUSES: [AggregateKind; 3] = [
    AggregateKind::Environment,
    AggregateKind::Gitops,
    AggregateKind::Routing,
];

/// Follows what people decide.
#[derive(Debug)]
pub struct Decisions(pub Bench);

/// Follows what plans depend on.
#[derive(Debug)]
pub struct Plans(pub Bench, pub AggregateKind);

#[async_trait]
impl Worker for Decisions {
    fn name(&self) -> String {
        ROLE.into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.approval_requested.v1"
                | "deployment.approval_granted.v1"
                | "deployment.approval_rejected.v1"
                | "deployment.emergency_override.v1"
                | "deployment.approvals_voided.v1"
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        settle(&self.0, ROLE, id, step(&self.0, id).await).await
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        give_up(&self.0, ROLE, a, why).await
    }
}

#[async_trait]
impl Worker for Plans {
    fn name(&self) -> String {
        format!("{ROLE}-{}", self.1.as_str())
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(self.1)
    }
    fn wants(&self, kind: &str) -> bool {
        !matches!(kind, "routing.applied.v1" | "routing.rejected.v1")
    }
    fn key(&self, subject: &Subject) -> String {
        subject
            .project()
            .map_or_else(String::new, ToString::to_string)
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        outcome(self.look_again(a).await)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        // It is made anew before the commit in any case.
        tracing::warn!(subject = %a.subject, %why, "plans were not made anew");
        Outcome::Done
    }
}

impl Plans {
    async fn look_again(&self, a: &Activation) -> Result<(), Stop> {
        let Some(project) = a.subject.project() else {
            return Ok(());
        };
        for id in self.0.ledger.projections().undecided(project)? {
            match step(&self.0, id).await {
                Ok(()) | Err(Stop::Moved(_)) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }
}

/// Takes a deployment that waits a step further, if there is one to take.
async fn step(bench: &Bench, id: DeploymentId) -> Result<(), Stop> {
    let Some(row) = bench.row(id)? else {
        return Ok(());
    };
    let (Status::AwaitingApproval, Some(approval)) = (row.state.status, &row.state.approval) else {
        return Ok(());
    };
    if let Some(rejected) = &approval.rejected {
        return Err(Stop::Fail(StepError::fatal(
            "approval_rejected",
            format!("{} rejected it: {}", rejected.approver, rejected.reason),
            "settle that with them, and deploy again",
        )));
    }
    let rendered = approval.plan.rendered();
    if !plan_holds(bench, &row, approval, rendered.as_ref()).await? || !approval.is_enough() {
        return Ok(());
    }
    let text = if approval.is_overridden() {
        "goes on in an emergency"
    } else {
        "its plan is allowed"
    };
    bench.say(id, None, text).await;
    let event = DeploymentEvent::Approved(approval.approved());
    bench
        .advance(ROLE, &row, "approved", event)
        .await
        .map(|_| ())
}

/// Whether the plan of a deployment that is about to be committed is allowed, or needs no approval.
/// Where it is not, it is asked for. `rendered` is the digest of what would be committed of a chart.
pub(super) async fn is_allowed(
    bench: &Bench,
    row: &DeploymentRow,
    rendered: Option<&Digest>,
) -> Result<bool, Stop> {
    if let Some(approval) = &row.state.approval {
        let before = approval.plan.rendered();
        if let (Some(before), Some(now)) = (&before, rendered)
            && before != now
        {
            return Err(Stop::Fail(otherwise(before, now)));
        }
        return plan_holds(bench, row, approval, rendered).await;
    }
    let instance = &row.state.request.instance;
    let projections = bench.ledger.projections();
    let environment = projections.environment(&instance.project, &instance.environment)?;
    let Some(rule) = environment.and_then(|e| e.spec.approval) else {
        return Ok(true);
    };
    let Some(plan) = plan(bench, row, &rule, rendered)? else {
        return Ok(true);
    };
    // Who asked may not allow it: without that name nobody is asked.
    let requester = super::actor_at(bench, row.created).await?.id;
    let now = jiff::Timestamp::now();
    let expires = rule.expires.duration();
    let hash = plan.hash();
    bench
        .say(
            row.id,
            None,
            format!("waits for {} approvals of its plan {hash}", rule.required),
        )
        .await;
    let event = DeploymentEvent::ApprovalRequested(Box::new(ApprovalRequested {
        hash,
        requester,
        author: row.state.source.as_ref().map(|s| s.author_email.clone()),
        expires: expires.and_then(|keep| now.checked_add(keep).ok()),
        nonce: EventId::derived(row.state.status_event.0, "approval expired"),
        plan,
    }));
    bench
        .advance(ROLE, row, "approval_requested", event)
        .await?;
    Ok(false)
}

/// What is rendered of a chart is not what its plan names. It is not asked for anew: that would be another
/// one each time.
fn otherwise(before: &Digest, now: &Digest) -> StepError {
    StepError::fatal(
        "chart_not_deterministic",
        format!(
            "what is rendered of the chart is {now} now, and its plan is about {before}: the chart makes \
             something else each time, or helm is another one"
        ),
        "give the chart in `run.chart_values` of the service what it makes up itself (often passwords \
         and certificates), and deploy again",
    )
}

/// Whether a plan is still what it was. If it is not, that is recorded.
async fn plan_holds(
    bench: &Bench,
    row: &DeploymentRow,
    approval: &Approval,
    rendered: Option<&Digest>,
) -> Result<bool, Stop> {
    let Some(plan) = plan(bench, row, &approval.plan.rule, rendered)? else {
        return Ok(false);
    };
    let hash = plan.hash();
    if hash == approval.hash {
        return Ok(true);
    }
    let voided = approval.approved().approvers;
    let text = format!(
        "its plan is {hash} by now; {} approvals are void",
        voided.len()
    );
    bench.say(row.id, None, text).await;
    let event = DeploymentEvent::ApprovalsVoided(Box::new(ApprovalsVoided {
        plan,
        hash: hash.clone(),
        was: approval.hash.clone(),
        voided,
    }));
    let step = format!("plan {hash}");
    bench.advance(ROLE, row, &step, event).await?;
    Ok(false)
}

/// The plan of a deployment as the world is now, under the rule that its environment has, or had.
fn plan(
    bench: &Bench,
    row: &DeploymentRow,
    rule: &ApprovalRule,
    rendered: Option<&Digest>,
) -> Result<Option<Plan>, Stop> {
    let instance = &row.state.request.instance;
    let projections = bench.ledger.projections();
    let environment = projections.environment(&instance.project, &instance.environment)?;
    let spec = environment.map(|e| e.spec).unwrap_or_default();
    let routing = projections.routing(&instance.project)?;
    let gitops = projections.gitops(&instance.project)?;
    let main = routing.as_ref().and_then(|r| r.traffic(instance)?.main);
    let main = main.filter(|main| *main != row.id);
    let main = match main {
        Some(id) => bench.row(id)?,
        None => None,
    };
    let main: Option<(DeploymentId, &Deployment)> = main.as_ref().map(|m| (m.id, &m.state));
    let hostnames = Hostnames::under(&bench.settings.domain, instance, row.id, spec.live);
    let hostnames = hostnames.map_err(|e| {
        let remedy = "use a shorter domain for this server";
        Stop::Fail(StepError::fatal(e.code, e.to_string(), remedy))
    })?;
    let rule = spec.approval.as_ref().unwrap_or(rule);
    let routing = routing.as_ref();
    let plan = Plan::of(&row.state, rule, main, routing, gitops.as_ref(), &hostnames);
    let plan = plan.map(|plan| match rendered {
        Some(objects) => plan.with_rendered(objects),
        None => plan,
    });
    // What is hashed is what is recorded.
    Ok(plan.map(|plan| bench.masked(&row.subject, plan)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use daybook_events::memory::MemoryLog;
    use daybook_events::timer::KeepFor;
    use daybook_events::{Hostname, Position};
    use daybook_projections::{Ledger, Projections};
    use daybook_store::embedded::{EmbeddedLines, LineRetention};

    use super::super::{Bench, Settings, Stop, actor_at};

    #[tokio::test]
    async fn it_is_waited_for_who_asked_and_never_taken_for_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let lines = EmbeddedLines::open(dir.path(), LineRetention::default());
        let bench = Bench {
            ledger: Ledger::new(Arc::new(MemoryLog::new()), Projections::in_memory()),
            lines: Arc::new(lines.await.unwrap()),
            secrets: Arc::new(daybook_secrets::NoSecrets),
            settings: Arc::new(Settings {
                worker: "test".to_owned(),
                domain: Hostname::parse("localhost").unwrap(),
                image_prefix: "registry.example".to_owned(),
                scratch: dir.path().join("scratch"),
                gateway_url: None,
                builds: 1,
                keep_old: KeepFor::Never,
            }),
        };
        let found = actor_at(&bench, Position(7)).await;
        assert!(matches!(found, Err(Stop::Retry(_))), "{found:?}");
    }
}
