//! Commits that wait for the same repository are made together.
//!
//! Whoever wants a commit puts it into a queue; the first one to find nobody at it starts a leader,
//! which takes all that wait, makes a commit of each in memory, one on top of the other, writes
//! their objects as one pack, and moves the branch once. So however many there are, they are synced
//! as often as one would be. Nobody gets an answer before all that it says is on the disk, and on
//! the remote where there is one. What cannot be done fails alone.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use daybook_events::{CommitId, EventId};
use daybook_failpoints::reached;
use daybook_trace::Carrier;
use git2::{Oid, Repository};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::history::{self, commit_id};
use super::making::{self, Made, Making};
use super::message::Author;
use super::publish::{Moved, swap};
use super::repository::{
    CommitRequest, Committed, Inner, MAX_ATTEMPTS, RevertRequest, Witness, find, pause,
};
use super::{GitopsError, pack};
use crate::git_transport::Session;

/// How many commits are made together at most.
const MAX_GROUP: usize = 256;
/// How much is written together, in bytes before it is compressed. What comes then waits.
const MAX_BYTES: usize = 32 << 20;
/// How long a leader waits for those whom it just answered to come back, when there were several:
/// without it every second group would be the few who were fast.
const PATIENCE: Duration = Duration::from_micros(500);
/// After this long the right to write is given up for a moment, for other processes and for those
/// who read from the remote.
const RULE: Duration = Duration::from_secs(1);
const BREAK: Duration = Duration::from_millis(25);

type Answer = Result<Committed, GitopsError>;

/// What is asked for.
pub(super) enum Wanted {
    /// A change.
    Change(Box<CommitRequest>),
    /// A commit to be undone.
    Revert(Box<RevertRequest>),
}

impl Wanted {
    fn event(&self) -> EventId {
        match self {
            Self::Change(request) => request.event,
            Self::Revert(request) => request.event,
        }
    }

    fn author(&self) -> &Author {
        match self {
            Self::Change(request) => &request.author,
            Self::Revert(request) => &request.author,
        }
    }

    fn witness(&self) -> &Witness {
        match self {
            Self::Change(request) => &request.witness,
            Self::Revert(request) => &request.witness,
        }
    }
}

struct Job {
    wanted: Wanted,
    cancel: CancellationToken,
    /// The unit of work that waits for it.
    carrier: Carrier,
    answer: oneshot::Sender<Answer>,
}

impl Job {
    fn answer(self, answer: Answer) {
        // That ends with who waits for it, and not with this.
        drop(self.carrier);
        // Who stopped waiting finds the commit when it asks again.
        let _ = self.answer.send(answer);
    }
}

/// Those who wait for their commit.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    led: bool,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a job in; says whether somebody has to lead now.
    fn put(&self, job: Job) -> bool {
        let mut waiting = self.waiting();
        waiting.jobs.push_back(job);
        self.arrived.notify_one();
        !mem::replace(&mut waiting.led, true)
    }

    /// Waits a moment until there are as many as there were before.
    fn gather(&self, before: usize) {
        if before < 2 {
            return;
        }
        let few = |waiting: &mut Waiting| waiting.jobs.len() < before;
        let waited = self
            .arrived
            .wait_timeout_while(self.waiting(), PATIENCE, few);
        drop(waited);
    }

    /// The next ones: several changes, or one commit to be undone.
    fn take(&self) -> Vec<Job> {
        let mut waiting = self.waiting();
        let mut taken: Vec<Job> = Vec::new();
        while taken.len() < MAX_GROUP {
            match (waiting.jobs.front().map(|job| &job.wanted), taken.len()) {
                (Some(Wanted::Revert(_)), 0) => {
                    taken.extend(waiting.jobs.pop_front());
                    break;
                }
                (Some(Wanted::Change(_)), _) => taken.extend(waiting.jobs.pop_front()),
                _ => break,
            }
        }
        taken
    }

    fn put_back(&self, jobs: Vec<Job>) {
        let mut waiting = self.waiting();
        for job in jobs.into_iter().rev() {
            waiting.jobs.push_front(job);
        }
    }

    /// Lets those go who wait no more, and says whether others do.
    fn sift(&self) -> bool {
        let mut waiting = self.waiting();
        let (gone, left) = mem::take(&mut waiting.jobs)
            .into_iter()
            .partition(|job| job.cancel.is_cancelled());
        waiting.jobs = left;
        let left = !waiting.jobs.is_empty();
        drop(waiting);
        let gone: VecDeque<Job> = gone;
        for job in gone {
            job.answer(Err(GitopsError::Cancelled));
        }
        left
    }

    /// Ends a leader's work if nobody waits.
    fn ends(&self) -> bool {
        let mut waiting = self.waiting();
        waiting.led = !waiting.jobs.is_empty();
        !waiting.led
    }
}

