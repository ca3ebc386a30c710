//! Who allows what, when nothing is deployed, who asks, and how well it all goes.

use async_graphql::{Context, ID, InputObject, Json, Object, Result, SimpleObject};
use axum::extract::State as Held;
use axum::http::StatusCode;
use daybook_events::access::Projects;
use daybook_events::approval;
use daybook_events::freeze::FreezeRule;
use daybook_events::template::Template as Definition;
use daybook_events::{Digest, EnvironmentName, FreezeName, TemplateName};
use daybook_projections::dora::{Delivery, Spread};
use jiff::Timestamp;

use super::asked::{asked, caller};
use super::deploy_run::{DeployRun, word};
use super::mutation::as_it_is;
use super::objects::LogPosition;
use super::query::project_name;
use crate::access::AccessMode;
use crate::catalogue::Shelf;
use crate::commands::Verdict;
use crate::extract::{Command, Named, NoParams, Params, deployment_id};
use crate::problem::Problem;
use crate::routes::approvals::{self, ApprovalDetail, ApprovalQuery};
use crate::routes::deployments::Why;
use crate::routes::dora::{self, DoraQuery};
use crate::routes::freezes::{self, DefineFreeze};
use crate::view::FreezeView;

/// Who has allowed something, or looked at it.
#[derive(Debug, SimpleObject)]
pub(crate) struct ApprovalGrant {
    /// Who.
    approver: String,
    /// When.
    at: Timestamp,
    /// Why, in their words.
    reason: Option<String>,
}

impl From<approval::Grant> for ApprovalGrant {
    fn from(grant: approval::Grant) -> Self {
        Self {
            approver: grant.approver,
            at: grant.at,
            reason: grant.reason,
        }
    }
}

/// Who has not allowed something.
#[derive(Debug, SimpleObject)]
pub(crate) struct Rejection {
    /// Who.
    approver: String,
    /// Why.
    reason: String,
}

/// Who went ahead all the same, and who looked at that later.
#[derive(Debug, SimpleObject)]
pub(crate) struct Emergency {
    /// Who went ahead.
    by: String,
    /// Why.
    reason: String,
    /// When.
    at: Timestamp,
    /// Who looked at it.
    review: Option<ApprovalGrant>,
}

impl From<approval::Emergency> for Emergency {
    fn from(emergency: approval::Emergency) -> Self {
        Self {
            by: emergency.by,
            reason: emergency.reason,
            at: emergency.at,
            review: emergency.review.map(Into::into),
        }
    }
}

/// The plan of a deployment, and who has allowed it.
#[derive(Debug, SimpleObject)]
pub(crate) struct Approval {
    /// The deployment.
    id: ID,
    /// `project.environment.service`.
    instance_id: ID,
    /// Exactly where the deployment is.
    state: String,
    /// The hash that names the plan: what is granted is granted to it.
    hash: String,
    /// Exactly what will be made so.
    plan: Json<serde_json::Value>,
    /// Who asked for the deployment.
    requester: String,
    /// Who wrote the commit of the source.
    author: Option<String>,
    /// Since when it is asked for.
    since: Timestamp,
    /// When it is too late; null for never.
    expires: Option<Timestamp>,
    /// Who has allowed this plan.
    grants: Vec<ApprovalGrant>,
    /// Who has not.
    rejected: Option<Rejection>,
    /// Who went ahead without.
    emergency: Option<Emergency>,
    /// Whether it waits to be allowed.
    waits: bool,
    /// Whether an emergency waits to be reviewed.
    to_review: bool,
}

impl From<ApprovalDetail> for Approval {
    fn from(detail: ApprovalDetail) -> Self {
        Self {
            id: detail.id.to_string().into(),
            instance_id: detail.instance_id.into(),
            state: detail.state.as_str().to_owned(),
            hash: detail.hash.to_string(),
            plan: Json(serde_json::to_value(&detail.plan).unwrap_or_default()),
            requester: detail.requester,
            author: detail.author,
            since: detail.since,
            expires: detail.expires,
            grants: detail.grants.into_iter().map(Into::into).collect(),
            rejected: detail.rejected.map(|r| Rejection {
                approver: r.approver,
                reason: r.reason,
            }),
            emergency: detail.emergency.map(Into::into),
            waits: detail.waits,
            to_review: detail.to_review,
        }
    }
}

