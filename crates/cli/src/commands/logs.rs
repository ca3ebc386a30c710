//! `daybook logs`

use clap::{Args, ValueEnum};
use futures_util::StreamExt;

use super::deploy::print_line;
use super::{Outcome, ServerArgs};
use crate::client::{Client, LogLine};
use crate::exit::Code;

/// Which output.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogType {
    /// Of the build.
    Build,
    /// Of the running instances.
    Container,
    /// What workers report.
    Status,
    /// What the platform underneath says, such as warnings of Kubernetes.
    Platform,
}

/// Output of a build and of running instances.
#[derive(Debug, Args)]
pub struct LogsArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it.
    deployment: String,
    /// Only output of one type.
    #[arg(long = "type", value_enum)]
    kind: Option<LogType>,
    /// Go on as lines come.
    #[arg(long, short)]
    follow: bool,
    /// Go on after this cursor.
    #[arg(long, value_name = "CURSOR")]
    after: Option<String>,
}

pub async fn run(args: LogsArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = super::lifecycle::find(&client, &args.deployment).await?;
    let kind = args.kind.map(|k| {
        match k {
            LogType::Build => "build",
            LogType::Container => "container",
            LogType::Status => "status",
            LogType::Platform => "platform",
        }
        .to_owned()
    });
    let query = [
        ("type", kind),
        ("follow", args.follow.then(|| "true".to_owned())),
        ("after", args.after),
    ];
    let stream = client
        .stream(&format!("/api/v1/deployments/{id}/logs"), &query, None)
        .await?;
    let mut stream = std::pin::pin!(stream);
    while let Some(event) = stream.next().await {
        if let Ok(line) = serde_json::from_str::<LogLine>(&event?.data) {
            print_line(&line);
        }
    }
    Ok(Code::Success)
}
