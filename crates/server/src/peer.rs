//! At which address a caller is.
//!
//! The peer of the connection, unless that is a proxy which the configuration
//! trusts: then what the proxy says in `X-Forwarded-For`. Nobody else is
//! believed, because anybody can send that header.

use std::net::{IpAddr, Ipv6Addr};

use http::HeaderMap;
use ipnet::IpNet;

use crate::ServerError;

const FORWARDED_FOR: &str = "x-forwarded-for";

/// Proxies in a row that are looked through.
const MAX_HOPS: usize = 16;

/// Bits of an IPv6 address that name a subscriber; the rest is theirs to choose
/// (RFC 6177).
const SUBSCRIBER_BITS: u32 = 64;

/// The other end of a connection: an extension of each of its requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// Proxies whose word counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    /// Reads addresses and networks such as `10.0.0.0/8`.
    pub(crate) fn parse(listed: &[String]) -> Result<Self, ServerError> {
        let parse = |text: &String| {
            let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            net.map_err(|_| ServerError::TrustedProxy(text.clone()))
        };
        listed.iter().map(parse).collect::<Result<_, _>>().map(Self)
    }

    /// Walks from the connection towards the caller, through trusted proxies
    /// only.
    pub(crate) fn caller(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut caller = peer.to_canonical();
        if !self.trusts(caller) {
            return caller;
        }
        let values = headers.get_all(FORWARDED_FOR).iter().rev().filter_map(|value| value.to_str().ok());
        let hops = values.flat_map(|value| value.rsplit(','));
        for hop in hops.take(MAX_HOPS) {
            let Ok(address) = hop.trim().parse::<IpAddr>() else { break };
            caller = address.to_canonical();
            if !self.trusts(caller) {
                break;
            }
        }
        caller
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|net| net.contains(&address))
    }
}

/// What a limit by address counts together.
pub(crate) fn subscriber(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => {
            let host_bits = Ipv6Addr::BITS - SUBSCRIBER_BITS;
            Ipv6Addr::from_bits(address.to_bits() >> host_bits << host_bits).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(trusted: &[&str], peer: &str, forwarded: &[&str]) -> String {
        let trusted: Vec<String> = trusted.iter().map(|&text| text.to_owned()).collect();
        let proxies = TrustedProxies::parse(&trusted).unwrap();
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append(FORWARDED_FOR, value.parse().unwrap());
        }
        proxies.caller(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn the_header_counts_only_behind_a_trusted_proxy() {
        assert_eq!(caller(&[], "192.0.2.1", &["198.51.100.7"]), "192.0.2.1");
        assert_eq!(caller(&["10.0.0.0/8"], "192.0.2.1", &["198.51.100.7"]), "192.0.2.1");
        assert_eq!(caller(&["10.0.0.0/8"], "10.1.2.3", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(caller(&["10.0.0.0/8"], "10.1.2.3", &[]), "10.1.2.3");
        assert_eq!(caller(&["127.0.0.1"], "::ffff:127.0.0.1", &["::ffff:198.51.100.7"]), "198.51.100.7");
    }

    #[test]
    fn what_lies_behind_the_first_stranger_is_not_believed() {
        let trusted = ["10.0.0.0/8", "fd00::/8"];
        assert_eq!(caller(&trusted, "10.0.0.1", &["1.1.1.1, 198.51.100.7"]), "198.51.100.7");
        assert_eq!(caller(&trusted, "10.0.0.1", &["1.1.1.1, 198.51.100.7, 10.0.0.2"]), "198.51.100.7");
        assert_eq!(caller(&trusted, "10.0.0.1", &["198.51.100.7", "10.9.9.9,fd00::1"]), "198.51.100.7");
        assert_eq!(caller(&trusted, "10.0.0.1", &["198.51.100.7, nonsense, 10.0.0.2"]), "10.0.0.2");
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in ["", "proxy.example", "10.0.0.0/33", "10.0.0"] {
            assert!(TrustedProxies::parse(&[text.to_owned()]).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_subscriber_has_one_address_of_version_4_and_a_network_of_version_6() {
        let of = |text: &str| subscriber(text.parse().unwrap()).to_string();
        assert_eq!(of("192.0.2.1"), "192.0.2.1");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
