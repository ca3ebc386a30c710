//! What pods print: the API server asks a kubelet, which is played, over TLS.

use daybook_events::lines::{Line, LineKind, LineLog, LineSource};
use daybook_store::embedded::{EmbeddedLines, LineRetention};
use daybook_testkit::kubernetes::Node;

use super::*;

struct Logs {
    stage: Stage,
    lines: Arc<dyn LineLog>,
    node: Node,
    _folder: tempfile::TempDir,
}

impl Logs {
    async fn new(environment: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let lines = EmbeddedLines::open(folder.path().join("lines"), LineRetention::default());
        let lines: Arc<dyn LineLog> = Arc::new(lines.await.unwrap());
        let kept = lines.clone();
        let stage = Stage::of(environment, |options| options.lines = Some(kept)).await?;
        let node = Node::start(stage.client.clone(), &format!("node-{environment}")).await;
        Some(Self {
            stage,
            lines,
            node,
            _folder: folder,
        })
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.stage.client.clone(), &self.stage.namespace())
    }

    /// The pods of the release, bound to the node, once there are so many.
    async fn bound(&self, count: usize) -> Vec<Pod> {
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                let pods = self
                    .pods()
                    .list(&ListParams::default())
                    .await
                    .unwrap()
                    .items;
                if pods.len() == count {
                    break pods;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let found = found.await.unwrap();
        for pod in &found {
            self.node.bind(pod).await;
        }
        found
    }

    async fn play(&self, pod: &Pod, fate: &Fate) {
        Kubelet::play(&self.stage.client, pod, fate).await;
    }

    /// All lines, once they are as `is` asks.
    async fn until(&self, what: &str, is: impl Fn(&[Line]) -> bool) -> Vec<Line> {
        let source = LineSource::Deployment(deployment(1));
        let mut last = Vec::new();
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                last = self.lines.read(source, 0, 10_000).await.unwrap();
                if is(&last) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(found.await.is_ok(), "{what}: {last:#?}");
        last
    }
}

fn running() -> Fate {
    Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    }
}

fn texts(lines: &[Line], pod: &Pod) -> Vec<String> {
    texts_of(LineKind::Container, lines, pod)
}

fn texts_of(kind: LineKind, lines: &[Line], pod: &Pod) -> Vec<String> {
    let name = pod.name_any();
    let of_pod = lines
        .iter()
        .map(|l| &l.line)
        .filter(|line| line.kind == kind && line.instance.as_deref() == Some(&name));
    of_pod.map(|line| line.text.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_pods_print_is_carried_once_and_told_apart() {
    let Some(mut logs) = Logs::new("output").await else {
        return;
    };
    let mut values = logs.stage.values();
    release(&mut values, 1, 2);
    logs.stage.apply(1, &values).await.unwrap();
    let pods = logs.bound(2).await;
    let [first, second] = &pods[..] else {
        panic!("{pods:?}");
    };
    logs.node.print(&first.name_any(), "before it is seen");
    for pod in &pods {
        logs.play(pod, &running()).await;
    }
    let has = |pod: &Pod, expected: &[&str]| {
        let pod = pod.clone();
        let expected: Vec<String> = expected.iter().map(|s| (*s).to_owned()).collect();
        move |lines: &[Line]| texts(lines, &pod) == expected
    };
    logs.until("the first line", has(first, &["before it is seen"]))
        .await;
    logs.node.print(&second.name_any(), "from the second");
    logs.until("the other pod's", has(second, &["from the second"]))
        .await;

    // A connection that is cut loses nothing and repeats nothing.
    logs.node.cut();
    logs.node.print(&first.name_any(), "after the cut");
    let both = ["before it is seen", "after the cut"];
    let lines = logs.until("what came after", has(first, &both)).await;
    assert!(
        lines
            .iter()
            .all(|l| l.line.cluster.as_ref().unwrap().as_str() == "oslo")
    );

    // What a run said last is not lost when the next one begins.
    logs.node.cut();
    logs.node.print(&first.name_any(), "last words");
    logs.node.restart(&first.name_any());
    logs.node.print(&first.name_any(), "again");
    logs.play(first, &Fate::Crashes(3, String::new())).await;
    let all = ["before it is seen", "after the cut", "last words", "again"];
    logs.until("both runs", has(first, &all)).await;

    // Another process goes on where this one ends.
    let kept = logs.lines.clone();
    let other = Stage::of("output", |options| options.lines = Some(kept)).await;
    logs.stage = other.unwrap();
    logs.node.print(&second.name_any(), "to another process");
    let both = ["from the second", "to another process"];
    let lines = logs.until("what it goes on with", has(second, &both)).await;
    assert!(has(first, &all)(&lines), "{lines:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_the_same_time_are_all_carried() {
    let Some(logs) = Logs::new("same-time").await else {
        return;
    };
    let mut values = logs.stage.values();
    release(&mut values, 1, 1);
    logs.stage.apply(1, &values).await.unwrap();
    let pods = logs.bound(1).await;
    let pod = &pods[0];
    logs.play(pod, &running()).await;
    let time = k8s_openapi::jiff::Timestamp::now();
    let mut expected = Vec::new();
    for text in ["one", "another", "a third"] {
        logs.node.print_at(&pod.name_any(), time, text);
        expected.push(text.to_owned());
        // Each is kept before the next one comes.
        let all = |lines: &[Line]| texts(lines, pod) == expected;
        logs.until(text, all).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kubelets_warn_of_stands_beside_the_output_once() {
    let Some(logs) = Logs::new("warnings").await else {
        return;
    };
    let mut values = logs.stage.values();
    release(&mut values, 1, 1);
    logs.stage.apply(1, &values).await.unwrap();
    let pods = logs.bound(1).await;
    let unready = Fate::Unready("HTTP probe failed with statuscode: 500".to_owned());
    logs.play(&pods[0], &unready).await;
    logs.play(&pods[0], &unready).await;
    let other = Fate::Unready("connection refused".to_owned());
    logs.play(&pods[0], &other).await;
    // One watch sees the whole cluster, and the tests beside this one have a deployment of this
    // number too.
    let said = |lines: &[Line]| texts_of(LineKind::Platform, lines, &pods[0]);
    let expected = [
        "Unhealthy: Readiness probe failed: HTTP probe failed with statuscode: 500",
        "Unhealthy: Readiness probe failed: connection refused",
    ];
    logs.until("both warnings", |lines| said(lines) == expected)
        .await;
}
