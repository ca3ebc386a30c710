//! The sorted runs of a store: what was folded while it was far behind the log.
//!
//! They lie in a folder, each named by the batches in it. The newest run that knows a row says what it
//! is. Whenever there are several of one size they become one, so that there are never many, and
//! a row is rewritten only as often as the store grows sixteenfold.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sled::IVec;

use crate::run::{Cursor, KeyRange, Row, Run, Writer};
use crate::table::{Rows, TableError, Way};

/// So many runs of one size become one.
const FEW: usize = 16;

/// All runs, as they are at a moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Runs {
    folder: PathBuf,
    /// Oldest first.
    runs: Vec<Member>,
}

#[derive(Debug, Clone)]
struct Member {
    /// The first batch in it, and the one behind its last.
    from: u64,
    to: u64,
    run: Arc<Run>,
}

impl Runs {
    /// Opens the runs in a folder, and removes what an interruption left there. A folder that is not
    /// there has none.
    pub(crate) fn open(folder: &Path) -> Result<Self, TableError> {
        let mut found = Vec::new();
        let entries = match fs::read_dir(folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            entries => Some(entries?),
        };
        for entry in entries.into_iter().flatten() {
            let entry = entry?;
            match entry.file_name().to_str().and_then(batches) {
                Some(batches) => found.push(batches),
                None => fs::remove_file(entry.path())?,
            }
        }
        // Of runs that begin with the same batch the largest one comes first.
        found.sort_by_key(|(from, to)| (*from, std::cmp::Reverse(*to)));
        let (mut runs, mut end) = (Vec::new(), 0);
        for (from, to) in found {
            let path = path(folder, from, to);
            if to <= end {
                fs::remove_file(path)?;
                continue;
            }
            if from != end {
                let why = format!("{} does not follow on the run before it", path.display());
                return Err(TableError::Broken(why));
            }
            let run = Arc::new(Run::open(&path)?);
            runs.push(Member { from, to, run });
            end = to;
        }
        Ok(Self {
            folder: folder.to_owned(),
            runs,
        })
    }

    /// These runs and one more.
    pub(crate) fn with(&self, rows: &Rows) -> Result<Self, TableError> {
        fs::create_dir_all(&self.folder)?;
        let from = self.runs.last().map_or(0, |last| last.to);
        let member = self.write(from, from + 1, rows.len(), |writer| {
            let mut rows = rows.iter();
            rows.try_for_each(|(key, value)| Ok(writer.add(key, value.as_deref())?))
        })?;
        let mut runs = self.clone();
        runs.runs.push(member);
        Ok(runs)
    }

    /// What becomes of the runs when the last of them are made one; none if they are few.
    pub(crate) fn merged(&self) -> Result<Option<Self>, TableError> {
        let Some(first) = self.runs.len().checked_sub(FEW) else {
            return Ok(None);
        };
        let (kept, several) = self.runs.split_at(first);
        let size = |member: &Member| member.to - member.from;
        if several
            .iter()
            .any(|member| size(member) != size(&several[0]))
        {
            return Ok(None);
        }
        let (from, to) = (several[0].from, several[FEW - 1].to);
        let at_most = several.iter().map(|member| member.run.at_most()).sum();
        let mut newest_first = several
            .iter()
            .rev()
            .map(|member| member.run.range(ALL, Way::Up))
            .collect::<Vec<_>>();
        let member = self.write(from, to, at_most, |writer| {
            let mut merge = Merge::new(&mut newest_first)?;
            while let Some((key, value)) = merge.next()? {
                // Below the first run is nothing that a removal could hide.
                if value.is_some() || from > 0 {
                    writer.add(&key, value.as_deref())?;
                }
            }
            Ok(())
        })?;
        for old in several {
            fs::remove_file(path(&self.folder, old.from, old.to))?;
        }
        let mut runs = kept.to_vec();
        runs.push(member);
        let folder = self.folder.clone();
        Ok(Some(Self { folder, runs }))
    }

    /// Makes a run under another name, and gives it its own once it is whole.
    fn write(
        &self,
        from: u64,
        to: u64,
        at_most: usize,
        fill: impl FnOnce(&mut Writer) -> Result<(), TableError>,
    ) -> Result<Member, TableError> {
        let path = path(&self.folder, from, to);
        let unfinished = path.with_extension("new");
        let mut writer = Writer::create(&unfinished, at_most)?;
        fill(&mut writer)?;
        let run = Arc::new(writer.finish()?);
        fs::rename(unfinished, path)?;
        fs::File::open(&self.folder)?.sync_all()?;
        Ok(Member { from, to, run })
    }

    /// Whether any run may know a row.
    pub(crate) fn may_hold(&self, key: &[u8]) -> bool {
        self.runs.iter().any(|member| member.run.may_hold(key))
    }

