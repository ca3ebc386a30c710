//! What the operating system says about processes.
//!
//! A process is named by its id together with the time at which it started, so that an id that
//! was given to another process later is never taken for the first. Linux answers all questions
//! here from `/proc`; elsewhere only the first is answered, through `ps`, and the others know
//! nothing.

use serde::{Deserialize, Serialize};

/// A process that ran, or runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct ProcessId {
    pub(super) pid: i32,
    /// When it started, in the words of the system: equal for the same process only.
    pub(super) started: String,
}

/// The variable in the environment of each process of an instance that names the very run.
pub(super) const RUN_VARIABLE: &str = "DAYBOOK_RUN";

/// A process that carries [`RUN_VARIABLE`].
#[derive(Debug, Clone)]
pub(super) struct Marked {
    pub(super) id: ProcessId,
    /// Its process group.
    pub(super) group: i32,
    /// The value of the variable.
    pub(super) run: String,
}

/// A set of processes that belong together: a leader, its process group, and whatever carries
/// the mark of its run, such as a child in a session of its own.
#[derive(Debug, Clone)]
pub(super) struct Family {
    pub(super) leader: ProcessId,
    /// The value of [`RUN_VARIABLE`].
    pub(super) run: String,
}

impl ProcessId {
    /// Whether this very process still runs. One that has ended and waits to be reaped does not.
    pub(super) fn runs(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }
}

#[cfg(target_os = "linux")]
pub(super) use linux::{listening_ports, marked, members};
#[cfg(not(target_os = "linux"))]
pub(super) use portable::{listening_ports, marked, members};

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::{BTreeSet, HashSet};
    use std::fs;

    use super::{Family, Marked, ProcessId, RUN_VARIABLE};

    /// What one line of `/proc/<pid>/stat` says.
    struct Stat {
        state: char,
        group: i32,
        started: u64,
    }

    fn stat(pid: i32) -> Option<Stat> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command in parentheses may contain anything, also parentheses.
        let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
        Some(Stat {
            state: fields.next()?.chars().next()?,
            group: fields.nth(1)?.parse().ok()?,
            started: fields.nth(16)?.parse().ok()?,
        })
    }

    fn boot() -> String {
        fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned()
    }

    impl ProcessId {
        /// The process that has this id now, if one runs.
        pub(in super::super) fn of(pid: i32) -> Option<Self> {
            let stat = stat(pid)?;
            stat.runs().then(|| Self {
                pid,
                started: started(&stat),
            })
        }

        /// A child of this process that was not waited for, even if it has ended already.
        pub(in super::super) fn of_child(pid: i32) -> Option<Self> {
            let stat = stat(pid)?;
            Some(Self {
                pid,
                started: started(&stat),
            })
        }
    }

    impl Stat {
        fn runs(&self) -> bool {
            !matches!(self.state, 'Z' | 'X' | 'x')
        }
    }

    fn started(stat: &Stat) -> String {
        format!("{}+{}", boot(), stat.started)
    }

    /// The processes of a family that still run.
    pub(in super::super) fn members(family: &Family) -> Vec<ProcessId> {
        let group = family.leader.pid;
        // The id of a group stays taken while the group has members, so its members are ours
        // unless another process has become the leader of a new group of that id.
        let taken_over = stat(group).is_some_and(|s| started(&s) != family.leader.started);
        all()
            .filter(|pid| {
                let in_group = !taken_over && stat(*pid).is_some_and(|s| s.group == group);
                in_group || has_mark(*pid, &family.run)
            })
            .filter_map(ProcessId::of)
            .collect()
    }

    fn all() -> impl Iterator<Item = i32> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
    }

    /// All processes of this user that carry the variable with a value that is wanted.
    pub(in super::super) fn marked(wanted: impl Fn(&str) -> bool) -> Vec<Marked> {
        let prefix = format!("{RUN_VARIABLE}=");
        all()
            .filter_map(|pid| {
                let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
                let run = environment
                    .split(|b| *b == 0)
                    .find_map(|v| v.strip_prefix(prefix.as_bytes()))?;
                let run = String::from_utf8_lossy(run).into_owned();
                if !wanted(&run) {
                    return None;
                }
                let group = stat(pid)?.group;
                let id = ProcessId::of(pid)?;
                Some(Marked { id, group, run })
            })
            .collect()
    }

    /// The TCP ports on which a family listens. `None` if the system does not say.
    pub(in super::super) fn listening_ports(family: &Family) -> Option<BTreeSet<u16>> {
        let mut sockets = HashSet::new();
        for member in members(family) {
            sockets.extend(socket_inodes(member.pid)?);
        }
        let mut ports = BTreeSet::new();
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let Ok(text) = fs::read_to_string(table) else {
                continue;
            };
            for line in text.lines().skip(1) {
                let fields: Vec<&str> = line.split_ascii_whitespace().collect();
                let [_, local, _, "0A", ..] = fields[..] else {
                    continue;
                };
                let inode = fields.get(9).and_then(|i| i.parse::<u64>().ok());
                let port = local
                    .rsplit_once(':')
                    .and_then(|(_, p)| u16::from_str_radix(p, 16).ok());
                if let (Some(inode), Some(port)) = (inode, port)
                    && sockets.contains(&inode)
                {
                    ports.insert(port);
                }
            }
        }
        Some(ports)
    }

    fn has_mark(pid: i32, run: &str) -> bool {
        let mark = format!("{RUN_VARIABLE}={run}");
        fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|e| e.split(|b| *b == 0).any(|v| v == mark.as_bytes()))
    }

    /// `None` if they are hidden from us; a process that has just ended has none.
    fn socket_inodes(pid: i32) -> Option<Vec<u64>> {
        let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return None,
            Err(_) => return Some(Vec::new()),
        };
        let sockets = entries
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .filter_map(|link| {
                link.to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .parse()
                    .ok()
            })
            .collect();
        Some(sockets)
    }
}

