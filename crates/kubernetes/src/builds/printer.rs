//! Prints what the containers of a build's pod print, one after the other, while they do.

use std::time::Duration;

use daybook_workers::ports::Output;
use futures_util::AsyncBufRead;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::api::LogParams;
use kube::{Api, ResourceExt};
use tokio::sync::watch;

use crate::output::pod::{parse, read_line, since};

/// Between two tries to read.
const PAUSE: Duration = Duration::from_millis(250);
/// So often it is tried to read what a container has left, once it is over.
const LAST_TRIES: u32 = 8;

/// The pod of a build, as far as its output goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct View {
    /// Its name, once there is one.
    pod: Option<String>,
    /// Its containers, in the order in which they run.
    containers: Vec<String>,
    /// Those that have begun, and whether they have ended.
    begun: Vec<(String, bool)>,
    /// Nothing comes any more.
    pub(super) over: bool,
}

impl View {
    pub(super) fn of(pod: &Pod) -> Self {
        let statuses = pod.status.iter().flat_map(|status| {
            let first = status.init_container_statuses.iter().flatten();
            first.chain(status.container_statuses.iter().flatten())
        });
        let containers = pod.spec.iter().flat_map(|spec| {
            let first = spec.init_containers.iter().flatten();
            first.chain(&spec.containers).map(|c| c.name.clone())
        });
        let begun = |status: &ContainerStatus| {
            let state = status.state.as_ref()?;
            let ended = state.terminated.is_some();
            (ended || state.running.is_some()).then(|| (status.name.clone(), ended))
        };
        Self {
            pod: Some(pod.name_any()),
            containers: containers.collect(),
            begun: statuses.filter_map(begun).collect(),
            over: false,
        }
    }

    fn has(&self, container: &str) -> bool {
        self.begun.iter().any(|(name, _)| name == container)
    }

    fn has_ended(&self, container: &str) -> bool {
        self.over || self.begun.contains(&(container.to_owned(), true))
    }
}

pub(super) struct Printer {
    pub(super) pods: Api<Pod>,
    pub(super) output: Output,
    pub(super) view: watch::Receiver<View>,
}

impl Printer {
    /// Prints until all containers have ended, or nothing comes any more.
    pub(super) async fn run(mut self) {
        let (pod, containers) = match self.view.wait_for(|v| v.over || v.pod.is_some()).await {
            Ok(view) => (view.pod.clone(), view.containers.clone()),
            Err(_) => return,
        };
        let Some(pod) = pod else {
            return;
        };
        for container in containers {
            let begun = self.view.wait_for(|v| v.over || v.has(&container)).await;
            match begun.map(|view| view.has(&container)) {
                Ok(true) => self.print(&pod, &container).await,
                Ok(false) => {}
                Err(_) => return,
            }
        }
    }

    async fn print(&mut self, pod: &str, container: &str) {
        let mut after = None;
        let mut tries = 0;
        loop {
            // Asked before it is read: what ends meanwhile is read once more.
            let had_ended = self.view.borrow_and_update().has_ended(container);
            match self.read(pod, container, !had_ended, &mut after).await {
                Ok(()) if had_ended => return,
                Ok(()) => {}
                Err(error) if had_ended => {
                    tries += 1;
                    if tries >= LAST_TRIES {
                        let why = crate::error::said(&error);
                        tracing::warn!(pod, container, why, "the end of a build's output is lost");
                        return;
                    }
                }
                Err(error) => {
                    let why = crate::error::said(&error);
                    tracing::debug!(
                        pod,
                        container,
                        why,
                        "a build's output is not read; trying again"
                    );
                }
            }
            // It has ended and that is not seen yet, or the connection was cut.
            tokio::select! {
                _ = self.view.changed() => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    async fn read(
        &self,
        pod: &str,
        container: &str,
        follow: bool,
        after: &mut Option<Timestamp>,
    ) -> Result<(), ReadError> {
        let params = LogParams {
            container: Some(container.to_owned()),
            follow,
            since_time: after.map(since),
            timestamps: true,
            ..LogParams::default()
        };
        // What comes later in the same stream is new, whatever its time.
        let printed = *after;
        let stream = self.pods.log_stream(pod, &params).await?;
        self.forward(stream, printed, after).await
    }

    async fn forward(
        &self,
        stream: impl AsyncBufRead,
        printed: Option<Timestamp>,
        after: &mut Option<Timestamp>,
    ) -> Result<(), ReadError> {
        let mut stream = Box::pin(stream);
        while let Some(line) = read_line(&mut stream).await? {
            let Some((time, text)) = parse(&line) else {
                continue;
            };
            if printed.is_none_or(|printed| time > printed) {
                *after = (*after).max(Some(time));
                // A reader that has gone away is no reason to stop the work.
                let _ = self.output.send(text).await;
            }
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("the API server does not hand it out: {0}")]
    Api(#[from] kube::Error),
    #[error("the connection was cut: {0}")]
    Connection(#[from] std::io::Error),
}