/// The duty to answer all who wait. Should its holder die, nobody is left waiting.
struct Leadership {
    inner: Arc<Inner>,
    is_over: bool,
}

impl Leadership {
    fn carry_out(mut self) {
        self.inner.lead();
        // From here on somebody else may have it.
        self.is_over = true;
    }
}

impl Drop for Leadership {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mut waiting = self.inner.queue.waiting();
        waiting.led = false;
        // Their answers end unsent.
        let jobs = mem::take(&mut waiting.jobs);
        drop(waiting);
        drop(jobs);
    }
}

/// Has a commit made, together with those that others want at the same time.
pub(super) async fn submit(
    inner: &Arc<Inner>,
    wanted: Wanted,
    cancel: &CancellationToken,
) -> Answer {
    let cancel = cancel.child_token();
    // Dropping the future stops the work, if it was for nobody else.
    let _stopped = cancel.clone().drop_guard();
    let (answer, answered) = oneshot::channel();
    let job = Job {
        wanted,
        cancel,
        carrier: daybook_trace::carrier(),
        answer,
    };
    if inner.queue.put(job) {
        let leadership = Leadership {
            inner: inner.clone(),
            is_over: false,
        };
        tokio::task::spawn_blocking(move || leadership.carry_out());
    }
    answered.await.unwrap_or(Err(GitopsError::Interrupted))
}

impl Inner {
    /// Makes commits until nobody waits for one.
    fn lead(&self) {
        let mut begun = Instant::now();
        let mut together = 0;
        loop {
            self.queue.gather(together);
            if self.queue.ends() {
                return;
            }
            if begun.elapsed() > RULE {
                std::thread::sleep(BREAK);
                begun = Instant::now();
            }
            let waiting = || match self.queue.sift() {
                true => Ok(()),
                false => Err(GitopsError::Cancelled),
            };
            // Whoever comes while it is waited for is taken along.
            match self.lock(waiting) {
                Ok(_lock) => {
                    let jobs = self.queue.take();
                    together = jobs.len();
                    self.answer(jobs);
                    self.tidy();
                }
                Err(GitopsError::Cancelled) => together = 0,
                Err(error) => {
                    let jobs = self.queue.take();
                    answer_all(jobs, error);
                }
            }
        }
    }

    /// Makes the commits of these jobs. What the remote is asked for all of them is a part of the
    /// first one's unit of work.
    fn answer(&self, jobs: Vec<Job>) {
        let (gone, jobs): (Vec<Job>, Vec<Job>) =
            jobs.into_iter().partition(|job| job.cancel.is_cancelled());
        for job in gone {
            job.answer(Err(GitopsError::Cancelled));
        }
        let Some(first) = jobs.first() else {
            return;
        };
        let (session, _watch) = self.session_of(&jobs);
        let making = || self.with(|repository| self.make(repository, &session, &jobs));
        match first.carrier.run(making) {
            Ok(answers) => {
                let mut left = jobs.into_iter();
                for (answer, job) in answers.into_iter().zip(left.by_ref()) {
                    job.answer(answer);
                }
                self.queue.put_back(left.collect());
            }
            // A hook may be against one of them. Which one, it says of each alone.
            Err(GitopsError::PushRefused { .. }) if jobs.len() > 1 => {
                for job in jobs {
                    self.answer(vec![job]);
                }
            }
            Err(error) => answer_all(jobs, error),
        }
    }