/// A deployment that somebody let through a freeze, which nobody has reviewed yet.
#[derive(Debug, SimpleObject)]
pub(crate) struct LetThrough {
    /// The deployment.
    id: ID,
    /// `project.environment.service`.
    instance_id: ID,
    /// The window that held it.
    freeze: String,
    /// Who let it through, and why.
    emergency: Emergency,
}

/// What waits to be allowed or to be reviewed.
#[derive(Debug, SimpleObject)]
pub(crate) struct Approvals {
    /// Plans, newest first.
    #[graphql(complexity = "super::limits::many(10, child_complexity)")]
    approvals: Vec<Approval>,
    /// What was let through a freeze in an emergency, newest first.
    #[graphql(complexity = "super::limits::many(4, child_complexity)")]
    let_through: Vec<LetThrough>,
}

/// A window in which an environment is frozen.
#[derive(Debug, SimpleObject)]
pub(crate) struct Freeze {
    /// Its name.
    name: String,
    /// When, in words.
    when: String,
    /// When, as it was given.
    rule: Json<serde_json::Value>,
    /// Why.
    reason: Option<String>,
    /// Whether it is open now.
    open: bool,
    /// When it began, or begins next; null if it is over.
    from: Option<Timestamp>,
    /// When it ends then; null if it does not end by itself.
    until: Option<Timestamp>,
}

impl From<FreezeView> for Freeze {
    fn from(view: FreezeView) -> Self {
        Self {
            name: view.name.to_string(),
            when: view.when,
            rule: Json(serde_json::to_value(&view.rule).unwrap_or_default()),
            reason: view.reason,
            open: view.open,
            from: view.from,
            until: view.until,
        }
    }
}

/// A role, and where it holds.
#[derive(Debug, SimpleObject)]
pub(crate) struct RoleGrant {
    /// `viewer`, `deployer`, `approver`, `auditor` or `admin`.
    role: String,
    /// The projects; null for all.
    projects: Option<Vec<String>>,
}

/// Who asks, and what they may do.
#[derive(Debug, SimpleObject)]
pub(crate) struct WhoAmI {
    /// Whether this server asks everybody for a credential: `required` or `open`.
    authentication: &'static str,
    /// Who events will say it was.
    actor: String,
    /// How that is known: `api_key`, `unauthenticated`, …
    actor_kind: String,
    /// What may be done.
    grants: Vec<RoleGrant>,
}

/// How long something took, in milliseconds; each value is one that was measured (nearest rank).
#[derive(Debug, SimpleObject)]
pub(crate) struct Durations {
    /// How many were measured.
    samples: u64,
    /// The middle one; the lower one of two.
    median_ms: Option<i64>,
    /// Nine of ten took no longer.
    p90_ms: Option<i64>,
}

impl From<&Spread> for Durations {
    fn from(spread: &Spread) -> Self {
        Self {
            samples: spread.samples,
            median_ms: spread.median_ms,
            p90_ms: spread.p90_ms,
        }
    }
}

/// The measures of one service instance.
#[derive(Debug)]
pub(crate) struct Deliveries(Delivery);

/// The measures of one service instance.
#[Object]
impl Deliveries {
    /// `project.environment.service`.
    async fn instance_id(&self) -> ID {
        self.0.instance_id.clone().into()
    }

    /// Deployments that got the traffic.
    async fn deployments(&self) -> u64 {
        self.0.deployments
    }

    /// The same, for each day of the period.
    async fn deployments_per_day(&self) -> f64 {
        self.0.deployments_per_day
    }

    /// From the commit to the traffic.
    async fn lead_time(&self) -> Durations {
        (&self.0.lead_time).into()
    }

