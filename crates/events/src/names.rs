//! Names and identifiers, validated where they enter.
//!
//! Each kind of name is a type of its own that can only be made by parsing, so that code which
//! holds a [`ProjectName`] never has to ask again whether it is safe to put in a subject, a path,
//! a hostname or a command line. The rules are deliberately narrower than what the outside
//! accepts: names become DNS labels, Kubernetes names, NATS subject tokens and folder names.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A name, reference or address that was refused, with the rule that it breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a valid {what}: {rule}")]
pub struct InvalidName {
    /// What was being named, in words: "project name", "git ref".
    pub what: &'static str,
    /// A stable code for programs: `invalid_project_name`.
    pub code: &'static str,
    /// The refused text, without credentials and cut to 80 characters.
    pub value: String,
    /// The rule that it breaks, in words.
    pub rule: &'static str,
}

/// A text as it may be shown: what stands before an `@` in it, as users and passwords do in
/// addresses, is left out, and so is what follows on a `?` or `#` of an address.
pub fn without_credentials(text: &str) -> String {
    let start = text.find("://").map_or(0, |at| at + "://".len());
    let (scheme, rest) = text.split_at(start);
    let (user, rest) = match rest.rsplit_once('@') {
        Some((_, rest)) => ("…@", rest),
        None => ("", rest),
    };
    let query = rest.find(['?', '#']).filter(|_| rest.contains('/'));
    match query {
        Some(end) => format!("{scheme}{user}{}…", &rest[..end]),
        None => format!("{scheme}{user}{rest}"),
    }
}

/// How a name is kept. One of up to 23 bytes, as most are, needs no memory of its own.
pub(crate) type Text = smol_str::SmolStr;

/// Makes a value of a text as it is read.
pub(crate) struct Parsed<T>(pub(crate) fn(&str) -> Result<T, InvalidName>);

impl<T> serde::de::Visitor<'_> for Parsed<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        (self.0)(text).map_err(E::custom)
    }
}

macro_rules! validated {
    (
        $(#[$doc:meta])*
        $name:ident, $what:literal, $code:literal, pattern = $pattern:literal, $check:expr
    ) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($crate::names::Text);

        // By hand, because what serde derives for a text of one's own copies it first.
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_str($crate::names::Parsed(|text| Self::parse(text)))
            }
        }

        impl $name {
            /// Parses a name; the error says which rule it breaks.
            pub fn parse<T: AsRef<str>>(value: T) -> Result<Self, $crate::names::InvalidName> {
                let value = value.as_ref();
                match Self::rule(value) {
                    Ok(()) => Ok(Self(value.into())),
                    Err(rule) => Err($crate::names::InvalidName {
                        what: $what,
                        code: $code,
                        value: $crate::names::without_credentials(value).chars().take(80).collect(),
                        rule,
                    }),
                }
            }

            /// The rule that a text breaks, if it breaks one.
            pub(crate) fn rule(text: &str) -> Result<(), &'static str> {
                let check: fn(&str) -> Result<(), &'static str> = $check;
                check(text)
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
        impl std::str::FromStr for $name {
            type Err = $crate::names::InvalidName;
            fn from_str(s: &str) -> Result<Self, $crate::names::InvalidName> {
                Self::parse(s)
            }
        }
        impl TryFrom<String> for $name {
            type Error = $crate::names::InvalidName;
            fn try_from(s: String) -> Result<Self, $crate::names::InvalidName> {
                Self::parse(s)
            }
        }
        impl From<$name> for String {
            fn from(n: $name) -> String {
                n.0.into()
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern, "description": $what })
            }
        }
    };
}

pub(crate) use validated;

/// A DNS-1035 label of at most `max` characters: it starts with a letter, so that it can also be
/// a Kubernetes Service name.
fn label(s: &str, max: usize) -> Result<(), &'static str> {
    if s.is_empty() {
        return Err("it is empty");
    }
    if s.len() > max {
        return Err("it is too long");
    }
    if !s.as_bytes()[0].is_ascii_lowercase() {
        return Err("it must start with a lowercase letter");
    }
    if s.ends_with('-') {
        return Err("it must not end with a hyphen");
    }
    if !s
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    {
        return Err("only lowercase letters, digits and hyphens are allowed");
    }
    Ok(())
}