    /// A session that ends when the last one stops waiting.
    fn session_of(&self, jobs: &[Job]) -> (Session, Option<AbortOnDropHandle<()>>) {
        if let [job] = jobs {
            return (self.session(&job.cancel), None);
        }
        let all = CancellationToken::new();
        let session = self.session(&all);
        if self.remote.is_none() {
            return (session, None);
        }
        let tokens: Vec<_> = jobs.iter().map(|job| job.cancel.clone()).collect();
        let watch = Handle::current().spawn(async move {
            for token in tokens {
                token.cancelled().await;
            }
            all.cancel();
        });
        (session, Some(AbortOnDropHandle::new(watch)))
    }

    /// Makes the commits of these jobs, writes them and moves the branch. There are fewer answers
    /// than jobs if there was too much to be written at once.
    fn make(
        &self,
        repository: &Repository,
        session: &Session,
        jobs: &[Job],
    ) -> Result<Vec<Answer>, GitopsError> {
        for attempt in 0..MAX_ATTEMPTS {
            session.check_cancelled()?;
            let base = self.head(repository)?;
            let ordinal = self.index().ordinal(repository, base)?;
            if attempt == 0 && self.catches_up(repository, session, base, jobs)? {
                continue;
            }
            let lately = mem::take(&mut *self.lately());
            let on = Some((base, ordinal));
            let mut making =
                Making::on(on, repository, &self.project, self.key.as_deref(), lately)?;
            let answers = self.make_each(repository, (base, ordinal), &mut making, jobs)?;
            let commits = making.commits().to_vec();
            let tip = making.tip().filter(|_| !commits.is_empty());
            let (objects, lately) = making.into_staged().into_parts();
            *self.lately() = lately;
            let Some(tip) = tip else {
                return Ok(answers);
            };
            reached("gitops.commit.before");
            let packs = self.packs();
            pack::write(&packs, &objects).map_err(GitopsError::disk(&packs))?;
            self.count_pack();
            reached("gitops.commit.written");
            let moved = match &self.remote {
                None => swap(repository, Some(base), tip)?,
                Some(remote) => remote.publish(repository, session, base, tip)?,
            };
            reached("gitops.commit.after");
            if moved == Moved::Yes {
                self.index().extend(base, &commits);
                self.remember(commits.iter().map(|(_, commit)| *commit));
                return Ok(answers);
            }
            if attempt > 0 {
                pause(attempt, session)?;
            }
            if let Some(remote) = &self.remote {
                remote.follow(repository, session)?;
            }
        }
        Err(GitopsError::Contended {
            attempts: MAX_ATTEMPTS,
        })
    }

    /// Where the branch lacks what the ledger records, another machine may have pushed that and
    /// recorded it before it is known here. Returns whether the remote was asked.
    fn catches_up(
        &self,
        repository: &Repository,
        session: &Session,
        base: Oid,
        jobs: &[Job],
    ) -> Result<bool, GitopsError> {
        let Some(remote) = &self.remote else {
            return Ok(false);
        };
        for job in jobs {
            let Some(expected) = &job.wanted.witness().after else {
                continue;
            };
            if self.contains(repository, base, expected)? {
                continue;
            }
            match remote.follow(repository, session) {
                // Somebody accepted that the remote's history is another one.
                Err(GitopsError::Diverged { remote, .. })
                    if contains(repository, find(repository, &remote)?, expected)? =>
                {
                    swap(repository, Some(base), find(repository, &remote)?)?;
                }
                other => drop(other?),
            }
            return Ok(true);
        }
        Ok(false)
    }