    /// Deployments of the period from which a rollback took the traffic.
    async fn failed_changes(&self) -> u64 {
        self.0.failed_changes
    }

    /// Their share; null if there was no deployment.
    async fn change_failure_rate(&self) -> Option<f64> {
        self.0.change_failure_rate
    }

    /// From when a failed change got the traffic until it was taken from it.
    async fn time_to_restore(&self) -> Durations {
        (&self.0.time_to_restore).into()
    }

    /// Deployments that ended before they got the traffic.
    async fn failed_before(&self) -> u64 {
        self.0.failed_before
    }

    /// The events that all this was counted from.
    async fn counted(&self, ctx: &Context<'_>) -> Result<Json<serde_json::Value>> {
        let counted = &self.0.counted;
        let events = counted.deployments.len() + counted.lead_times.len();
        asked(ctx).lists(events + counted.restores.len() + counted.failed_before.len())?;
        Ok(Json(serde_json::to_value(counted).unwrap_or_default()))
    }
}

/// The measures of software delivery in a period.
#[derive(Debug, SimpleObject)]
pub(crate) struct Dora {
    /// From this time on.
    from: Timestamp,
    /// Before this time.
    until: Timestamp,
    /// One for each service instance of which anything was counted.
    #[graphql(complexity = "super::limits::many(20, child_complexity)")]
    instances: Vec<Deliveries>,
    /// Events up to here were counted.
    position: LogPosition,
}

/// An entry of the catalogue.
#[derive(Debug, SimpleObject)]
pub(crate) struct Template {
    /// Its name.
    name: String,
    /// Its version.
    version: String,
    /// The digest that names exactly this entry.
    digest: String,
    /// What it makes.
    description: String,
    /// Where it comes from.
    shelf: String,
    /// The entry, with its parameters.
    definition: Json<serde_json::Value>,
}

impl Template {
    fn new((shelf, template): (Shelf, &Definition)) -> Self {
        Self {
            name: template.name.to_string(),
            version: template.version.to_string(),
            digest: template.digest().to_string(),
            description: template.description.clone(),
            shelf: word(shelf),
            definition: Json(serde_json::to_value(template).unwrap_or_default()),
        }
    }
}

/// What can be asked of approvals, freezes, templates and deliveries.
#[derive(Debug, Default)]
pub(crate) struct Overseeing;

/// What can be asked of approvals, freezes, templates and deliveries.
#[Object]
impl Overseeing {
    /// Who asks, and what they may do.
    async fn whoami(&self, ctx: &Context<'_>) -> WhoAmI {
        let asked = asked(ctx);
        let grants = asked.principal.grants().iter().map(|grant| RoleGrant {
            role: grant.role.as_str().to_owned(),
            projects: match &grant.projects {
                Projects::All => None,
                Projects::Named(names) => Some(names.iter().map(ToString::to_string).collect()),
            },
        });
        WhoAmI {
            authentication: match asked.state.access.mode() {
                AccessMode::Open => "open",
                AccessMode::Required => "required",
            },
            actor: asked.actor.id.clone(),
            actor_kind: asked.actor.kind.clone(),
            grants: grants.collect(),
        }
    }

    /// What waits to be allowed, and emergencies that wait to be reviewed.
    async fn approvals(
        &self,
        ctx: &Context<'_>,
        project_id: Option<ID>,
        environment: Option<String>,
    ) -> Result<Approvals> {
        let asked = asked(ctx);
        let query = ApprovalQuery {
            project: project_id.map(String::from),
            environment,
        };
        let (held, principal) = (Held(asked.state.clone()), asked.principal.clone());
        let listed = approvals::list_approvals(held, principal, Params(query)).await?;
        let list = listed.into_body();
        asked.lists(list.approvals.len() + list.let_through.len())?;
        let let_through = list.let_through.into_iter().map(|l| LetThrough {
            id: l.id.to_string().into(),
            instance_id: l.instance_id.into(),
            freeze: l.freeze.to_string(),
            emergency: l.emergency.into(),
        });
        Ok(Approvals {
            approvals: list.approvals.into_iter().map(Into::into).collect(),
            let_through: let_through.collect(),
        })
    }