/// Longest project, environment or service name. Two of them and a hyphen make a Kubernetes
/// namespace or label value, which ends at 63 characters.
pub const NAME_MAX: usize = 30;

fn short_label(s: &str) -> Result<(), &'static str> {
    match label(s, NAME_MAX) {
        Err("it is too long") => Err("at most 30 characters are allowed"),
        other => other,
    }
}

validated! {
    /// The name of a project: a DNS label of at most 30 characters.
    ProjectName, "project name", "invalid_project_name",
    pattern = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", short_label
}
validated! {
    /// The name of an environment within a project: a DNS label of at most 30 characters.
    EnvironmentName, "environment name", "invalid_environment_name",
    pattern = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", short_label
}
validated! {
    /// The name of a service within a project: a DNS label of at most 30 characters.
    ServiceName, "service name", "invalid_service_name",
    pattern = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", short_label
}
validated! {
    /// The name of a webhook within a project: a DNS label of at most 30 characters.
    HookName, "webhook name", "invalid_hook_name",
    pattern = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", short_label
}
validated! {
    /// The name of a freeze window within an environment: a DNS label of at most 30 characters.
    FreezeName, "freeze name", "invalid_freeze_name",
    pattern = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", short_label
}
validated! {
    /// The name of a template of a catalogue: a DNS label of at most 30 characters.
    TemplateName, "template name", "invalid_template_name",
    pattern = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", short_label
}
validated! {
    /// The name of a parameter of a template: a DNS label of at most 30 characters.
    ParameterName, "parameter name", "invalid_parameter_name",
    pattern = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", short_label
}
validated! {
    /// The name of a volume of a service: a DNS label of at most 30 characters.
    VolumeName, "volume name", "invalid_volume_name",
    pattern = "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", short_label
}
validated! {
    /// The version of a template: digits and letters, with . + - between.
    TemplateVersion, "template version", "invalid_template_version",
    pattern = "^[0-9A-Za-z]([0-9A-Za-z.+-]{0,30}[0-9A-Za-z])?$", |s| {
        if !(1..=32).contains(&s.len()) {
            return Err("it must have 1 to 32 characters");
        }
        if !s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'+' | b'-')) {
            return Err("only letters, digits and . + - are allowed");
        }
        if [s.as_bytes()[0], s.as_bytes()[s.len() - 1]].iter().any(|b| !b.is_ascii_alphanumeric()) {
            return Err("it must start and end with a letter or digit");
        }
        Ok(())
    }
}
validated! {
    /// The name of a time zone in the IANA database: `Europe/Berlin`. Whether there is one of this
    /// name is not checked here.
    ZoneName, "time zone", "invalid_time_zone",
    pattern = "^[A-Za-z][A-Za-z0-9_+/-]{0,63}$", |s| {
        if !s.starts_with(|c: char| c.is_ascii_alphabetic()) || s.len() > 64 {
            return Err("it must have 1 to 64 characters and start with a letter");
        }
        if !s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'-' | b'/')) {
            return Err("only letters, digits, _, +, - and / are allowed");
        }
        Ok(())
    }
}

impl Default for ZoneName {
    /// Coordinated universal time.
    fn default() -> Self {
        Self(Text::new_static("UTC"))
    }
}

