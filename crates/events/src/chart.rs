//! Helm charts and their versions, as they are asked for.

use crate::names::validated;

validated! {
    /// A Helm chart in its repository: `https://host[:port]/path/name` or
    /// `oci://host[:port]/path/name`, without credentials.
    ChartReference, "chart", "invalid_chart",
    pattern = "^(https|oci)://[^/@?#%\\\\\\s]+(/[^/@?#%\\\\\\s]+)*/[a-z0-9][a-z0-9._-]*$", |s| {
        if s.len() > 255 {
            return Err("at most 255 characters are allowed");
        }
        let Some(rest) = s.strip_prefix("https://").or_else(|| s.strip_prefix("oci://")) else {
            return Err("it must begin with https:// or oci://");
        };
        if rest.contains('@') {
            return Err("credentials do not belong here");
        }
        if rest.chars().any(|c| c.is_whitespace() || c.is_control() || "?#%\\".contains(c)) {
            return Err("white space, control characters and ? # % \\ are not allowed");
        }
        let mut parts = rest.split('/');
        if !parts.next().is_some_and(is_host) {
            return Err("it must name a host, with a port or without");
        }
        let Some(name) = parts.next_back() else {
            return Err("it must end with the name of a chart");
        };
        if parts.any(|p| p.is_empty() || p == "." || p == "..") {
            return Err("no part of it may be empty, `.` or `..`");
        }
        let starts = name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        if !starts || !name.bytes().all(fits) {
            return Err("a chart's name has lowercase letters, digits, hyphens, dots and underscores");
        }
        Ok(())
    }
}

validated! {
    /// The version of a Helm chart: one exact version as Semantic Versioning 2 has it, with or
    /// without a `v` before it as Helm takes it, and no range.
    ChartVersion, "chart version", "invalid_chart_version",
    pattern = "^v?(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)(-[0-9A-Za-z.-]+)?(\\+[0-9A-Za-z.-]+)?$", |s| {
        if s.len() > 128 {
            return Err("at most 128 characters are allowed");
        }
        let text = s.strip_prefix('v').unwrap_or(s);
        let (text, build) = text.split_once('+').map_or((text, None), |(t, b)| (t, Some(b)));
        let (core, pre) = text.split_once('-').map_or((text, None), |(c, p)| (c, Some(p)));
        let number = |p: &str| {
            let digits = !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit());
            digits && (p.len() == 1 || !p.starts_with('0'))
        };
        if core.split('.').count() != 3 || !core.split('.').all(number) {
            return Err("it must be one exact version, such as 1.2.3");
        }
        let word = |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let leading = |p: &str| p.len() > 1 && p.starts_with('0') && p.bytes().all(|b| b.is_ascii_digit());
        if pre.is_some_and(|pre| pre.split('.').any(leading)) {
            return Err("numbers of a pre-release have no leading zeros");
        }
        let words = |part: Option<&str>| part.is_none_or(|p| p.split('.').all(word));
        if !words(pre) || !words(build) {
            return Err("what follows - and + must be letters, digits and hyphens between dots");
        }
        Ok(())
    }
}

/// Whether a text is a host's name or address, with a port or without.
fn is_host(text: &str) -> bool {
    let (host, port) = text
        .split_once(':')
        .map_or((text, None), |(h, p)| (h, Some(p)));
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'.' || b == b'-';
    let begins = host.starts_with(|c: char| c.is_ascii_alphanumeric());
    begins && host.bytes().all(fits) && port.is_none_or(|p| p.parse::<u16>().is_ok_and(|p| p > 0))
}
