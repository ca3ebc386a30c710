//! What is written beside a repository that is ejected: Argo CD Applications, and how to go on.

use std::fmt::Write as _;

use daybook_events::{EnvironmentName, ProjectName, RepositoryUrl};

/// An environment, as far as an Application says something of it.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) name: EnvironmentName,
    pub(crate) ephemeral: bool,
}

/// Where the repository is, or where it is still to be said.
fn repository_url(project: &ProjectName, remote: Option<&RepositoryUrl>) -> String {
    match remote {
        Some(url) => url.to_string(),
        None => format!("https://git.example.com/{project}.git"),
    }
}

/// The Argo CD Application of an environment.
pub(super) fn application(
    project: &ProjectName,
    place: &Place,
    remote: Option<&RepositoryUrl>,
) -> String {
    let Place { name, ephemeral } = place;
    let url = repository_url(project, remote);
    let todo = match remote {
        Some(_) => "",
        None => "    # Where you push this repository.\n",
    };
    format!(
        "\
apiVersion: argoproj.io/v1alpha1
kind: Application
metadata:
  name: {project}-{name}
  namespace: argocd
  labels:
    daybook.dev/project: {project}
    daybook.dev/environment: {name}
    daybook.dev/ephemeral: \"{ephemeral}\"
spec:
  project: default
  source:
{todo}    repoURL: {url}
    targetRevision: main
    path: base
    helm:
      valueFiles:
        - ../environments/{name}/values.yaml
  destination:
    server: https://kubernetes.default.svc
    namespace: {project}-{name}
  syncPolicy:
    automated:
      prune: true
      selfHeal: true
    syncOptions:
      - CreateNamespace=true
"
    )
}

/// How to go on without Daybook.
pub(super) fn readme(
    project: &ProjectName,
    head: &str,
    places: &[Place],
    remote: Option<&RepositoryUrl>,
) -> String {
    let mut text = format!(
        "\
# {project}, without Daybook

This is the whole GitOps repository of {project} at commit {head}: a git repository with its
history, in which every commit is signed.

- `base/` is the Helm chart with what all environments share; it depends on the chart `daybook-app`,
  which is taken from `base/charts/daybook-app`.
- `environments/<environment>/values.yaml` is what is to run in an environment.
- `argocd/` has an Argo CD Application for each environment. They are not committed yet.
- `.daybook/allowed_signers` lists the keys of the signatures:
  `git -c gpg.ssh.allowedSignersFile=.daybook/allowed_signers verify-commit HEAD`.

Secrets are not in it. A release names those that it needs under `secretEnv`, each with its version;
make a Kubernetes Secret of them in the namespace of the environment.

To go on:

    git remote add origin {url}
    git add argocd && git commit -m \"Argo CD Applications\"
    git push -u origin main
    kubectl apply -f argocd/
",
        url = repository_url(project, remote),
    );
    if remote.is_none() {
        text.push_str(
            "\nPut the address of your repository into `repoURL` of each file in `argocd/` first.\n",
        );
    }
    text.push_str("\nEnvironments:\n\n");
    for place in places {
        let _ = writeln!(text, "- {}", place.name);
    }
    text
}
