//! Names, references and addresses: what is taken, what is refused; and the subject codec.

#![allow(clippy::unwrap_used)]

use daybook_events::chart::{ChartReference, ChartVersion};
use daybook_events::spec::ImageReference;
use daybook_events::{
    AggregateKind, BuildId, ClusterName, CommitId, DeploymentId, Digest, EnvKey, EnvironmentName,
    GitRef, Hostname, ImageRepository, ImageTag, InstanceRef, InvalidName, ProjectName,
    RepositoryUrl, ServiceName, Subject, SubjectFilter, SubscriptionId,
};
use proptest::prelude::*;

#[track_caller]
fn check<T: std::fmt::Display>(
    parse: impl Fn(String) -> Result<T, InvalidName>,
    good: &[&str],
    bad: &[&str],
) {
    for text in good {
        match parse((*text).to_owned()) {
            Ok(name) => assert_eq!(name.to_string(), *text),
            Err(e) => panic!("{text:?} was refused: {e}"),
        }
    }
    for text in bad {
        let Err(e) = parse((*text).to_owned()) else {
            panic!("{text:?} was taken");
        };
        assert!(e.code.starts_with("invalid_"), "{e:?}");
        assert!(e.value.chars().count() <= 80);
        assert!(!e.rule.is_empty());
    }
}

/// What no name of any kind may be: control characters, traversal, options, subjects' and paths'
/// separators.
const NEVER: &[&str] = &[
    "",
    " ",
    "a b",
    "a\n",
    "\na",
    "a\0b",
    "a\tb",
    "a\u{7f}",
    "..",
    "../a",
    "a/../b",
    "-a",
    "--help",
    "a*",
    "a>",
    "*",
    ">",
    "ä",
    "a\u{202e}b",
    "a\r\nb",
];

#[test]
fn short_names() {
    let good = ["a", "shop", "a-b", "a1", "pr-142", &"a".repeat(30)];
    let long = "a".repeat(31);
    let bad = [
        "A", "Shop", "1a", "a-", "a_b", "a.b", "a/b", &long, "_", "shop ",
    ];
    let bad: Vec<_> = bad.iter().chain(NEVER).copied().collect();
    check(ProjectName::parse, &good, &bad);
    check(EnvironmentName::parse, &good, &bad);
    check(ServiceName::parse, &good, &bad);
    let bad: Vec<_> = bad.into_iter().filter(|b| *b != long).collect();
    let (fits, too_long) = ("a".repeat(63), "a".repeat(64));
    check(ClusterName::parse, &[&fits], &[&too_long]);
    check(ClusterName::parse, &good, &bad);
}

#[test]
fn hostnames() {
    let label = "a".repeat(64);
    let long = "a.".repeat(130) + "a";
    check(
        Hostname::parse,
        &["localhost", "api.shop.localhost", "1a.example.com", "a-b.c"],
        &[
            "a..b", ".a", "a.", "A.com", "a_b.com", "*.a.com", "a:80", "a/b", "-a.com", "a-.com",
            "10.0.0.1", "a.b.7", &label, &long, "[::1]",
        ],
    );
    check(Hostname::parse, &[], NEVER);
}

#[test]
fn git_refs() {
    let long = "a".repeat(256);
    check(
        GitRef::parse,
        &[
            "main",
            "HEAD",
            "feature/a-b",
            "v1.2.3",
            "refs/heads/main",
            "a1b2c3d",
            "release/ü",
        ],
        &[
            "",
            "-x",
            "--upload-pack=touch",
            "a..b",
            "a b",
            "a\nb",
            "a\0",
            "a~1",
            "a^",
            "a:b",
            "a?",
            "a*",
            "a[b",
            "a\\b",
            "@",
            "a@{1}",
            "/a",
            "a/",
            "a//b",
            "a.",
            ".a",
            "a/.b",
            "a.lock",
            "a.lock/b",
            "+a:b",
            "a\u{7f}",
            &long,
        ],
    );
}