    /// The plan of a deployment, and who has allowed it.
    async fn approval(&self, ctx: &Context<'_>, id: ID) -> Result<Option<Approval>> {
        let row = asked(ctx).deployment(deployment_id(&id)?)?;
        Ok(Some(approvals::detail(&row)?.into()))
    }

    /// The windows in which an environment is frozen, by name.
    #[graphql(complexity = "super::limits::many(5, child_complexity)")]
    async fn freezes(
        &self,
        ctx: &Context<'_>,
        project_id: ID,
        environment: String,
    ) -> Result<Vec<Freeze>> {
        let asked = asked(ctx);
        let project = project_name(project_id)?;
        asked.may_read(&project)?;
        let environment = EnvironmentName::parse(environment).map_err(Problem::from)?;
        let names = Named((project, environment));
        let held = Held(asked.state.clone());
        let listed = freezes::list_freezes(held, names, Params(NoParams {})).await?;
        let freezes = listed.into_body().freezes;
        asked.lists(freezes.len())?;
        Ok(freezes.into_iter().map(Into::into).collect())
    }

    /// The templates of the catalogue, by name.
    #[graphql(complexity = "super::limits::many(20, child_complexity)")]
    async fn templates(&self, ctx: &Context<'_>) -> Result<Vec<Template>> {
        let asked = asked(ctx);
        let entries = asked.state.settings.catalogue.entries();
        let templates: Vec<_> = entries.map(Template::new).collect();
        asked.lists(templates.len())?;
        Ok(templates)
    }

    /// One template.
    async fn template(&self, ctx: &Context<'_>, name: String) -> Result<Option<Template>> {
        let name = TemplateName::parse(name).map_err(Problem::from)?;
        let found = asked(ctx).state.settings.catalogue.find(&name);
        Ok(Some(Template::new(found.map_err(Problem::from)?)))
    }

    /// Deployment frequency, lead time, change failure rate and time to restore of each service
    /// instance: of the thirty days before `until`, or of those from `from` on.
    #[graphql(complexity = "super::limits::search(None, child_complexity)")]
    async fn dora(
        &self,
        ctx: &Context<'_>,
        project_id: Option<ID>,
        environment: Option<String>,
        service: Option<String>,
        from: Option<String>,
        until: Option<String>,
    ) -> Result<Option<Dora>> {
        let asked = asked(ctx);
        let query = DoraQuery {
            project: project_id.map(String::from),
            environment,
            service,
            from,
            until,
        };
        let (held, principal) = (Held(asked.state.clone()), asked.principal.clone());
        let measured = dora::get_dora(held, principal, Params(query)).await?;
        let view = measured.into_body();
        asked.lists(view.instances.len())?;
        Ok(Some(Dora {
            from: view.from,
            until: view.until,
            instances: view.instances.into_iter().map(Deliveries).collect(),
            position: view.position.into(),
        }))
    }
}

/// A window in which an environment is to be frozen.
#[derive(Debug, InputObject)]
pub(crate) struct SetFreezeInput {
    /// The project.
    project_id: ID,
    /// The environment.
    environment: String,
    /// The window's name.
    name: String,
    /// When, as REST takes it (`FreezeRule` of `/openapi.json`).
    rule: Json<serde_json::Value>,
    /// Why, for those who have to wait.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// The arguments that every decision about a deployment has.
struct Decided {
    id: ID,
    reason: Option<String>,
    key: Option<String>,
}

async fn decide(ctx: &Context<'_>, verdict: Verdict, on: Decided) -> Result<DeployRun> {
    let id = deployment_id(&on.id)?;
    let caller = caller(ctx, on.key.as_deref())?;
    let commands = &asked(ctx).state.commands;
    let decided = commands.decide_approval(&caller, id, verdict, on.reason);
    decided.await.map_err(Problem::from)?;
    as_it_is(ctx, id)
}

fn hash(text: String) -> Result<Digest, Problem> {
    Ok(Digest::parse(text)?)
}

/// What can be decided about deployments, and when there are none.
#[derive(Debug, Default)]
pub(crate) struct Governing;

/// What can be decided about deployments, and when there are none.
#[Object]
impl Governing {
    /// Allows a plan, which its hash names. Neither who asked for the deployment nor who wrote its
    /// commit can.
    async fn approve_deployment(
        &self,
        ctx: &Context<'_>,
        id: ID,
        hash: String,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let key = idempotency_key;
        let verdict = Verdict::Approve(self::hash(hash)?);
        decide(ctx, verdict, Decided { id, reason, key }).await
    }

