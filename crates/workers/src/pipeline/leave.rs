//! Takes a deployment that is to stop out of the routes that it shares with others, before it
//! stops: no request is sent to what is about to go.

use std::time::Duration;

use daybook_events::Subject;
use daybook_events::routing::{self, Command, Routing};
use daybook_projections::DeploymentRow;

use super::{Bench, Stop, branch};

const ROLE: &str = "route";

/// How long a gateway may take to apply it. Without any gateway, a stop does not wait for ever.
const PATIENCE: Duration = Duration::from_secs(5);

/// Leaves the shared routes, and waits until a gateway has applied that. Where it shares none,
/// nothing is done.
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
    let Some(position) = left.position() else {
        return Ok(());
    };
    bench.folded(position).await?;
    let table = with_routing(bench, &subject, |routing| routing.table)?;
    let applied = async {
        while !with_routing(bench, &subject, |r| r.applied.values().any(|a| *a >= table))? {
            if feed.next().await.is_none() {
                break;
            }
        }
        Ok(())
    };
    match tokio::time::timeout(PATIENCE, applied).await {
        Ok(done) => done,
        Err(_) => {
            tracing::warn!(deployment.id = %row.id, table, "no gateway applied that it leaves its routes");
            Ok(())
        }
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
