//! What may pass: rules in the router's namespace and on the host.
//!
//! All rules stand on the host's side of a veth, where nothing inside a
//! sandbox can change them. They are loaded whole, in one transaction of nft,
//! so that there is no moment without them.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::addresses::{PORTS_PER_BLOCK, Subnet, UPLINK, guest_mac, port_device, show_mac};

/// Addresses that are not the internet: private, shared, loopback, link-local
/// with the metadata services, documentation, benchmarking (our own included),
/// multicast and reserved (IANA special-purpose registry, RFC 6890).
const NOT_THE_INTERNET: [&str; 14] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

/// Table inside the router's namespace, which is all ours.
const ROUTER_TABLE: &str = "stacyvm";

/// How long nft or iptables may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(15);
const COMMAND_POLL: Duration = Duration::from_millis(1);

/// Where administrators' programs are, whatever PATH the server has.
const ADMIN_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// A destination that is allowed although its range is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::oci) struct Destination {
    network: Ipv4Addr,
    length: u8,
}

impl Destination {
    /// Reads an address or a CIDR.
    pub(in crate::oci) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not an IPv4 address or CIDR such as 10.0.0.5 or 10.0.0.0/24");
        if text.contains(':') {
            return Err(format!("`{text}`: sandboxes of this runtime have no IPv6"));
        }
        let (address, length) = text.split_once('/').unwrap_or((text, "32"));
        let (address, length) =
            (address.parse::<Ipv4Addr>().map_err(|_| wrong())?, length.parse::<u8>().map_err(|_| wrong())?);
        if length > 32 {
            return Err(wrong());
        }
        let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
        Ok(Self { network: Ipv4Addr::from(u32::from(address) & mask), length })
    }

    fn contains(self, other: Self) -> bool {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.length)).unwrap_or(0);
        self.length <= other.length && u32::from(other.network) & mask == u32::from(self.network)
    }
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network, self.length)
    }
}

/// Leaves out what another one covers, which nft would refuse as an overlap.
pub(super) fn without_overlaps(destinations: &[Destination]) -> Vec<Destination> {
    let mut kept: Vec<Destination> = Vec::new();
    let mut sorted = destinations.to_vec();
    sorted.sort_by_key(|destination| (destination.length, *destination));
    for destination in sorted {
        if !kept.iter().any(|wider| wider.contains(destination)) {
            kept.push(destination);
        }
    }
    kept
}

/// Everything that holds inside the router.
///
/// `blocks` of ports are known by then; `allowed` lists what ports may reach
/// besides the internet.
pub(super) fn router_rules(subnet: Subnet, blocks: u32, allowed: &[(u32, Vec<Destination>)]) -> String {
    let denied = NOT_THE_INTERNET.join(", ");
    let gateway = subnet.gateway();
    let mut rules = format!(
        r#"table inet {ROUTER_TABLE}
delete table inet {ROUTER_TABLE}
table inet {ROUTER_TABLE} {{
  set guests {{ type ifname . ether_addr . ipv4_addr; }}
  set allowed {{ type ifname . ipv4_addr; flags interval; }}
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname {{ "lo", "{UPLINK}" }} accept
    iifname . ether saddr . ip saddr @guests accept
    drop
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    iifname "{UPLINK}" drop
    ip daddr {gateway} udp dport 53 accept
    ip daddr {gateway} tcp dport 53 accept
    ip daddr {gateway} icmp type echo-request accept
    reject with icmpx type admin-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state invalid drop
    iifname "{UPLINK}" ct state established,related accept
    iifname "{UPLINK}" drop
    oifname != "{UPLINK}" reject with icmpx type admin-prohibited
    iifname . ip daddr @allowed accept
    ip daddr {{ {denied} }} reject with icmpx type admin-prohibited
    meta nfproto ipv4 accept
  }}
}}
"#
    );
    for block in 0..blocks {
        rules.push_str(&admit_block(subnet, block));
    }
    for (port, destinations) in allowed {
        rules.push_str(&change_allowed("add", *port, destinations));
    }
    rules
}

