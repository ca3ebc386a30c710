//! What a new GitOps repository begins with.

use daybook_events::ProjectName;

use super::chart::chart_files;
use crate::values::CHART;

/// The files of the first commit.
pub(super) fn files(project: &ProjectName) -> Vec<(String, String)> {
    let own = [
        ("base/Chart.yaml", chart(project)),
        ("base/values.yaml", base_values(project)),
        ("README.md", readme(project)),
    ];
    let own = own.map(|(path, content)| (path.to_owned(), content));
    let of_all = chart_files()
        .map(|(path, content)| (format!("base/charts/{CHART}/{path}"), content.to_owned()));
    own.into_iter().chain(of_all).collect()
}

fn chart(project: &ProjectName) -> String {
    format!(
        "\
apiVersion: v2
name: {project}
description: Everything that project {project} runs
type: application
version: 0.1.0
dependencies:
  - name: {CHART}
    version: \">=0.1.0-0\"
    # Taken from base/charts/{CHART}.
    repository: \"\"
"
    )
}

fn base_values(project: &ProjectName) -> String {
    format!(
        "\
# What all environments share. An environment's own values win.
{CHART}:
  labels:
    daybook.dev/project: {project}
  project: {project}
"
    )
}

fn readme(project: &ProjectName) -> String {
    format!(
        "\
# {project}

The desired state of project `{project}`, kept by Daybook. Every deployment is a commit here.

- `environments/<environment>/values.yaml` says what runs in an environment.
- `base/` is the chart that these values are for.

Each commit names the event that caused it (`Daybook-Event`) and, where there is one, the
deployment (`Daybook-Deployment`). Commits by hand are welcome: they are recorded, kept and built
upon. `git revert` undoes a deployment.
"
    )
}
