//! Approvals: a deployment to an environment that asks for them waits, once its plan is known, until
//! enough people have allowed exactly that plan.
//!
//! A plan is everything that will be made so: the commit of the source, the digest of the image, how
//! it will run differently from what runs now, the addresses that it takes over, and the rule that
//! it is approved under. It is named by a hash. What is granted is granted to a hash; when the plan
//! becomes another one, what was granted is void.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{At, Refusal};
use crate::deployment::{Deployment, DeploymentEvent, Failed, Status};
use crate::gitops::Gitops;
use crate::names::{CommitId, DeploymentId, Digest, EventId, Hostname, InstanceRef};
use crate::routing::{Hostnames, Routing};
use crate::spec::PinnedImage;
use crate::timer::KeepFor;

/// What an environment asks for before anything is deployed to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApprovalRule {
    /// How many people have to allow a plan: 1 to 20.
    pub required: u32,
    /// Who may; anybody if nobody is named. Never who asked for the deployment, or wrote the commit.
    #[serde(default)]
    pub approvers: BTreeSet<String>,
    /// How long a plan may wait; then the deployment fails.
    #[serde(default = "day")]
    pub expires: KeepFor,
}

fn day() -> KeepFor {
    KeepFor::IDLE
}

impl ApprovalRule {
    /// Refuses a rule that nobody could meet.
    pub fn check(&self) -> Result<(), Refusal> {
        let named: BTreeSet<_> = self.approvers.iter().map(|n| n.to_lowercase()).collect();
        let named = named.len();
        let enough = named == 0 || u32::try_from(named).is_ok_and(|n| n >= self.required);
        let sound = |name: &String| {
            (1..=200).contains(&name.len()) && !name.chars().any(|c| c.is_control())
        };
        if !(1..=20).contains(&self.required) || !enough || named > 200 {
            return Err(Refusal::new(
                "invalid_approval_rule",
                format!(
                    "{} approvals of {named} people cannot be asked for",
                    self.required
                ),
                "ask for 1 to 20 approvals, and name at least as many people, or none for anybody",
            ));
        }
        if !self.approvers.iter().all(sound) {
            return Err(Refusal::new(
                "invalid_approval_rule",
                "an approver's name is empty, too long or not printable",
                "name approvers by their account names",
            ));
        }
        Ok(())
    }
}

/// A value that will be another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ValueChange {
    /// What it is for the main deployment; none if there is no such value.
    pub before: Option<String>,
    /// What it will be.
    pub after: Option<String>,
}

/// Exactly what will be made so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// What is deployed to.
    pub instance: InstanceRef,
    /// The commit of the source; none for an image that was given.
    pub source: Option<CommitId>,
    /// The image; none for a chart, which is among `values`.
    pub image: Option<PinnedImage>,
    /// The newest commit about the environment in the GitOps repository, on which this one follows.
    pub base: Option<CommitId>,
    /// The deployment that has the traffic now.
    pub main: Option<DeploymentId>,
    /// What will be different from that one, by name: `run.replicas`, `env.LOG_LEVEL`; and the chart,
    /// different or not. Long values are named by their digest.
    pub values: BTreeMap<String, ValueChange>,
    /// The addresses that will lead to it, or can be made to, with the deployments that they lead to now.
    pub routes: BTreeMap<Hostname, Vec<DeploymentId>>,
    /// What is asked for.
    pub rule: ApprovalRule,
}

