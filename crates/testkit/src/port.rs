//! Ports for servers that have to be told theirs before they start, or that come back on the same
//! one.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FlockOperation, flock};

/// Below the ports that systems give to connections of their own accord (from 32,768 on Linux,
/// from 49,152 elsewhere): a port that is asked for by binding to 0 and then let go may be some
/// client's a moment later. And below those of the `local` target's instances (from 20,000).
const RANGE: Range<u16> = 10_000..20_000;

/// A port on 127.0.0.1 where nobody listens now, and that no other test is given while this
/// process lives.
///
/// # Panics
/// If there is none, or the folder for the locks cannot be written.
pub fn free_port() -> u16 {
    static TRIED: AtomicU32 = AtomicU32::new(0);
    let folder = std::env::temp_dir().join("daybook-test-ports");
    std::fs::create_dir_all(&folder).expect("a temporary folder can be made");
    // Processes begin in different places, so that they seldom ask for the same lock.
    let start = std::process::id().wrapping_mul(97);
    RANGE
        .map(|_| {
            let tried = TRIED.fetch_add(1, Ordering::Relaxed);
            let offset = start.wrapping_add(tried) % RANGE.len() as u32;
            RANGE.start + offset as u16
        })
        .find(|&port| {
            let lock = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(folder.join(port.to_string()))
                .expect("a lock file can be made");
            let free = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
                && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
            if free {
                // Locked until the process ends, however it ends.
                std::mem::forget(lock);
            }
            free
        })
        .expect("one of ten thousand ports is free")
}

/// As [`free_port`], with the address.
///
/// # Panics
/// As [`free_port`].
pub fn free_addr() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_port_is_given_twice_and_all_are_free() {
        let mut ports: Vec<u16> = (0..20).map(|_| free_port()).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 20);
        for port in ports {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        }
    }
}