validated! {
    /// The name of a cluster: a DNS label of at most 63 characters.
    ClusterName, "cluster name", "invalid_cluster_name",
    pattern = "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$", |s| label(s, 63)
}
validated! {
    /// A host name in lowercase (RFC 1123), without port, wildcard or trailing dot.
    Hostname, "hostname", "invalid_hostname",
    pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$", |s| {
        if s.is_empty() || s.len() > 253 {
            return Err("it must have 1 to 253 characters");
        }
        for part in s.split('.') {
            if part.is_empty() || part.len() > 63 {
                return Err("each label must have 1 to 63 characters");
            }
            if part.starts_with('-') || part.ends_with('-') {
                return Err("a label must not start or end with a hyphen");
            }
            if !part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
                return Err("only lowercase letters, digits, hyphens and dots are allowed");
            }
        }
        if s.split('.').next_back().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit())) {
            return Err("an IP address is not a hostname");
        }
        Ok(())
    }
}
validated! {
    /// A branch, tag, full ref name or (abbreviated) commit id, as `git check-ref-format` allows
    /// it, and never anything that a command line or a refspec could take for something else.
    GitRef, "git ref", "invalid_git_ref",
    pattern = "^[^-\\s~^:?*\\[\\\\][^\\s~^:?*\\[\\\\]*$", |s| {
        if s.is_empty() || s.len() > 255 {
            return Err("it must have 1 to 255 characters");
        }
        if s.starts_with('-') {
            return Err("it must not start with a hyphen");
        }
        if s.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err("white space and control characters are not allowed");
        }
        if s.contains("..") || s.contains("@{") || s == "@" {
            return Err("`..`, `@{` and a lone `@` are not allowed");
        }
        if s.contains(['~', '^', ':', '?', '*', '[', '\\']) {
            return Err("none of ~ ^ : ? * [ \\ is allowed");
        }
        if s.ends_with('/') || s.ends_with('.') || s.contains("//") || s.starts_with('/') {
            return Err("it must not start or end with a slash, end with a dot, or have empty parts");
        }
        if s.split('/').any(|p| p.starts_with('.') || p.ends_with(".lock")) {
            return Err("no part may start with a dot or end with .lock");
        }
        Ok(())
    }
}
validated! {
    /// A full Git commit id: 40 (SHA-1) or 64 (SHA-256) lowercase hexadecimal digits.
    CommitId, "commit id", "invalid_commit_id",
    pattern = "^([0-9a-f]{40}|[0-9a-f]{64})$", |s| {
        if !matches!(s.len(), 40 | 64) {
            return Err("a full commit id has 40 or 64 hexadecimal digits");
        }
        if !s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err("only lowercase hexadecimal digits are allowed");
        }
        Ok(())
    }
}
validated! {
    /// An image tag, as the OCI distribution specification defines it.
    ImageTag, "image tag", "invalid_image_tag",
    pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$", |s| {
        if s.is_empty() || s.len() > 128 {
            return Err("it must have 1 to 128 characters");
        }
        if !s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
            return Err("only letters, digits, dots, underscores and hyphens are allowed");
        }
        if matches!(s.as_bytes()[0], b'.' | b'-') {
            return Err("it must not start with a dot or a hyphen");
        }
        Ok(())
    }
}
validated! {
    /// A content digest: `sha256:` and 64 lowercase hexadecimal digits (OCI image specification).
    Digest, "digest", "invalid_digest",
    pattern = "^sha256:[0-9a-f]{64}$", |s| {
        match s.strip_prefix("sha256:") {
            Some(h) if h.len() == 64 && h.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) => Ok(()),
            _ => Err("it must be sha256: and 64 lowercase hexadecimal digits"),
        }
    }
}
validated! {
    /// An image repository without tag or digest: `[host[:port]/]path`, in lowercase.
    ImageRepository, "image repository", "invalid_image_repository",
    pattern = "^[a-z0-9]([a-z0-9._:/-]*[a-z0-9])?$", |s| {
        if s.is_empty() || s.len() > 255 {
            return Err("it must have 1 to 255 characters");
        }
        let mut parts = s.split('/');
        let first = parts.next().unwrap_or_default();
        let (host, port) = match first.split_once(':') {
            Some((h, p)) => (h, Some(p)),
            None => (first, None),
        };
        if let Some(p) = port
            && (!s.contains('/') || p.parse::<u16>().is_err())
        {
            return Err("a tag does not belong here, and a port must be a number");
        }
        for part in std::iter::once(host).chain(parts) {
            let ok = part.bytes().all(|b| {
                b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-')
            }) && part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.ends_with(|c: char| c.is_ascii_alphanumeric())
                && !part.contains("..");
            if !ok {
                return Err("each part must be lowercase letters and digits, with . _ - between");
            }
        }
        Ok(())
    }
}
validated! {
    /// The name of an environment variable of a workload.
    EnvKey, "environment variable name", "invalid_env_key",
    pattern = "^[A-Za-z_][A-Za-z0-9_]{0,127}$", |s| {
        if s.is_empty() || s.len() > 128 {
            return Err("it must have 1 to 128 characters");
        }
        if s.as_bytes()[0].is_ascii_digit() {
            return Err("it must not start with a digit");
        }
        if !s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err("only letters, digits and underscores are allowed");
        }
        Ok(())
    }
}
validated! {
    /// Where a source repository is: an `https`, `http`, `ssh` or `file` URL, or an absolute path.
    ///
    /// It carries no password: credentials are configured where they are used and never enter the
    /// ledger. Which schemes and addresses are *allowed* is decided by the worker that clones.
    RepositoryUrl, "repository URL", "invalid_repository_url",
    pattern = "^(https?://|ssh://|file:///|/).+$", |s| {
        if s.is_empty() || s.len() > 1024 {
            return Err("it must have 1 to 1024 characters");
        }
        if is_plain_address(s) {
            return Ok(());
        }
        if s.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err("white space and control characters are not allowed");
        }
        if s.starts_with('/') {
            return if s.split('/').any(|p| p == "..") {
                Err("a path must not contain `..`")
            } else {
                Ok(())
            };
        }
        let Ok(url) = url::Url::parse(s) else {
            return Err("it must be a URL (https://, ssh://, file:///) or an absolute path");
        };
        if !matches!(url.scheme(), "https" | "http" | "ssh" | "file") {
            return Err("only https, http, ssh and file URLs are allowed");
        }
        if url.password().is_some() {
            return Err("it must not contain a password or token; configure credentials instead");
        }
        if url.scheme() != "ssh" && !url.username().is_empty() {
            return Err("it must not contain a user name; configure credentials instead");
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("a query or fragment is not allowed");
        }
        // URL parsers disagree on what these mean; git reads them otherwise than they look.
        if s.contains('\\') || !s.contains("://") {
            return Err("it must be written scheme://host/path");
        }
        let no_host = s.split_once("://").is_none_or(|(_, rest)| rest.starts_with('/'));
        if url.scheme() != "file" && (no_host || url.host_str().is_none_or(str::is_empty)) {
            return Err("it has no host");
        }
        if url.host_str().is_some_and(|h| h.starts_with('-')) || url.username().starts_with('-') {
            return Err("host and user must not start with a hyphen");
        }
        Ok(())
    }
}