#[test]
fn commits_tags_digests_and_keys() {
    let (sha1, sha256) = ("a1".repeat(20), "0f".repeat(32));
    let (upper, short) = ("A1".repeat(20), "a1".repeat(19));
    check(
        CommitId::parse,
        &[&sha1, &sha256],
        &[&upper, &short, "main", &"g".repeat(40)],
    );
    check(CommitId::parse, &[], NEVER);
    let digest = format!("sha256:{sha256}");
    check(
        Digest::parse,
        &[&digest],
        &[
            &sha256,
            &format!("sha512:{sha256}"),
            &digest.to_uppercase(),
            &digest[..70],
        ],
    );
    check(Digest::parse, &[], NEVER);
    let long = "a".repeat(129);
    check(
        ImageTag::parse,
        &["latest", "v1.2.3", "A_b-c", "_x"],
        &[".a", "-a", "a/b", "a:b", "a@b", &long, "a b"],
    );
    check(ImageTag::parse, &[], NEVER);
    check(
        EnvKey::parse,
        &["PATH", "_a", "A1"],
        &["1A", "A-B", "A=B", "A.B", "A B", &long],
    );
    check(EnvKey::parse, &[], NEVER);
}

#[test]
fn charts() {
    check(
        ChartReference::parse,
        &[
            "https://charts.example.com/web",
            "https://charts.example.com:8443/stable/web-2",
            "oci://registry.example.com/charts/web_app.v2",
        ],
        &[
            "charts.example.com/web",
            "http://charts.example.com/web",
            "file:///charts/web",
            "https://",
            "https:///web",
            "https://charts.example.com",
            "https://charts.example.com/",
            "https://ada:secret@charts.example.com/web",
            "https://charts.example.com/../web",
            "https://charts.example.com//web",
            "https://charts.example.com/Web",
            "https://charts.example.com/-web",
            "https://charts.example.com/web?token=1",
            "https://charts.example.com/web#1",
            "https://charts.example.com/%2e%2e/web",
            "https://charts.example.com:0/web",
            "https://-charts/web",
        ],
    );
    check(ChartReference::parse, &[], NEVER);
    check(
        ChartVersion::parse,
        &[
            "0.1.0",
            "1.2.3",
            "v1.2.3",
            "1.2.3-rc.1",
            "1.2.3-a-b+build.5",
        ],
        &[
            "1",
            "1.2",
            "1.2.3.4",
            "^1.2.3",
            "~1.2",
            "1.x.0",
            "latest",
            "01.2.3",
            "1.2.3-",
            "1.2.3+",
            "1.2.3-a..b",
            "1.2.3-01",
            "1.2.3-rc.00",
            "1.2.3+a+b",
            ">=1.2.3",
            "1.2.3 ",
        ],
    );
    check(ChartVersion::parse, &[], NEVER);
}

#[test]
fn images() {
    check(
        ImageRepository::parse,
        &[
            "shop/api",
            "localhost:5000/shop/api",
            "registry.example.com/a_b",
            "api",
        ],
        &[
            "shop/api:v1",
            "shop/api@sha256:00",
            "Shop/api",
            "/api",
            "api/",
            "a//b",
            "a..b/c",
            "host:port/a",
            "host:99999/a",
            "https://a/b",
            "a/-b",
            "api:80",
            "a/../b",
        ],
    );
    check(ImageRepository::parse, &[], NEVER);
    let digest = Digest::of(b"x");
    let both = format!("localhost:5000/shop/api:v1@{digest}");
    let only_digest = format!("shop/api@{digest}");
    check(
        |s: String| s.parse::<ImageReference>(),
        &["shop/api:v1", "localhost:5000/api:v1", &both, &only_digest],
        &[
            "shop/api",
            "localhost:5000/api",
            "shop/api:",
            "shop/api@",
            "shop/api:v1@sha256:0",
            ":v1",
        ],
    );
}

