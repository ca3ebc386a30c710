//! Errors in one line, for people and for the ledger.

use std::error::Error;

/// An error with all that led to it, outermost first, joined by `: `. What an outer message
/// already says is not said again.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Layer {
        let (first, rest) = texts.split_first().expect("a layer at least");
        Layer {
            text: first,
            source: (!rest.is_empty()).then(|| Box::new(layers(rest))),
        }
    }

    #[test]
    fn causes_follow_and_are_said_once() {
        let error = layers(&["no append", "the log is away", "refused"]);
        assert_eq!(with_causes(&error), "no append: the log is away: refused");
        let error = layers(&["no append: refused", "refused"]);
        assert_eq!(with_causes(&error), "no append: refused");
    }
}