    fn make_each(
        &self,
        repository: &Repository,
        (base, ordinal): (Oid, u64),
        making: &mut Making<'_>,
        jobs: &[Job],
    ) -> Result<Vec<Answer>, GitopsError> {
        let mut answers: Vec<Answer> = Vec::with_capacity(jobs.len());
        // What was made here, by the event that caused it, and the newest of it.
        let mut made: HashMap<EventId, usize> = HashMap::new();
        let mut newest: Option<Committed> = None;
        for job in jobs {
            if making.bytes() > MAX_BYTES {
                break;
            }
            let event = job.wanted.event();
            let twin = made.get(&event).and_then(|at| answers.get(*at));
            let answer = match twin {
                Some(Ok(done)) => Ok(Committed {
                    found: true,
                    ..done.clone()
                }),
                _ => match self.make_one(repository, base, making, job) {
                    Ok(One::Found(done)) => Ok(*done),
                    Ok(One::Made(Made::Commit(done))) => {
                        made.insert(event, answers.len());
                        newest = Some(Committed::clone(&done));
                        Ok(*done)
                    }
                    Ok(One::Made(Made::Nothing { title })) => {
                        let has_it = match &newest {
                            Some(newest) => newest.clone(),
                            None => self.committed(repository, base, ordinal)?,
                        };
                        Ok(making::unchanged(has_it, title, job.wanted.author()))
                    }
                    Err(error) => Err(error),
                },
            };
            answers.push(answer);
        }
        Ok(answers)
    }

    fn make_one(
        &self,
        repository: &Repository,
        base: Oid,
        making: &mut Making<'_>,
        job: &Job,
    ) -> Result<One, GitopsError> {
        if job.cancel.is_cancelled() {
            return Err(GitopsError::Cancelled);
        }
        let witness = job.wanted.witness();
        if let Some(expected) = &witness.after
            && !self.contains(repository, base, expected)?
        {
            return Err(GitopsError::HistoryRewritten {
                expected: expected.clone(),
                found: commit_id(base)?,
            });
        }
        let event = job.wanted.event();
        if let Some(found) = self.made_for(repository, base, event, witness)? {
            return Ok(One::Found(Box::new(found)));
        }
        Ok(One::Made(match &job.wanted {
            Wanted::Change(request) => making.change(request)?,
            Wanted::Revert(request) => making.revert(request)?,
        }))
    }

    /// The commit in the history of `base` that an earlier try made for an event.
    pub(super) fn made_for(
        &self,
        repository: &Repository,
        base: Oid,
        event: EventId,
        witness: &Witness,
    ) -> Result<Option<Committed>, GitopsError> {
        let signers = making::signers(self.key.as_deref(), witness)?;
        let found = self
            .index()
            .find(repository, base, event, signers.as_deref())?;
        let Some(found) = found else {
            return Ok(None);
        };
        let ordinal = history::ordinal_of(repository, found)?;
        Ok(Some(Committed {
            found: true,
            ..self.committed(repository, found, ordinal)?
        }))
    }

    /// Whether a commit is in the history of the branch.
    fn contains(
        &self,
        repository: &Repository,
        base: Oid,
        commit: &CommitId,
    ) -> Result<bool, GitopsError> {
        let id = Oid::from_str(commit.as_str())?;
        if self.index().has(repository, base, id)? {
            return Ok(true);
        }
        contains(repository, base, commit)
    }
}

/// What became of one job before anything is written.
enum One {
    /// An earlier try had made it.
    Found(Box<Committed>),
    Made(Made),
}

/// Tells all the same.
fn answer_all(jobs: Vec<Job>, error: GitopsError) {
    match <[Job; 1]>::try_from(jobs) {
        Ok([job]) => job.answer(Err(error)),
        Err(jobs) => {
            let error = Arc::new(error);
            for job in jobs {
                job.answer(Err(GitopsError::Shared(error.clone())));
            }
        }
    }
}

/// Whether a commit is in the history of another one.
fn contains(repository: &Repository, head: Oid, commit: &CommitId) -> Result<bool, GitopsError> {
    let commit = Oid::from_str(commit.as_str())?;
    Ok(history::is_ancestor(repository, commit, head)?)
}
