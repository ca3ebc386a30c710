//! Pages that show a commit.

use daybook_events::{CommitId, RepositoryUrl};
use url::Url;

/// The page of a commit on a forge that is known by its host: GitHub, GitLab, Gitea and Forgejo,
/// Bitbucket, under their own domains or as `github.example.com`. Nothing for other hosts, where a
/// guess would be a dead link in the ledger.
pub fn commit_url(repository: &RepositoryUrl, commit: &CommitId) -> Option<String> {
    let url = Url::parse(repository.as_str()).ok()?;
    if !matches!(url.scheme(), "https" | "ssh") {
        return None;
    }
    let host = url.host_str()?.to_ascii_lowercase();
    let is = |name: &str| host.split('.').any(|label| label == name);
    let middle = if is("gitlab") {
        "/-/commit/"
    } else if is("bitbucket") {
        "/commits/"
    } else if ["github", "codeberg", "gitea", "forgejo"]
        .iter()
        .any(|n| is(n))
    {
        "/commit/"
    } else {
        return None;
    };
    let path = url.path().trim_matches('/');
    let path = path.strip_suffix(".git").unwrap_or(path);
    // The port of an https URL belongs to the forge's pages; that of an ssh URL does not.
    let port = match (url.scheme(), url.port()) {
        ("https", Some(port)) => format!(":{port}"),
        _ => String::new(),
    };
    (path.contains('/')).then(|| format!("https://{host}{port}/{path}{middle}{commit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_forges_have_a_page_for_a_commit() {
        let commit = CommitId::parse("a".repeat(40)).unwrap();
        let page = |url: &str| {
            commit_url(&RepositoryUrl::parse(url).unwrap(), &commit)
                .map(|u| u.replace(commit.as_str(), "C"))
        };
        for (url, expected) in [
            (
                "https://github.com/o/r.git",
                Some("https://github.com/o/r/commit/C"),
            ),
            (
                "ssh://git@github.com:22/o/r",
                Some("https://github.com/o/r/commit/C"),
            ),
            (
                "https://gitlab.example.com:8443/g/s/r.git",
                Some("https://gitlab.example.com:8443/g/s/r/-/commit/C"),
            ),
            (
                "https://codeberg.org/o/r",
                Some("https://codeberg.org/o/r/commit/C"),
            ),
            (
                "https://bitbucket.org/o/r",
                Some("https://bitbucket.org/o/r/commits/C"),
            ),
            ("https://git.example.com/o/r", None),
            ("https://github.com/o", None),
            ("/srv/github.com/o/r", None),
            ("file:///srv/github.com/o/r", None),
        ] {
            assert_eq!(page(url).as_deref(), expected, "{url}");
        }
    }
}
