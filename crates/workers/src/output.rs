//! Lines of output on their way to whoever keeps them.

use tokio::sync::mpsc;

/// The longest line that is passed on, in bytes. Longer ones are cut and say so.
pub const MAX_LINE: usize = 16 * 1024;

/// What is put behind a line that was cut.
const CUT: &str = " … (cut)";

/// Where a build or an upload tells, line by line, what it does while it does it.
///
/// The channel behind it is bounded: a reader that is slower than the output slows the output
/// down and loses nothing. When the reader is gone the lines are dropped and the work goes on.
#[derive(Debug, Clone)]
pub struct LineSender {
    lines: mpsc::Sender<String>,
}

impl LineSender {
    /// A sender and the receiver of its lines, which holds at most `capacity` of them.
    pub fn channel(capacity: usize) -> (Self, mpsc::Receiver<String>) {
        let (lines, receiver) = mpsc::channel(capacity.max(1));
        (Self { lines }, receiver)
    }

    /// A sender whose lines nobody reads.
    pub fn discard() -> Self {
        Self::channel(1).0
    }

    /// Sends one line, waiting until there is room for it.
    pub async fn send(&self, line: impl Into<String>) {
        // A reader that has gone away is no reason to stop the work.
        let _ = self.lines.send(shortened(line.into())).await;
    }

    /// Sends one line from code that may block.
    ///
    /// # Panics
    /// Within an asynchronous context, as [`mpsc::Sender::blocking_send`] does.
    pub fn blocking_send(&self, line: impl Into<String>) {
        let _ = self.lines.blocking_send(shortened(line.into()));
    }
}

impl From<mpsc::Sender<String>> for LineSender {
    fn from(lines: mpsc::Sender<String>) -> Self {
        Self { lines }
    }
}

/// The line, cut to [`MAX_LINE`] bytes at a character's border.
fn shortened(mut line: String) -> String {
    if line.len() > MAX_LINE {
        let mut end = MAX_LINE - CUT.len();
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        line.push_str(CUT);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_line_is_cut_at_a_character() {
        let (sender, mut lines) = LineSender::channel(1);
        sender.send("ä".repeat(MAX_LINE)).await;
        let line = lines.recv().await.unwrap();
        assert!(line.len() <= MAX_LINE, "{} bytes", line.len());
        assert!(line.ends_with(CUT));
    }

    #[tokio::test]
    async fn a_reader_that_has_gone_stops_nothing() {
        let sender = LineSender::discard();
        for _ in 0..3 {
            sender.send("nobody reads this").await;
        }
    }
}
