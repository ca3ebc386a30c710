//! Addresses on loopback that lead to one host name each, whatever the `Host` header says it is
//! called: for services that ask each other on one machine.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use daybook_events::Hostname;
use tokio::net::TcpListener;
use tokio_util::sync::DropGuard;

use super::{Shared, accept};

/// So many addresses a gateway listens on at most: each costs a file descriptor.
const LISTENERS_MAX: usize = 512;

/// Which host names want which addresses.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    by_address: BTreeMap<Ipv4Addr, BTreeSet<Hostname>>,
    by_hostname: BTreeMap<Hostname, Ipv4Addr>,
    /// Those whose host names may have changed since somebody asked.
    touched: BTreeSet<Ipv4Addr>,
}

impl Wanted {
    /// Says which address a host name wants from here on. Returns the addresses for which that
    /// changes something.
    pub(super) fn set(
        &mut self,
        hostname: &Hostname,
        address: Option<Ipv4Addr>,
    ) -> BTreeSet<Ipv4Addr> {
        let before = match address {
            Some(address) => self.by_hostname.insert(hostname.clone(), address),
            None => self.by_hostname.remove(hostname),
        };
        let touched: BTreeSet<_> = before.into_iter().chain(address).collect();
        for touched in &touched {
            let hostnames = self.by_address.entry(*touched).or_default();
            if address == Some(*touched) {
                hostnames.insert(hostname.clone());
            } else {
                hostnames.remove(hostname);
            }
            if hostnames.is_empty() {
                self.by_address.remove(touched);
            }
        }
        self.touched.extend(&touched);
        touched
    }

    /// The host name that an address leads to; none where several want it, rather than the wrong
    /// one.
    pub(super) fn owner(&self, address: Ipv4Addr) -> Option<&Hostname> {
        let mut hostnames = self.by_address.get(&address)?.iter();
        hostnames.next().filter(|_| hostnames.next().is_none())
    }

    /// The addresses that were touched since this was asked last, and whether each is wanted.
    pub(super) fn take_touched(&mut self) -> Vec<(Ipv4Addr, bool)> {
        let touched = std::mem::take(&mut self.touched).into_iter();
        let wanted = touched.map(|a| (a, self.by_address.contains_key(&a)));
        wanted.collect()
    }
}

/// The addresses that a gateway listens on. Dropped, it listens no longer.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    open: BTreeMap<Ipv4Addr, DropGuard>,
    /// Those that are wanted and could not be listened on, and whether that was said.
    missing: BTreeMap<Ipv4Addr, bool>,
}

impl Listeners {
    /// Listens where it is wanted, on the gateway's own port, and nowhere else.
    pub(super) fn settle(&mut self, shared: &Arc<Shared>, touched: Vec<(Ipv4Addr, bool)>) {
        // Who listens everywhere listens there too.
        if shared.addr.ip().is_unspecified() {
            return;
        }
        if touched.is_empty() {
            return;
        }
        for (address, wanted) in touched {
            if !wanted {
                self.open.remove(&address);
                self.missing.remove(&address);
            } else if !self.open.contains_key(&address) {
                self.missing.entry(address).or_default();
            }
        }
        // What somebody else had, or there was no room for, may be free by now.
        let missing = std::mem::take(&mut self.missing);
        for (address, was_said) in missing {
            if shared.drain.is_cancelled() || self.listens(shared, address, was_said) {
                continue;
            }
            self.missing.insert(address, true);
        }
    }

    fn listens(&mut self, shared: &Arc<Shared>, address: Ipv4Addr, was_said: bool) -> bool {
        let at = SocketAddr::new(IpAddr::V4(address), shared.addr.port());
        if self.open.len() >= LISTENERS_MAX {
            if !was_said {
                tracing::warn!(%at, "no further internal address: there are {LISTENERS_MAX} already");
            }
            return false;
        }
        match listen(at) {
            Ok(listener) => {
                let ended = shared.drain.child_token();
                let accepting = accept(shared.clone(), listener, ended.clone());
                shared.tasks.spawn(accepting);
                self.open.insert(address, ended.drop_guard());
                true
            }
            // Not every system has more than one loopback address.
            Err(error) => {
                if !was_said {
                    tracing::warn!(%at, %error, "no internal address");
                }
                false
            }
        }
    }
}

fn listen(at: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(at)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}