#[test]
fn repository_urls() {
    check(
        RepositoryUrl::parse,
        &[
            "https://git.example.com/shop/api.git",
            "http://127.0.0.1:3000/a.git",
            "ssh://git@git.example.com/shop/api.git",
            "file:///srv/git/api.git",
            "/srv/git/api.git",
        ],
        &[
            "git@example.com:shop/api.git",
            "ext::sh -c touch",
            "ftp://example.com/a",
            "git://example.com/a",
            "javascript:alert(1)",
            "https://user:secret@example.com/a.git",
            "https://token@example.com/a.git",
            "ssh://git:secret@example.com/a.git",
            "ssh://-oProxyCommand=touch/a",
            "ssh://-x@example.com/a",
            "https://example.com/a?token=secret",
            "https://example.com/a#b",
            "https:///a",
            "https:example.com/a",
            "https:\\\\example.com\\a",
            "https://example.com\\@127.0.0.1/a",
            "/srv/../etc",
            "relative/path",
            "https://example.com/a\nb",
        ],
    );
    check(RepositoryUrl::parse, &[], NEVER);
}

#[test]
fn instances_with_joined_names_do_not_collide() {
    check(
        |s: String| s.parse::<InstanceRef>(),
        &["shop.production.api", "a-b.c.d"],
        &[
            "shop.production",
            "a.b.c.d",
            "shop..api",
            "shop.Production.api",
            "../a.b",
        ],
    );
    let one: InstanceRef = "a-b.c.d".parse().unwrap();
    let other: InstanceRef = "a.b-c.d".parse().unwrap();
    assert_ne!(one.to_string(), other.to_string());
}

proptest! {
    /// Addresses of an ordinary form are judged without a parser; all others, and so each of these
    /// with a port, by one.
    #[test]
    fn ordinary_repository_urls_are_urls(
        host in prop_oneof!["[a-z0-9.-]{1,20}", "(xn--)?[a-z]{1,5}(\\.[a-z0-9-]{1,6}){0,3}"],
        path in "[a-zA-Z0-9._~/%-]{0,20}",
    ) {
        let accepted = |text: String| RepositoryUrl::parse(text).is_ok();
        let plain = accepted(format!("https://{host}/{path}"));
        let parsed = accepted(format!("https://{host}:8443/{path}"));
        prop_assert_eq!(plain, parsed);
    }
}

fn name() -> impl Strategy<Value = String> {
    "[a-z]([a-z0-9-]{0,10}[a-z0-9])?"
}

fn subject() -> impl Strategy<Value = Subject> {
    (name(), name(), any::<[u8; 16]>(), 0..10_u8).prop_map(|(p, e, id, kind)| {
        let p = ProjectName::parse(p).unwrap();
        let e = EnvironmentName::parse(e).unwrap();
        let id = uuid::Uuid::from_bytes(id);
        match kind {
            0 => Subject::Project(p),
            1 => Subject::Environment(p, e),
            2 => Subject::Build(p, BuildId(id)),
            3 => Subject::Deployment(p, e, DeploymentId(id)),
            4 => Subject::Gitops(p),
            5 => Subject::Routing(p),
            6 => Subject::Domain(format!("{p}.{e}").parse().unwrap()),
            7 => Subject::Ledger,
            8 => Subject::Subscription(p, SubscriptionId(id)),
            _ => Subject::Access,
        }
    })
}

/// Whether a NATS server would hand a subject to a subscriber of a pattern.
fn nats_matches(pattern: &str, subject: &str) -> bool {
    let (mut p, mut s) = (pattern.split('.'), subject.split('.'));
    loop {
        match (p.next(), s.next()) {
            (None, None) => return true,
            (Some(p), Some(s)) if p == "*" || p == s => {}
            _ => return false,
        }
    }
}