/// Whether a text is an `https` URL of an ordinary form, which needs no parser to be known as one:
/// a host of labels that begin with letters, and a path of letters, digits and `-._~/`.
fn is_plain_address(s: &str) -> bool {
    let Some((host, path)) = s
        .strip_prefix("https://")
        .and_then(|rest| rest.split_once('/'))
    else {
        return false;
    };
    let is_label = |label: &str| {
        label.starts_with(|c: char| c.is_ascii_lowercase())
            && label.len() < 64
            && !label.ends_with('-')
            // What has two hyphens may be an encoded one.
            && !label.contains("--")
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    host.len() < 254
        && host.split('.').all(is_label)
        && path
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~' | b'/'))
}

/// What stands for a server in the URLs of sources that were uploaded to Daybook itself. No name
/// server knows it: where it leads is for the workers to say, and the ledger stays true when Daybook
/// moves.
const UPLOADS: &str = "https://uploads.daybook/";

impl RepositoryUrl {
    /// Where sources are that were uploaded for a service: `https://uploads.daybook/shop/web.git`.
    pub fn of_uploads(project: &ProjectName, service: &ServiceName) -> Self {
        Self(Text::from(format!("{UPLOADS}{project}/{service}.git")))
    }

    /// Whose uploads these are; none if it is a repository of somebody else.
    pub fn uploads_for(&self) -> Option<(ProjectName, ServiceName)> {
        let (project, service) = self.0.strip_prefix(UPLOADS)?.split_once('/')?;
        let service = service.strip_suffix(".git")?;
        Some((
            ProjectName::parse(project).ok()?,
            ServiceName::parse(service).ok()?,
        ))
    }

    /// Whether it is on the host that stands for Daybook itself, in whatever form.
    pub fn is_on_uploads(&self) -> bool {
        let host = UPLOADS.trim_start_matches("https://").trim_end_matches('/');
        url::Url::parse(&self.0).is_ok_and(|url| {
            let named = url.host_str().unwrap_or_default();
            named.trim_end_matches('.').eq_ignore_ascii_case(host)
        })
    }
}

impl CommitId {
    /// The first seven digits, as people write it and as images are tagged.
    pub fn short(&self) -> &str {
        &self.0[..7]
    }
}

impl Digest {
    /// The hexadecimal digits without the algorithm.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The digest of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self::from_sha256(&sha2::Sha256::digest(bytes).into())
    }

    /// The digest with this SHA-256 value.
    pub fn from_sha256(hash: &[u8; 32]) -> Self {
        use fmt::Write as _;
        let mut s = String::with_capacity(71);
        s.push_str("sha256:");
        for b in hash {
            let _ = write!(s, "{b:02x}");
        }
        Self(s.into())
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// An id derived from a cause and a step (UUID v5): the same step of the same cause
            /// always has the same id, so that a retry is recognised.
            pub fn derived(cause: Uuid, step: &str) -> Self {
                Self(Uuid::new_v5(&cause, step.as_bytes()))
            }

            /// The last eight digits: short enough for a table, and random in a UUID v7.
            pub fn short(&self) -> String {
                let s = self.0.simple().to_string();
                s[24..].to_owned()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, uuid::Error> {
                s.parse().map(Self)
            }
        }
    };
}