impl Plan {
    /// The plan of a deployment whose image or chart is pinned; none before. `hostnames` are those that it
    /// gets if it takes over, now or later.
    pub fn of(
        state: &Deployment,
        rule: &ApprovalRule,
        main: Option<(DeploymentId, &Deployment)>,
        routing: Option<&Routing>,
        gitops: Option<&Gitops>,
        hostnames: &Hostnames,
    ) -> Option<Self> {
        if !state.is_pinned() {
            return None;
        }
        let request = &state.request;
        let instance = request.instance.clone();
        let before = main.map_or_else(BTreeMap::new, |(_, main)| values(main));
        let after = values(state);
        let names: BTreeSet<_> = before.keys().chain(after.keys()).cloned().collect();
        let changes = names.into_iter().filter_map(|name| {
            let change = ValueChange {
                before: before.get(&name).cloned(),
                after: after.get(&name).cloned(),
            };
            let is_shown = change.before != change.after || name == CHART;
            is_shown.then_some((name, change))
        });
        // Where it does not take over by itself, somebody may move the traffic to it later.
        let none = Routing::default();
        let moving = routing.unwrap_or(&none).moving(&instance, hostnames);
        let moving = moving.into_iter().map(|(hostname, _)| hostname);
        let addresses = std::iter::once(hostnames.preview.clone()).chain(moving);
        let leads_to = |hostname: &Hostname| {
            let route = routing.and_then(|r| r.routes.get(hostname));
            let backends = route.into_iter().flat_map(|r| &r.backends);
            backends.map(|b| b.deployment).collect()
        };
        Some(Self {
            source: state.source.as_ref().map(|s| s.commit.clone()),
            image: state.image.clone(),
            base: gitops.and_then(|g| g.newest_about(&instance.environment).cloned()),
            main: main.map(|(id, _)| id),
            values: changes.collect(),
            routes: addresses
                .map(|hostname| (hostname.clone(), leads_to(&hostname)))
                .collect(),
            rule: rule.clone(),
            instance,
        })
    }

    /// The plan with the digest of what was rendered of its chart: that is what is allowed, and committed.
    pub fn with_rendered(mut self, objects: &Digest) -> Self {
        let change = ValueChange {
            before: None,
            after: Some(objects.to_string()),
        };
        self.values.insert(OBJECTS.to_owned(), change);
        self
    }

    /// The digest of what was rendered of its chart; none of an image.
    pub fn rendered(&self) -> Option<Digest> {
        let change = self.values.get(OBJECTS)?;
        Digest::parse(change.after.as_deref()?).ok()
    }

    /// The hash that names it: SHA-256 of its JSON in canonical form (RFC 8785: keys in order, no
    /// white space).
    pub fn hash(&self) -> Digest {
        // A map of `serde_json` is in the order of its keys.
        let value = serde_json::to_value(self).unwrap_or_default();
        Digest::of(value.to_string().as_bytes())
    }
}

/// The name of the chart among the values.
const CHART: &str = "chart";

/// The name of what was rendered of it.
const OBJECTS: &str = "chart.objects";

/// The longest value that is shown as it is, in bytes.
const SHOWN: usize = 120;

/// Everything that a deployment runs with, by name.
fn values(state: &Deployment) -> BTreeMap<String, String> {
    let request = &state.request;
    let run = &request.run;
    let mut all = BTreeMap::new();
    let mut set = |name: String, value: String| {
        let value = if value.len() > SHOWN {
            Digest::of(value.as_bytes()).to_string()
        } else {
            value
        };
        all.insert(name, value);
    };
    if let Some(image) = &state.image {
        set("image".into(), image.digest.to_string());
    }
    if let Some(chart) = &state.chart {
        set(CHART.into(), chart.digest.to_string());
        set("chart.version".into(), chart.version.to_string());
    }
    if let Some(values) = &run.chart_values {
        set("run.chart_values".into(), values.as_str().to_owned());
    }
    let clusters: Vec<_> = request.clusters.iter().map(ToString::to_string).collect();
    set("clusters".into(), clusters.join(", "));
    set("run.port".into(), run.port.to_string());
    set("run.replicas".into(), state.replicas.to_string());
    set("run.command".into(), run.command.join(" "));
    set("run.health.path".into(), run.health.path.clone());
    set(
        "run.health.deadline_seconds".into(),
        run.health.deadline_seconds.to_string(),
    );
    for (key, value) in &run.env {
        set(format!("env.{key}"), value.clone());
    }
    for (name, volume) in &run.volumes {
        let mut place = format!("{} in {}", volume.path, volume.variable(name));
        if let Some(size) = &volume.size {
            place.push_str(&format!(", {size}"));
        }
        if let Some(class) = &volume.storage_class {
            place.push_str(&format!(" of {class}"));
        }
        if volume.many_nodes {
            place.push_str(", for many nodes");
        }
        set(format!("volume.{name}"), place);
    }
    for (name, amount) in run.resources.named() {
        set(format!("run.resources.{name}"), amount.to_string());
    }
    if let Some(autoscaling) = &run.autoscaling {
        set("run.autoscaling.max".into(), autoscaling.max.to_string());
        set(
            "run.autoscaling.cpu_percent".into(),
            autoscaling.cpu_percent.to_string(),
        );
    }
    for (key, secret) in &request.secrets {
        set(
            format!("secret.{key}"),
            format!("version {}", secret.version),
        );
    }
    all
}