proptest! {
    #[test]
    fn subjects_are_read_as_they_were_written(subject in subject()) {
        let text = subject.to_string();
        let again: Subject = text.parse().unwrap();
        prop_assert_eq!(&again, &subject);
        prop_assert!(subject.kind().is_some());
    }

    #[test]
    fn a_subject_of_a_newer_version_is_kept_as_it_is(
        tokens in prop::collection::vec("[!-)+-\\-/-=?-~]{1,8}", 4),
    ) {
        let text = format!("daybook.ev.{}", tokens.join("."));
        let subject: Subject = text.parse().unwrap();
        prop_assert_eq!(subject.to_string(), text);
    }

    #[test]
    fn any_text_is_a_subject_or_refused(text in ".{0,60}") {
        if let Ok(subject) = text.parse::<Subject>() {
            prop_assert_eq!(subject.to_string(), text);
        }
    }

    #[test]
    fn filters_agree_with_the_broker(subject in subject(), other in subject(), pick in 0..32_u8) {
        let of = |bit: u8| if pick & bit == 0 { &subject } else { &other };
        let filter = SubjectFilter {
            project: (pick & 1 != 0).then(|| of(2).project().cloned()).flatten(),
            environment: (pick & 4 != 0).then(|| of(8).environment().cloned()).flatten(),
            aggregate: (pick & 16 != 0).then(|| subject.kind()).flatten(),
            subject: None,
        };
        for s in [&subject, &other] {
            prop_assert_eq!(filter.matches(s), nats_matches(&filter.to_nats(), &s.to_string()));
        }
        let exactly = SubjectFilter::exactly(subject.clone());
        prop_assert_eq!(exactly.matches(&other), nats_matches(&exactly.to_nats(), &other.to_string()));
        prop_assert!(exactly.matches(&subject));
    }

    #[test]
    fn names_are_never_longer_or_other_than_promised(text in ".{0,40}") {
        if let Ok(name) = ProjectName::parse(text.clone()) {
            prop_assert_eq!(name.as_str(), &text);
            prop_assert!(text.len() <= 30 && !text.contains(['.', '/', '*', '>']));
        }
    }
}

#[test]
fn subjects_that_are_none() {
    for text in [
        "",
        "daybook.ev",
        "daybook.ev.",
        "daybook.ev.a.b.c",
        "daybook.ev.a.b.c.d.e",
        "other.ev.a.b.c.d",
        "daybook.ev.a..c.d",
        "daybook.ev.*.b.c.d",
        "daybook.ev.a.b.c.>",
        "daybook.evx.a.b.c.d",
        "daybook.ev.a.b.c.d e",
    ] {
        assert!(text.parse::<Subject>().is_err(), "{text:?}");
    }
    // Well formed, but not the canonical spelling of anything known: kept, and no aggregate.
    for text in [
        "daybook.ev.shop._.project.other",
        "daybook.ev.shop.production.project.shop",
        "daybook.ev.shop._.deployment.0199b8f0-0000-7000-8000-000000000001",
        "daybook.ev.shop.production.deployment.0199B8F0-0000-7000-8000-000000000001",
        "daybook.ev.shop.production.deployment.0199b8f000007000800000000000 0001",
        "daybook.ev.Shop._.project.Shop",
        "daybook.ev.shop._.approval.x",
    ] {
        match text.parse::<Subject>() {
            Ok(subject) => assert_eq!(subject.kind(), None, "{text}"),
            Err(_) => assert!(text.contains(' ')),
        }
    }
    assert_eq!(AggregateKind::ALL.len(), 10);
}

#[test]
fn what_is_refused_is_shown_without_credentials() {
    use daybook_events::without_credentials;
    for (text, shown) in [
        ("https://ada:hunter2@host/x", "https://…@host/x"),
        ("https://ada:hun/ter@2@host/x?y", "https://…@host/x…"),
        ("https://host/x?token=hunter2", "https://host/x…"),
        ("ada:hunter2@host:x.git", "…@host:x.git"),
        ("host/x?token=hunter2", "host/x…"),
        ("plain text?", "plain text?"),
    ] {
        assert_eq!(without_credentials(text), shown);
        let refused = RepositoryUrl::parse(text).unwrap_err().to_string();
        assert!(!refused.contains("hun"), "{refused}");
    }
}