    /// Does not allow a plan. Its deployment fails, with who and why.
    async fn reject_deployment(
        &self,
        ctx: &Context<'_>,
        id: ID,
        reason: String,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let (reason, key) = (Some(reason), idempotency_key);
        decide(ctx, Verdict::Reject, Decided { id, reason, key }).await
    }

    /// Goes ahead with a plan without approvals, because it cannot wait. Somebody else has to
    /// review that later.
    async fn override_approval(
        &self,
        ctx: &Context<'_>,
        id: ID,
        hash: String,
        reason: String,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let (reason, key) = (Some(reason), idempotency_key);
        let verdict = Verdict::Override(self::hash(hash)?);
        decide(ctx, verdict, Decided { id, reason, key }).await
    }

    /// Says that what was done in an emergency was looked at.
    async fn review_deployment(
        &self,
        ctx: &Context<'_>,
        id: ID,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let key = idempotency_key;
        decide(ctx, Verdict::Review, Decided { id, reason, key }).await
    }

    /// Lets a deployment through the freeze that holds it, because it cannot wait. Somebody else
    /// has to review that later.
    async fn override_freeze(
        &self,
        ctx: &Context<'_>,
        id: ID,
        reason: String,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let id = deployment_id(&id)?;
        let caller = caller(ctx, idempotency_key.as_deref())?;
        let commands = &asked(ctx).state.commands;
        let done = commands.override_freeze(&caller, id, Some(reason)).await;
        done.map_err(Problem::from)?;
        as_it_is(ctx, id)
    }

    /// Gives an environment a window in which it is frozen, or another one of that name. What is
    /// deployed to it while one is open waits for its end.
    async fn set_freeze(&self, ctx: &Context<'_>, input: SetFreezeInput) -> Result<Freeze> {
        let rule: FreezeRule = serde_json::from_value(input.rule.0).map_err(|e| {
            Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid_body",
                format!("the rule does not fit: {e}"),
                "/openapi.json says what a FreezeRule looks like",
            )
        })?;
        let environment = EnvironmentName::parse(input.environment).map_err(Problem::from)?;
        let name = FreezeName::parse(input.name).map_err(Problem::from)?;
        let names = Named((project_name(input.project_id)?, environment, name));
        let command = Command {
            caller: caller(ctx, input.idempotency_key.as_deref())?,
            body: DefineFreeze {
                rule,
                reason: input.reason,
            },
        };
        let held = Held(asked(ctx).state.clone());
        let set = freezes::set_freeze(held, names, Params(NoParams {}), command).await?;
        Ok(set.into_body().into())
    }

    /// Takes a window away, and answers with its name. What waits for its end goes on.
    async fn remove_freeze(
        &self,
        ctx: &Context<'_>,
        project_id: ID,
        environment: String,
        name: String,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<ID> {
        let environment = EnvironmentName::parse(environment).map_err(Problem::from)?;
        let name = FreezeName::parse(name).map_err(Problem::from)?;
        let names = Named((project_name(project_id)?, environment, name));
        let command = Command {
            caller: caller(ctx, idempotency_key.as_deref())?,
            body: Why { reason },
        };
        let held = Held(asked(ctx).state.clone());
        let gone = freezes::remove_freeze(held, names, Params(NoParams {}), command).await?;
        Ok(gone.into_body().name.to_string().into())
    }
}
