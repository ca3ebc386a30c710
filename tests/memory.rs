//! What a server asks the system for.

use std::fs;

use crate::support::{Server, Settings, until};

/// The arenas of glibc's allocator in a process, beside the first: each begins at a multiple of 64 MiB
/// (`HEAP_MAX_SIZE`).
fn further_arenas(pid: u32) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let begins = maps.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (range, may) = (words.next()?, words.next()?);
        let is_anonymous = words.nth(2)? == "0" && words.next().is_none();
        let begin = u64::from_str_radix(range.split_once('-')?.0, 16).ok()?;
        (may == "rw-p" && is_anonymous).then_some(begin)
    });
    begins.filter(|begin| begin % (64 << 20) == 0).count()
}

/// By itself the library makes one for each of the first sixteen threads on two cores.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn threads_share_as_many_arenas_as_there_are_cores() {
    let server = Server::start(Settings::default());
    let pid = server.process().pid();
    let tasks = format!("/proc/{pid}/task");
    until("the server to have its threads", || {
        let threads = fs::read_dir(&tasks).unwrap().count();
        (threads > 8).then_some(())
    });
    let cores = std::thread::available_parallelism().unwrap().get();
    assert!(
        further_arenas(pid) < cores.max(2),
        "{}",
        further_arenas(pid)
    );
}
