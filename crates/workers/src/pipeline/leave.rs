//! Takes a deployment that is to stop out of the routes that it shares with others, before it
//! stops: no request is sent to what is about to go.

use std::time::Duration;

use daybook_events::routing::{self, Command, Routing};
use daybook_events::{ClusterName, Subject};
use daybook_projections::DeploymentRow;

use super::{Bench, Stop, branch};

const ROLE: &str = "route";

/// How long a gateway may take to apply it. Without any gateway, a stop does not wait for ever.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the Gateways of clusters may take, whose controllers have more to do.
pub(super) const CLUSTER_PATIENCE: Duration = Duration::from_secs(15);

/// Leaves the shared routes, and waits until a gateway has applied that, and so have the Gateways
/// of the clusters that it runs in. For those it also waits where it lost its routes before, be it
/// long ago.
pub(super) async fn shared_routes(bench: &Bench, row: &DeploymentRow) -> Result<(), Stop> {
    let subject = Subject::Routing(row.state.request.instance.project.clone());
    let mut feed = bench.ledger.projections().feed();
    let command = Command::Leave {
        deployment: row.id,
        instance: row.state.request.instance.clone(),
        heir: branch::heir(bench, row)?,
    };
    let context = bench.follow_up(ROLE, row.state.status_event, row.id.0, "left");
    let left = bench
        .append::<Routing>(&subject, &context, |state| {
            routing::decide(state, command.clone())
        })
        .await?;
    if let Some(position) = left.position() {
        bench.folded(position).await?;
    }
    let Some(table) = with_routing(bench, &subject, |routing| routing.left_by(row.id))? else {
        return Ok(());
    };
    let clusters = &row.state.request.clusters;
    let late = |routing: &Routing| behind(routing, clusters, table);
    let patience = match with_routing(bench, &subject, late)?.is_empty() {
        true => PATIENCE,
        false => CLUSTER_PATIENCE,
    };
    let now = left.position().is_some();
    let applied = async {
        while !with_routing(bench, &subject, |routing| {
            let by_any = !now || routing.applied.values().any(|a| *a >= table);
            by_any && behind(routing, clusters, table).is_empty()
        })? {
            if feed.next().await.is_none() {
                break;
            }
        }
        Ok(())
    };
    match tokio::time::timeout(patience, applied).await {
        Ok(done) => done,
        Err(_) => {
            let late = with_routing(bench, &subject, late)?;
            not_waited_for(bench, row, table, &late).await;
            Ok(())
        }
    }
}

/// Those of a deployment's clusters that have a Gateway which serves an older table than this.
pub(super) fn behind(routing: &Routing, clusters: &[ClusterName], table: u32) -> Vec<ClusterName> {
    let clusters = clusters.iter();
    let late = clusters.filter(|c| routing.applied.get(c.as_str()).is_some_and(|a| *a < table));
    late.cloned().collect()
}

/// Says that a deployment is stopped although something may still lead to it.
pub(super) async fn not_waited_for(
    bench: &Bench,
    row: &DeploymentRow,
    table: u32,
    late: &[ClusterName],
) {
    tracing::warn!(deployment.id = %row.id, table, ?late,
        "no gateway applied in time that a deployment left its routes; it is stopped all the same");
    for cluster in late {
        let text = "the Gateway has not applied in time that it left its routes; it is stopped all \
                    the same";
        bench.say(row.id, Some(cluster.clone()), text).await;
    }
}

fn with_routing<T: Default>(
    bench: &Bench,
    subject: &Subject,
    look: impl FnOnce(&Routing) -> T,
) -> Result<T, Stop> {
    let folded = bench.ledger.projections().shared::<Routing>(subject)?;
    Ok(folded.state.as_ref().map(look).unwrap_or_default())
}