/// Its plan is known and waits to be allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApprovalRequested {
    /// The plan.
    pub plan: Plan,
    /// Its hash.
    pub hash: Digest,
    /// Who asked for the deployment.
    pub requester: String,
    /// Who wrote the commit of the source.
    pub author: Option<String>,
    /// When it is too late; none for never.
    pub expires: Option<Timestamp>,
    /// The id of the event that then ends it.
    pub nonce: EventId,
}

/// The plan became another one. What was granted for the one before is void.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApprovalsVoided {
    /// The plan as it is now.
    pub plan: Plan,
    /// Its hash.
    pub hash: Digest,
    /// The hash of the one before.
    pub was: Digest,
    /// Whose approvals are void.
    pub voided: Vec<String>,
}

/// Somebody allowed a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApprovalGranted {
    /// The plan's hash.
    pub hash: Digest,
    /// Who.
    pub approver: String,
    /// Why, in their words.
    pub reason: Option<String>,
}

/// Somebody does not allow a plan. Its deployment fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApprovalRejected {
    /// Who.
    pub approver: String,
    /// Why.
    pub reason: String,
}

/// Somebody went ahead without the approvals, because it could not wait. To be reviewed later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EmergencyOverride {
    /// The plan's hash.
    pub hash: Digest,
    /// Who.
    pub by: String,
    /// Why.
    pub reason: String,
}

/// What was asked for is there: it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Approved {
    /// The plan's hash.
    pub hash: Digest,
    /// Who allowed it.
    pub approvers: Vec<String>,
    /// Whether it goes on without enough approvals.
    pub emergency: bool,
}

/// Somebody else has looked at what was done in an emergency.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PostReviewCompleted {
    /// Who.
    pub reviewer: String,
    /// What they say.
    pub reason: Option<String>,
}

/// An approval that holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Grant {
    /// Who.
    pub approver: String,
    /// When.
    pub at: Timestamp,
    /// Why, in their words.
    pub reason: Option<String>,
}

/// An emergency, and whether it was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Emergency {
    /// Who went ahead.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When.
    pub at: Timestamp,
    /// Who looked at it later, when, and what they say.
    pub review: Option<Grant>,
}

/// What is known of a deployment's approvals.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    /// The plan.
    pub plan: Plan,
    /// Its hash.
    pub hash: Digest,
    /// Who asked for the deployment.
    pub requester: String,
    /// Who wrote the commit of the source.
    pub author: Option<String>,
    /// Since when it is asked for.
    pub since: Timestamp,
    /// When it is too late.
    pub expires: Option<Timestamp>,
    /// The id of the event that then ends it.
    pub nonce: EventId,
    /// Who allowed this plan.
    pub grants: Vec<Grant>,
    /// Who did not.
    pub rejected: Option<ApprovalRejected>,
    /// Who went ahead without.
    pub emergency: Option<Emergency>,
    /// The hash of the plan that they went ahead with.
    pub overridden: Option<Digest>,
    /// The hash that it went on with.
    pub approved: Option<Digest>,
}

impl Approval {
    fn new(e: ApprovalRequested, at: At) -> Self {
        Self {
            plan: e.plan,
            hash: e.hash,
            requester: e.requester,
            author: e.author,
            since: at.time,
            expires: e.expires,
            nonce: e.nonce,
            grants: Vec::new(),
            rejected: None,
            emergency: None,
            overridden: None,
            approved: None,
        }
    }

