//! A project's GitOps repository: the desired state of its environments, and the history of who
//! changed it.
//!
//! ```text
//! base/Chart.yaml                      depends on the chart daybook-app
//! base/values.yaml                     what all environments share
//! environments/<environment>/values.yaml
//! ```
//!
//! A [`CommitRequest`] is a change as data: it says what shall be, not which lines to edit. So it
//! can be made again on whatever the branch has become in the meantime, and a commit that somebody
//! else pushed stays and is built upon.
//!
//! # What holds
//! - One request makes one commit, however often it is tried: the commit carries the id of the
//!   event that caused it as a trailer, and is found again by it. This looks back over
//!   [`MEMORY`] commits.
//! - The branch moves only by compare-and-swap, from the commit that the change was made on. Two
//!   processes, or somebody's `git push`, never overwrite each other, and history is linear.
//! - Objects and refs are synced to disk before a commit is reported. Commits that wait for the same
//!   repository are synced together; what is wrong with one of them is only its own failure.
//! - With a remote, a commit is on the remote before it is on the local branch: since there is a
//!   remote, the local branch has no commit that the remote does not. Nothing is ever forced.
//!
//! The trailer is a mark, not a proof: whoever may push can write one. What proves a commit is
//! the event that records it.

mod change;
mod chart;
mod error;
mod group;
mod history;
mod making;
mod message;
mod pack;
mod port;
mod publish;
mod repository;
mod signing;
mod staged;
pub mod survey;
mod template;
mod undone;
pub mod witness;

pub use change::Change;
pub use chart::chart_files;
pub use error::GitopsError;
pub use history::{ChangedFile, CommitRecord, Diff, MEMORY};
pub use message::{ALLOWED_SIGNERS, Author, CHECKPOINT, COMMITTER, LedgerPoint};
pub use port::{GitopsRepositories, Remotes};
pub use publish::Remote;
pub use repository::{BRANCH, CommitRequest, Committed, GitopsRepository, RevertRequest, Witness};
pub use signing::{KeyError, Signer, SigningKey, Verdict, allowed_signers};
