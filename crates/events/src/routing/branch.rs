//! The address of a branch: it leads to the newest ready deployment of that branch.

use sha2::{Digest as _, Sha256};

use crate::names::GitRef;

/// The longest part of a branch's name that stands in its address.
const READABLE: usize = 40;
/// How many hexadecimal digits tell names apart that read alike.
const DIGITS: usize = 10;

/// A branch as a DNS label of at most 51 characters.
///
/// A name that is a label itself stays as it is. One that has to be changed, that is too long, or
/// that could be taken for a deployment's short id or for a changed name, ends in digits of its
/// hash: so two branches of a service never share a label, but for names that somebody searched
/// out to have the same digits.
pub fn branch_label(branch: &GitRef) -> String {
    let name = branch.as_str();
    let name = name.strip_prefix("refs/heads/").unwrap_or(name);
    let mut label = String::with_capacity(name.len());
    for c in name.chars() {
        match c.to_ascii_lowercase() {
            c if c.is_ascii_alphanumeric() => label.push(c),
            _ if label.is_empty() || label.ends_with('-') => {}
            _ => label.push('-'),
        }
    }
    let label = label.trim_end_matches('-');
    let short_id = label.len() == 8 && is_hex(label);
    let digits = label.rsplit_once('-').map(|(_, end)| end);
    let changed = digits.is_some_and(|end| end.len() == DIGITS && is_hex(end));
    if label == name && label.len() <= READABLE && !short_id && !changed {
        return label.to_owned();
    }
    let hash = Sha256::digest(name.as_bytes());
    let hash: String = hash
        .iter()
        .take(DIGITS / 2)
        .map(|b| format!("{b:02x}"))
        .collect();
    let readable = label.get(..READABLE).unwrap_or(label).trim_end_matches('-');
    match readable {
        "" => format!("branch-{hash}"),
        readable => format!("{readable}-{hash}"),
    }
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn label(name: &str) -> String {
        branch_label(&GitRef::parse(name).unwrap())
    }

    #[test]
    fn a_branch_that_is_a_label_keeps_its_name() {
        for name in ["main", "fix-42", "2024", "release-1a2b3c", "a"] {
            assert_eq!(label(name), name);
        }
        assert_eq!(label("refs/heads/main"), "main");
    }

    #[test]
    fn branches_that_read_alike_have_labels_of_their_own() {
        let long = "a".repeat(60);
        let names = [
            "feature/login",
            "feature-login",
            "Feature/Login",
            "feature_login",
            "feature--login",
            "feature/login/",
            "1234abcd",
            "1234ABCD",
            "ünïcode",
            "üüü",
            "ÿÿÿ",
            &long,
            "x-0123456789",
        ];
        let names: Vec<_> = names
            .into_iter()
            .filter(|n| GitRef::parse(*n).is_ok())
            .collect();
        let labels: BTreeSet<_> = names.iter().map(|n| label(n)).collect();
        assert_eq!(labels.len(), names.len(), "{labels:?}");
        assert!(label("feature/login").starts_with("feature-login-"));
        // None can be named so that it gets the label of another one.
        let taken = label("feature/login");
        assert_ne!(label(&taken), taken);
    }

    proptest! {
        #[test]
        fn every_branch_has_a_label_that_is_no_short_id(name in "[a-zA-Z0-9/_.ü-]{1,80}") {
            if let Ok(branch) = GitRef::parse(name) {
                let label = branch_label(&branch);
                prop_assert!(label.len() <= READABLE + 1 + DIGITS);
                let hostname = format!("{label}.localhost");
                prop_assert!(crate::names::Hostname::parse(hostname).is_ok());
                prop_assert!(!(label.len() == 8 && is_hex(&label)), "{}", label);
            }
        }
    }
}