uuid_id! {
    /// Identifies one deployment: one release of one service instance.
    DeploymentId
}
uuid_id! {
    /// Identifies one build. Derived from commit and configuration, so that deployments of the
    /// same commit and configuration share it.
    BuildId
}
uuid_id! {
    /// Identifies one subscription: a webhook that events are sent to.
    SubscriptionId
}
uuid_id! {
    /// Identifies one event, and is its message id in the log.
    EventId
}

impl EventId {
    /// The id under which an event is appended anew whose first one is void: the log never takes
    /// an id again, and whoever repeats the step has to come to the same one.
    #[must_use]
    pub fn in_its_stead(self) -> Self {
        Self::derived(self.0, "in its stead")
    }
}

/// One service in one environment of one project: what is deployed to.
///
/// Its text form is `project.environment.service`; as none of the names contains a dot, two
/// different instances never have the same text.
#[derive(
    Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize, JsonSchema,
)]
pub struct InstanceRef {
    /// The project.
    pub project: ProjectName,
    /// The environment.
    pub environment: EnvironmentName,
    /// The service.
    pub service: ServiceName,
}

impl InstanceRef {
    /// Looks something up by the text form, for which no memory is needed.
    pub(crate) fn with_text<T>(&self, look: impl FnOnce(&str) -> T) -> T {
        let names = [
            self.project.as_str(),
            self.environment.as_str(),
            self.service.as_str(),
        ];
        let mut text = [b'.'; 3 * NAME_MAX + 2];
        let mut end = 0;
        for name in names {
            let begin = end + usize::from(end > 0);
            end = begin + name.len();
            text[begin..end].copy_from_slice(name.as_bytes());
        }
        // It is made of names, each of which is ASCII.
        look(std::str::from_utf8(&text[..end]).unwrap_or_default())
    }
}

impl fmt::Display for InstanceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.project, self.environment, self.service)
    }
}

impl FromStr for InstanceRef {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let mut parts = s.split('.');

        let (Some(p), Some(e), Some(v), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidName {
                what: "instance id",
                code: "invalid_instance_id",
                value: without_credentials(s).chars().take(80).collect(),
                rule: "it must be project.environment.service",
            });
        };
        Ok(Self {
            project: ProjectName::parse(p)?,
            environment: EnvironmentName::parse(e)?,
            service: ServiceName::parse(v)?,
        })
    }
}
