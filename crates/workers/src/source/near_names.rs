//! Names that somebody may have meant.

/// Up to five names that are near to one that does not exist, nearest first.
pub(super) fn near(wanted: &str, names: impl IntoIterator<Item = String>) -> Vec<String> {
    let lower = wanted.to_lowercase();
    let last = lower.rsplit('/').next().unwrap_or(&lower).to_owned();
    let mut scored: Vec<(usize, String)> = names
        .into_iter()
        .filter_map(|name| {
            let other = name.to_lowercase();
            let distance = edit_distance(&lower, &other);
            let score = if other == lower || other == last {
                0
            } else if distance <= (lower.chars().count() / 3).max(1) {
                distance
            } else if last.len() >= 3 && other.contains(&last)
                || other.len() >= 3 && lower.contains(&other)
            {
                10 + distance
            } else {
                return None;
            };
            Some((score, name))
        })
        .collect();
    scored.sort();
    scored.dedup();
    scored.into_iter().take(5).map(|(_, name)| name).collect()
}

/// Levenshtein distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found_and_far_ones_left_out() {
        let names = || {
            ["main", "develop", "feature/login", "v1.2.3", "v1.2.4"]
                .into_iter()
                .map(str::to_owned)
        };
        assert_eq!(near("mian", names()), Vec::<String>::new());
        assert_eq!(near("maim", names()), ["main"]);
        assert_eq!(near("Main", names()), ["main"]);
        assert_eq!(near("origin/main", names()), ["main"]);
        assert_eq!(near("login", names()), ["feature/login"]);
        assert_eq!(near("v1.2.5", names()), ["v1.2.3", "v1.2.4"]);
        assert!(near("master", names()).is_empty());
    }
}