    /// Whether what is asked for is there.
    pub fn is_enough(&self) -> bool {
        let granted = u32::try_from(self.grants.len()).unwrap_or(u32::MAX);
        self.rejected.is_none() && (self.is_overridden() || granted >= self.plan.rule.required)
    }

    /// Whether somebody went ahead with this plan, and not with one before it.
    pub fn is_overridden(&self) -> bool {
        self.overridden.as_ref() == Some(&self.hash)
    }

    /// Whether somebody still has to look at an emergency.
    pub fn needs_review(&self) -> bool {
        self.emergency.as_ref().is_some_and(|e| e.review.is_none())
    }

    /// What goes on with the present plan.
    pub fn approved(&self) -> Approved {
        Approved {
            hash: self.hash.clone(),
            approvers: self.grants.iter().map(|g| g.approver.clone()).collect(),
            emergency: self.is_overridden(),
        }
    }

    /// How a deployment ends that nobody has allowed in time.
    pub(crate) fn expired(&self) -> Failed {
        Failed {
            during: Status::AwaitingApproval,
            code: "approval_expired".into(),
            message: format!(
                "{} of {} approvals were there in time",
                self.grants.len(),
                self.plan.rule.required
            ),
            remedy: "deploy again, and ask the approvers".into(),
        }
    }

    /// Refuses who may not decide about their own change, or not at all.
    fn may_decide(&self, who: &str) -> Result<(), Refusal> {
        let own = |other: &str| same_person(other, who);
        if own(&self.requester) {
            return Err(Refusal::new(
                "own_change",
                format!("{who} asked for this deployment, and cannot decide about it too"),
                "ask somebody else; in an emergency, `daybook approvals override` goes ahead",
            ));
        }
        if self.author.as_deref().is_some_and(own) {
            return Err(Refusal::new(
                "own_change",
                format!("{who} wrote this commit, and cannot decide about it too"),
                "ask somebody else; in an emergency, `daybook approvals override` goes ahead",
            ));
        }
        let named = &self.plan.rule.approvers;
        let is_named = |name: &String| name.to_lowercase() == who.to_lowercase();
        if !named.is_empty() && !named.iter().any(is_named) {
            let names: Vec<_> = named.iter().map(String::as_str).collect();
            return Err(Refusal::new(
                "not_an_approver",
                format!("{who} is no approver of this environment"),
                format!("ask one of: {}", names.join(", ")),
            ));
        }
        Ok(())
    }

    fn is_plan(&self, hash: &Digest) -> Result<(), Refusal> {
        if self.hash == *hash {
            return Ok(());
        }
        Err(Refusal::new(
            "plan_changed",
            format!("the plan is {} by now, and not {hash}", self.hash),
            "look at it again with `daybook approvals show`, and decide about that one",
        ))
    }
}

/// Whether two names stand for one person: letters are alike whether large or small, and an account
/// is whoever has an address that begins with it. Two addresses are two people.
pub(crate) fn same_person(one: &str, other: &str) -> bool {
    let (one, other) = (one.to_lowercase(), other.to_lowercase());
    let account = |name: &str| name.split('@').next().map(str::to_owned);
    one == other || (one.contains('@') != other.contains('@') && account(&one) == account(&other))
}

/// Refuses what the state of the approvals does not allow, and says whether an event changes
/// anything. The transition table has allowed it already.
pub(crate) fn changes(state: &Deployment, event: &DeploymentEvent) -> Result<bool, Refusal> {
    if let DeploymentEvent::PostReviewCompleted(e) = event {
        return reviews(state, &e.reviewer);
    }
    let Some(approval) = &state.approval else {
        return Ok(true);
    };
    match event {
        DeploymentEvent::ApprovalGranted(e) => {
            undecided(approval)?;
            approval.is_plan(&e.hash)?;
            approval.may_decide(&e.approver)?;
            let mut grants = approval.grants.iter();
            Ok(!grants.any(|g| same_person(&g.approver, &e.approver)))
        }
        DeploymentEvent::ApprovalRejected(e) => {
            undecided(approval)?;
            approval.may_decide(&e.approver)?;
            Ok(true)
        }
        DeploymentEvent::EmergencyOverride(e) => {
            undecided(approval)?;
            approval.is_plan(&e.hash)?;
            Ok(!approval.is_overridden())
        }
        DeploymentEvent::Approved(e) => {
            undecided(approval)?;
            approval.is_plan(&e.hash)?;
            not_allowed_unless(approval.is_enough())?;
            Ok(true)
        }
        DeploymentEvent::DeployingStarted(_) => {
            not_allowed_unless(approval.approved.as_ref() == Some(&approval.hash))?;
            Ok(true)
        }
        DeploymentEvent::ApprovalsVoided(e) => Ok(approval.hash != e.hash),
        _ => Ok(true),
    }
}

