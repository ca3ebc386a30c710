//! Ports for instances.
//!
//! They are taken below the range from which the system serves outgoing connections, so that
//! none of those takes a port between its choice and the moment when the application listens.
//! Ports go round, so that one that was just given up is not soon another's.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::sync::{LazyLock, Mutex, PoisonError};

const RANGE: Range<u16> = 20_000..30_000;

/// The ports that this process has given out, over all its clusters.
static GIVEN: LazyLock<Mutex<Given>> = LazyLock::new(|| {
    // Several processes on one machine start at different places.
    let (_, low) = uuid::Uuid::new_v4().as_u64_pair();
    let offset = (low % u64::from(RANGE.end - RANGE.start)) as u16;
    Mutex::new(Given {
        ports: HashSet::new(),
        next: RANGE.start + offset,
    })
});

#[derive(Debug)]
struct Given {
    ports: HashSet<u16>,
    next: u16,
}

/// A port that no other instance of this process has. Given back when dropped.
#[derive(Debug)]
pub(super) struct Port(u16);

impl Port {
    /// A port that nobody listens on. `None` if there is none.
    pub(super) fn any() -> Option<Self> {
        let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in RANGE {
            let port = given.next;
            given.next = if port + 1 == RANGE.end {
                RANGE.start
            } else {
                port + 1
            };
            if !given.ports.contains(&port) && is_free(port) {
                given.ports.insert(port);
                return Some(Self(port));
            }
        }
        None
    }

    /// This very port; `None` if another instance has it or somebody listens on it.
    pub(super) fn exactly(port: u16) -> Option<Self> {
        let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
        if given.ports.contains(&port) || !is_free(port) {
            return None;
        }
        given.ports.insert(port);
        Some(Self(port))
    }

    /// The port of a process that runs already.
    pub(super) fn in_use(port: u16) -> Self {
        let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
        given.ports.insert(port);
        Self(port)
    }

    pub(super) fn number(&self) -> u16 {
        self.0
    }

    /// Whether somebody listens on it.
    pub(super) fn is_taken(&self) -> bool {
        !is_free(self.0)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
        given.ports.remove(&self.0);
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn no_two_have_the_same_port_and_taken_ones_are_passed_over() {
        let first = Port::any().unwrap();
        let number = first.number();
        assert!(Port::exactly(number).is_none());
        drop(first);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, number)).unwrap();
        assert!(Port::exactly(number).is_none());
        drop(listener);
        assert!(Port::exactly(number).is_some());
    }
}
