//! Output on its way to where it is kept, with every secret of its project masked.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::ProjectName;
use daybook_events::lines::{Line, LineLog, LineSource, NewLine};
use daybook_events::log::ReadError;
use futures_util::stream::BoxStream;

use crate::masker::Masker;
use crate::store::SecretStore;

/// Says whose output it is. None where that is not known; such output is masked against the
/// secrets of all projects.
pub type ProjectOf = Arc<dyn Fn(LineSource) -> Option<ProjectName> + Send + Sync>;

/// Lines that are this long or longer may have been cut.
const CUT_FROM: usize = 16 * 1024 - 256;
/// What is put behind a line that was cut begins like this, and is not longer than that.
const CUT_MARKS: [&str; 2] = [" [cut: ", " … ("];
const CUT_MARK_MAX: usize = 64;

/// A [`LineLog`] that masks the output that is appended, and lets everything else through.
///
/// The lines of a subscription are no output but the record of whoever delivers, which is read
/// again: a secret with the value `delivered` would make it unreadable. What receivers and errors
/// say is masked before it gets into such a line.
pub struct MaskedLines {
    inner: Arc<dyn LineLog>,
    secrets: Arc<dyn SecretStore>,
    project_of: ProjectOf,
}

impl fmt::Debug for MaskedLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MaskedLines")
            .field("inner", &self.inner)
            .field("secrets", &self.secrets)
            .finish_non_exhaustive()
    }
}

impl MaskedLines {
    /// Masks what goes to `inner`.
    pub fn new(
        inner: Arc<dyn LineLog>,
        secrets: Arc<dyn SecretStore>,
        project_of: ProjectOf,
    ) -> Self {
        Self {
            inner,
            secrets,
            project_of,
        }
    }
}

/// A line with its secrets masked. One that was cut may end in the middle of a secret.
fn masked(masker: &Masker, text: &str) -> String {
    if text.len() < CUT_FROM {
        return masker.mask(text).into_owned();
    }
    let marks = CUT_MARKS.iter().filter_map(|mark| text.rfind(mark));
    let end = marks
        .filter(|at| text.len() - at <= CUT_MARK_MAX)
        .max()
        .unwrap_or(text.len());
    let (line, mark) = text.split_at(end);
    format!("{}{mark}", masker.mask_beginning(line))
}

#[async_trait]
impl LineLog for MaskedLines {
    async fn append(&self, source: LineSource, mut lines: Vec<NewLine>) -> Result<u64, ReadError> {
        if let LineSource::Subscription(_) = source {
            return self.inner.append(source, lines).await;
        }
        let project = (self.project_of)(source);
        let masker = self.secrets.masker_or_withhold(project.as_ref());
        for line in &mut lines {
            line.text = masked(&masker, &line.text);
        }
        self.inner.append(source, lines).await
    }

    async fn read(
        &self,
        source: LineSource,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Line>, ReadError> {
        self.inner.read(source, after, limit).await
    }

    async fn follow(
        &self,
        source: LineSource,
        after: u64,
    ) -> Result<BoxStream<'static, Result<Line, ReadError>>, ReadError> {
        self.inner.follow(source, after).await
    }

    async fn last(&self, source: LineSource) -> Result<u64, ReadError> {
        self.inner.last(source).await
    }
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;
    use crate::value::SecretValue;

    #[test]
    fn a_secret_at_the_end_of_a_line_that_was_cut_is_masked() {
        let secret = "correct-horse-battery-staple";
        let value = SecretValue::new(Zeroizing::new(secret.to_owned())).unwrap();
        let masker = Masker::new([&value]);
        for mark in [
            " [cut: the line is longer than 16 KiB]",
            " … (cut)",
            " … (517 bytes cut)",
            "",
        ] {
            for shown in 1..secret.len() {
                let filler = ".".repeat(16 * 1024 - mark.len() - shown);
                let line = format!("{filler}{}{mark}", &secret[..shown]);
                assert_eq!(masked(&masker, &line), format!("{filler}***{mark}"));
            }
        }
        assert_eq!(masked(&masker, "a corre"), "a corre");
    }
}