impl Deployment {
    /// What somebody went ahead with in an emergency: without approvals, or through a freeze.
    pub fn emergencies(&self) -> impl Iterator<Item = &Emergency> {
        let approval = self.approval.as_ref().and_then(|a| a.emergency.as_ref());
        let freeze = self.hold.as_ref().and_then(|h| h.emergency.as_ref());
        approval.into_iter().chain(freeze)
    }

    /// Whether somebody still has to look at an emergency.
    pub fn needs_review(&self) -> bool {
        self.emergencies().any(|e| e.review.is_none())
    }
}

/// Refuses a review of what was no emergency or one's own, and says whether it changes anything.
fn reviews(state: &Deployment, reviewer: &str) -> Result<bool, Refusal> {
    if state.emergencies().next().is_none() {
        return Err(no_review());
    }
    if state.emergencies().any(|e| same_person(&e.by, reviewer)) {
        return Err(Refusal::new(
            "own_change",
            format!("{reviewer} went ahead, and cannot review that too"),
            "ask somebody else",
        ));
    }
    Ok(state.needs_review())
}

fn undecided(approval: &Approval) -> Result<(), Refusal> {
    match &approval.rejected {
        None => Ok(()),
        Some(r) => Err(Refusal::new(
            "approval_rejected",
            format!("{} has rejected it: {}", r.approver, r.reason),
            "deploy again once that is settled",
        )),
    }
}

fn not_allowed_unless(allowed: bool) -> Result<(), Refusal> {
    if allowed {
        return Ok(());
    }
    Err(Refusal::new(
        "not_approved",
        "its plan is not allowed yet",
        "`daybook approvals show` says who has to allow it",
    ))
}

/// Refuses a review where there is nothing to review.
pub(crate) fn no_review() -> Refusal {
    Refusal::new(
        "no_review_open",
        "nobody went ahead in an emergency with this deployment",
        "`daybook approvals list` shows what is to be reviewed",
    )
}

/// Folds what an event says about approvals.
pub(crate) fn fold(approval: &mut Option<Box<Approval>>, event: DeploymentEvent, at: At) {
    if let DeploymentEvent::ApprovalRequested(e) = event {
        *approval = Some(Box::new(Approval::new(*e, at)));
        return;
    }
    let Some(approval) = approval else {
        return;
    };
    let grant = |approver, reason| Grant {
        approver,
        at: at.time,
        reason,
    };
    match event {
        DeploymentEvent::ApprovalsVoided(e) => {
            let ApprovalsVoided { plan, hash, .. } = *e;
            (approval.plan, approval.hash, approval.approved) = (plan, hash, None);
            approval.grants.clear();
            // An emergency was about another plan, and goes no further. That somebody went ahead is
            // still to be reviewed.
        }
        DeploymentEvent::ApprovalGranted(e) => approval.grants.push(grant(e.approver, e.reason)),
        DeploymentEvent::ApprovalRejected(e) => approval.rejected = Some(e),
        DeploymentEvent::EmergencyOverride(e) => {
            approval.overridden = Some(e.hash);
            approval.emergency = Some(Emergency {
                by: e.by,
                reason: e.reason,
                at: at.time,
                review: None,
            });
        }
        DeploymentEvent::Approved(e) => approval.approved = Some(e.hash),
        DeploymentEvent::PostReviewCompleted(e) => {
            if let Some(emergency) = &mut approval.emergency {
                emergency.review = Some(grant(e.reviewer, e.reason));
            }
        }
        _ => {}
    }
}