#[cfg(not(target_os = "linux"))]
mod portable {
    use std::collections::BTreeSet;
    use std::process::Command;

    use super::{Family, Marked, ProcessId};

    impl ProcessId {
        /// The process that has this id now, if one runs.
        pub(in super::super) fn of(pid: i32) -> Option<Self> {
            let output = Command::new("ps")
                .args(["-o", "stat=,lstart=", "-p", &pid.to_string()])
                .output()
                .ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            let (state, started) = text.trim().split_once(' ')?;
            (!state.starts_with('Z')).then(|| Self {
                pid,
                started: started.trim().to_owned(),
            })
        }

        /// A child of this process that was not waited for, even if it has ended already.
        pub(in super::super) fn of_child(pid: i32) -> Option<Self> {
            Some(Self::of(pid).unwrap_or_else(|| Self {
                pid,
                started: "ended at once".into(),
            }))
        }
    }

    pub(in super::super) fn marked(_: impl Fn(&str) -> bool) -> Vec<Marked> {
        Vec::new()
    }

    pub(in super::super) fn members(family: &Family) -> Vec<ProcessId> {
        let runs = family.leader.runs();
        runs.then(|| family.leader.clone()).into_iter().collect()
    }

    pub(in super::super) fn listening_ports(_: &Family) -> Option<BTreeSet<u16>> {
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    #[test]
    fn a_process_is_known_by_its_start_and_a_dead_one_does_not_run() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let id = ProcessId::of(pid).unwrap();
        assert!(id.runs());
        let other = ProcessId {
            started: "earlier".into(),
            ..id.clone()
        };
        assert!(!other.runs());
        child.kill().unwrap();
        while id.runs() {
            std::thread::yield_now();
        }
        // It is not reaped yet, and does not run all the same.
        child.wait().unwrap();
        assert!(!id.runs());
    }

    #[test]
    fn processes_are_found_by_their_mark() {
        let run = uuid::Uuid::new_v4().to_string();
        let mut child = Command::new("sleep")
            .arg("1000")
            .env(RUN_VARIABLE, &run)
            .process_group(0)
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let found = marked(|r| r == run);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].id.pid, found[0].group), (pid, pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(marked(|r| r == run).is_empty());
    }

    #[test]
    fn a_family_is_the_group_and_whatever_carries_the_mark() {
        let run = uuid::Uuid::new_v4().to_string();
        let mut leader = Command::new(daybook_testkit::TESTAPP)
            .args(["--child", "--port", "0"])
            .env(RUN_VARIABLE, &run)
            .process_group(0)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let id = ProcessId::of(i32::try_from(leader.id()).unwrap()).unwrap();
        let family = Family { leader: id, run };
        while members(&family).len() < 2 || listening_ports(&family).unwrap().is_empty() {
            std::thread::yield_now();
        }
        let mine = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let foreign = mine.local_addr().unwrap().port();
        assert!(!listening_ports(&family).unwrap().contains(&foreign));
        leader.kill().unwrap();
        leader.wait().unwrap();
        // The child in a session of its own is still there, and still known.
        let left = members(&family);
        assert_eq!(left.len(), 1);
        let pid = rustix::process::Pid::from_raw(left[0].pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        while !members(&family).is_empty() {
            std::thread::yield_now();
        }
    }
}