/// Makes a block of ports known: which device has which addresses.
pub(super) fn admit_block(subnet: Subnet, block: u32) -> String {
    let elements: Vec<String> = (block * PORTS_PER_BLOCK..(block + 1) * PORTS_PER_BLOCK)
        .map(|port| format!(r#""{}" . {} . {}"#, port_device(port), show_mac(guest_mac(port)), subnet.guest(port)))
        .collect();
    format!("add element inet {ROUTER_TABLE} guests {{ {} }}\n", elements.join(", "))
}

/// Adds or deletes what a port may reach besides the internet.
pub(super) fn change_allowed(verb: &str, port: u32, destinations: &[Destination]) -> String {
    let mut change = String::new();
    for destination in without_overlaps(destinations) {
        let device = port_device(port);
        // Writing to a string cannot fail.
        let _ = writeln!(change, r#"{verb} element inet {ROUTER_TABLE} allowed {{ "{device}" . {destination} }}"#);
    }
    change
}

/// Everything that holds on the host: nothing of the host itself can be
/// reached, and nobody reaches a sandbox that did not call.
pub(super) fn host_rules(subnet: Subnet) -> String {
    let (table, device, cidr) = (host_table(subnet), subnet.host_device(), subnet.cidr());
    format!(
        r#"table inet {table}
delete table inet {table}
table inet {table} {{
  chain input {{
    type filter hook input priority filter - 5; policy accept;
    iifname "{device}" drop
  }}
  chain forward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname "{device}" meta nfproto ipv6 drop
    iifname "{device}" ip saddr != {cidr} drop
    oifname "{device}" ct state != {{ established, related }} drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {cidr} oifname != "{device}" masquerade
  }}
}}
"#
    )
}

pub(super) fn remove_host_rules(subnet: Subnet) -> String {
    let table = host_table(subnet);
    format!("table inet {table}\ndelete table inet {table}\n")
}

fn host_table(subnet: Subnet) -> String {
    format!("stacyvm{}", subnet.0)
}

/// Where nft is, if it is installed.
pub(in crate::oci) fn nft() -> Option<PathBuf> {
    ADMIN_PATH.split(':').map(|directory| Path::new(directory).join("nft")).find(|path| path.is_file())
}

/// Loads rules in the calling thread's network namespace.
pub(super) fn load(rules: &str) -> io::Result<()> {
    run("nft", &["-f", "-"], rules)
}

/// Lets our packets through where a Docker daemon (or an administrator) has
/// iptables drop what is forwarded: an accept of nft's does not override that.
/// A host without iptables has no such rule.
pub(super) fn pass_iptables(subnet: Subnet) -> io::Result<()> {
    for rule in iptables_rules(subnet) {
        let with = |action: &str| iptables(action, &rule);
        match with("-C") {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(_) => with("-I")?,
        }
    }
    Ok(())
}

pub(super) fn unpass_iptables(subnet: Subnet) {
    for rule in iptables_rules(subnet) {
        // As often as it is there; a failure means that it is not.
        while iptables("-D", &rule).is_ok() {}
    }
}

fn iptables_rules(subnet: Subnet) -> [Vec<String>; 2] {
    let device = subnet.host_device();
    let rule = |parts: &[&str]| {
        let mut rule: Vec<String> = parts.iter().map(|part| (*part).to_owned()).collect();
        rule.extend(["-m", "comment", "--comment", "stacyvm", "-j", "ACCEPT"].map(str::to_owned));
        rule
    };
    [rule(&["-i", &device]), rule(&["-o", &device, "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED"])]
}

fn iptables(action: &str, rule: &[String]) -> io::Result<()> {
    let mut args = vec!["-w", "5", action, "FORWARD"];
    args.extend(rule.iter().map(String::as_str));
    run("iptables", &args, "")
}

/// Runs an administrator's program in the calling thread's namespace.
fn run(program: &str, args: &[&str], input: &str) -> io::Result<()> {
    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .env("PATH", ADMIN_PATH)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("{program} cannot be run: {error}")))?;
    // A program that does not read its input fails, and that is reported below.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let deadline = Instant::now() + COMMAND_LIMIT;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{program} did not end")));
        }
        std::thread::sleep(COMMAND_POLL);
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program}: {}", said.lines().next().unwrap_or("failed"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_and_bad_ones_named() {
        assert_eq!(Destination::parse("10.1.2.3").unwrap().to_string(), "10.1.2.3/32");
        assert_eq!(Destination::parse("10.1.2.3/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(Destination::parse("0.0.0.0/0").unwrap().to_string(), "0.0.0.0/0");
        for text in ["", "10.0.0.0/33", "10.0.0", "host.example", "10.0.0.1/x", "::1", "fd00::/8"] {
            assert!(Destination::parse(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn covered_destinations_are_left_out() {
        let parse = |text| Destination::parse(text).unwrap();
        let list = ["10.1.0.0/16", "10.0.0.0/8", "192.168.1.1", "10.1.0.0/16", "192.168.1.1"].map(parse);
        assert_eq!(without_overlaps(&list), ["10.0.0.0/8", "192.168.1.1"].map(parse));
    }

    #[test]
    fn rules_bind_each_port_to_its_addresses() {
        let rules = router_rules(Subnet(0), 1, &[(2, vec![Destination::parse("10.0.0.0/8").unwrap()])]);
        assert!(rules.contains(r#""v0" . 02:53:56:01:00:00 . 198.18.0.16"#));
        assert!(rules.contains(r#""v63" . 02:53:56:01:00:3f . 198.18.0.79"#));
        assert!(!rules.contains(r#""v64""#));
        assert!(rules.contains(r#"allowed { "v2" . 10.0.0.0/8 }"#));
        assert!(rules.contains("169.254.0.0/16"));
    }
}