    /// A row.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<IVec>, TableError> {
        for member in self.runs.iter().rev() {
            if let Some(value) = member.run.get(key)? {
                return Ok(value);
            }
        }
        Ok(None)
    }

    /// The rows of a range in each of the runs, newest run first.
    pub(crate) fn ranges<'a>(
        &'a self,
        range: KeyRange<'a>,
        way: Way,
    ) -> impl Iterator<Item = Cursor<'a>> {
        let newest_first = self.runs.iter().rev();
        newest_first.map(move |member| member.run.range(range, way))
    }
}

const ALL: KeyRange<'static> = (std::ops::Bound::Unbounded, std::ops::Bound::Unbounded);

fn path(folder: &Path, from: u64, to: u64) -> PathBuf {
    folder.join(format!("{from}-{to}.run"))
}

/// The batches that a file's name says are in it.
fn batches(name: &str) -> Option<(u64, u64)> {
    let (from, to) = name.strip_suffix(".run")?.split_once('-')?;
    let (from, to) = (from.parse().ok()?, to.parse().ok()?);
    (from < to && name == format!("{from}-{to}.run")).then_some((from, to))
}

/// The rows of several runs in the order of their keys, each as the first run that knows it has it.
struct Merge<'a, 'b> {
    runs: &'a mut [Cursor<'b>],
    heads: Vec<Option<Row>>,
}

impl<'a, 'b> Merge<'a, 'b> {
    fn new(runs: &'a mut [Cursor<'b>]) -> Result<Self, TableError> {
        let heads = runs
            .iter_mut()
            .map(Cursor::next)
            .collect::<Result<_, _>>()?;
        Ok(Self { runs, heads })
    }

    fn next(&mut self) -> Result<Option<Row>, TableError> {
        let keys = self.heads.iter().flatten().map(|(key, _)| key);
        let Some(key) = keys.min().cloned() else {
            return Ok(None);
        };
        let mut value = None;
        for (head, run) in self.heads.iter_mut().zip(&mut *self.runs).rev() {
            if head.as_ref().is_some_and(|(k, _)| *k == key) {
                value = std::mem::replace(head, run.next()?).and_then(|(_, value)| value);
            }
        }
        Ok(Some((key, value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn rows(of: &[(&str, Option<&str>)]) -> Rows {
        let row = |(k, v): &(&str, Option<&str>)| {
            (
                IVec::from(k.as_bytes()),
                v.map(|v| IVec::from(v.as_bytes())),
            )
        };
        of.iter().map(row).collect()
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn they_become_fewer_and_say_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut runs = Runs::open(&folder.path().join("runs")).unwrap();
        let mut expected = BTreeMap::new();
        for batch in 0..(FEW * FEW + 3) as u64 {
            let (old, new) = (format!("{}", batch / 3), format!("{batch}"));
            let mut rows = rows(&[("all", Some(&new)), (&new, Some("it")), (&old, None)]);
            expected.extend(rows.clone());
            // A row that was removed may come back.
            if batch % 5 == 0 {
                let row = (IVec::from("0"), Some(IVec::from("again")));
                rows.extend([row.clone()]);
                expected.extend([row]);
            }
            runs = runs.with(&rows).unwrap();
            while let Some(merged) = runs.merged().unwrap() {
                runs = merged;
            }
            for runs in [&runs, &Runs::open(&runs.folder).unwrap()] {
                for (key, value) in &expected {
                    assert_eq!(runs.get(key).unwrap(), *value, "{batch}");
                }
            }
        }
        let found = names(&runs.folder);
        assert_eq!(
            found,
            ["0-256.run", "256-257.run", "257-258.run", "258-259.run"]
        );
    }

    #[test]
    fn what_an_interruption_left_is_removed_and_a_gap_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let mut runs = Runs::open(folder.path()).unwrap();
        for batch in 0..FEW {
            runs = runs
                .with(&rows(&[("a", Some(&batch.to_string()))]))
                .unwrap();
        }
        let old = folder.path().join("old");
        fs::copy(path(folder.path(), 2, 3), &old).unwrap();
        runs.merged().unwrap().unwrap();
        fs::rename(old, path(folder.path(), 2, 3)).unwrap();
        fs::write(folder.path().join("16-17.new"), "half").unwrap();
        let runs = Runs::open(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["0-16.run"]);
        assert_eq!(runs.get(b"a").unwrap().as_deref(), Some(b"15".as_slice()));
        fs::rename(path(folder.path(), 0, 16), path(folder.path(), 1, 16)).unwrap();
        assert!(matches!(
            Runs::open(folder.path()),
            Err(TableError::Broken(_))
        ));
    }
}
