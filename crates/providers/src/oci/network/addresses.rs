//! Who has which address. All of it follows from two numbers: which of the
//! host's subnets is this server's, and which port of its router a sandbox is.
//!
//! ```text
//! 198.18.0.0/15, the benchmarking range (RFC 2544): nobody routes it.
//!   └─ /20 per server       .1 gateway and name server   .2 host   .3 router
//!        └─ /32 per sandbox, from .16 on
//! ```

use std::net::Ipv4Addr;

/// Servers on one host.
pub(in crate::oci) const SUBNETS: u32 = 32;

/// Sandboxes of one server.
pub(super) const PORTS: u32 = (1 << (32 - PREFIX_LENGTH)) - FIRST_GUEST - 1;

/// Ports are announced to the packet filter in blocks of this many.
pub(super) const PORTS_PER_BLOCK: u32 = 64;

pub(super) const PREFIX_LENGTH: u8 = 20;

const RANGE: u32 = u32::from_be_bytes([198, 18, 0, 0]);
const FIRST_GUEST: u32 = 16;

/// Numbers of devices inside the router, so that nothing has to be looked up.
pub(super) const UPLINK_INDEX: u32 = 2;
const FIRST_PORT_INDEX: u32 = 1000;

/// Number of the only device besides loopback inside a sandbox.
pub(super) const GUEST_INDEX: u32 = 2;

/// Names inside the router and inside a sandbox.
pub(super) const UPLINK: &str = "up";
pub(super) const GUEST_DEVICE: &str = "eth0";

/// One server's part of the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::oci) struct Subnet(pub(in crate::oci) u32);

impl Subnet {
    pub(super) fn network(self) -> Ipv4Addr {
        self.at(0)
    }

    /// Where sandboxes send everything, and ask for names.
    pub(in crate::oci) fn gateway(self) -> Ipv4Addr {
        self.at(1)
    }

    pub(super) fn host_end(self) -> Ipv4Addr {
        self.at(2)
    }

    pub(super) fn router_end(self) -> Ipv4Addr {
        self.at(3)
    }

    pub(in crate::oci) fn guest(self, port: u32) -> Ipv4Addr {
        self.at(FIRST_GUEST + port)
    }

    /// The uplink's name on the host.
    pub(super) fn host_device(self) -> String {
        format!("svm{}", self.0)
    }

    /// As firewalls write it.
    pub(super) fn cidr(self) -> String {
        format!("{}/{PREFIX_LENGTH}", self.network())
    }

    /// Whether a route of the host's covers any of it, or the other way round.
    pub(super) fn overlaps(self, destination: Ipv4Addr, mask: Ipv4Addr) -> bool {
        let own_mask = u32::MAX << (32 - PREFIX_LENGTH);
        let common = own_mask & u32::from(mask);
        u32::from(destination) & common == u32::from(self.network()) & common
    }

    fn at(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(RANGE + (self.0 << (32 - PREFIX_LENGTH)) + offset)
    }
}

/// Name of a port's device inside the router.
pub(super) fn port_device(port: u32) -> String {
    format!("v{port}")
}

pub(super) fn port_index(port: u32) -> u32 {
    FIRST_PORT_INDEX + port
}

/// Locally administered addresses; the fourth byte tells the two ends apart.
pub(super) fn router_mac(port: u32) -> [u8; 6] {
    mac(0, port)
}

pub(super) fn guest_mac(port: u32) -> [u8; 6] {
    mac(1, port)
}

fn mac(end: u8, port: u32) -> [u8; 6] {
    let [_, _, high, low] = port.to_be_bytes();
    [0x02, 0x53, 0x56, end, high, low]
}

pub(super) fn show_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_stay_inside_their_subnet() {
        let last = Subnet(SUBNETS - 1);
        assert_eq!(Subnet(0).gateway(), Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!(Subnet(1).network(), Ipv4Addr::new(198, 18, 16, 0));
        assert_eq!(last.guest(PORTS - 1), Ipv4Addr::new(198, 19, 255, 254));
        assert_eq!(show_mac(guest_mac(258)), "02:53:56:01:01:02");
    }

    #[test]
    fn a_route_into_the_range_is_noticed() {
        let masked = |length: u32| Ipv4Addr::from(u32::MAX.checked_shl(32 - length).unwrap_or(0));
        assert!(Subnet(1).overlaps(Ipv4Addr::new(198, 18, 0, 0), masked(15)));
        assert!(Subnet(1).overlaps(Ipv4Addr::new(198, 18, 17, 5), masked(32)));
        assert!(!Subnet(1).overlaps(Ipv4Addr::new(198, 18, 32, 0), masked(20)));
        assert!(!Subnet(1).overlaps(Ipv4Addr::new(10, 0, 0, 0), masked(8)));
    }
}
