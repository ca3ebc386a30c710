//! Where a service answers for others on the machine of a gateway.

use std::net::Ipv4Addr;

use sha2::{Digest as _, Sha256};

use crate::names::InstanceRef;

/// The loopback address at which gateways answer for the main deployment of an instance, on the
/// port that they listen on: whoever asks there needs neither a resolver nor a `Host` header.
///
/// It follows from the names alone, so that it is the same on every machine, after every restart,
/// and before anything is deployed. It is never `127.0.x.x`, which machines use for themselves. Two
/// instances may come to the same one: gateways answer at it for neither of them then.
pub fn internal_address(instance: &InstanceRef) -> Ipv4Addr {
    let [a, b, c, ..] = <[u8; 32]>::from(Sha256::digest(instance.to_string()));
    // Neither the network's own address nor the one that means everybody.
    let host = |byte: u8| 1 + byte % 254;
    Ipv4Addr::new(127, host(a), b, host(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_has_one_loopback_address_of_its_own() {
        let address = |name: &str| internal_address(&name.parse().unwrap());
        // It must not change: configurations have it.
        assert_eq!(
            address("shop.production.web"),
            Ipv4Addr::new(127, 56, 109, 18)
        );
        let all: std::collections::BTreeSet<_> = (0..1000)
            .map(|n| address(&format!("shop.production.web-{n}")))
            .collect();
        assert_eq!(all.len(), 1000);
        for address in all {
            let [_, second, _, last] = address.octets();
            assert!((1..=254).contains(&second) && (1..=254).contains(&last));
        }
    }
}
