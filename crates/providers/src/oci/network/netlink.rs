//! Devices, addresses and routes, over a blocking netlink socket.
//!
//! A netlink socket belongs to the network namespace it was made in, whatever
//! its owner does later; so one socket is kept per namespace at work.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rtnetlink::{AddressMessageBuilder, RouteMessageBuilder};

/// Room for an acknowledgement, which carries the request back.
const ANSWER_BYTES: usize = 64 * 1024;

/// Group that devices are put into to be taken away together. Devices of ours
/// are in the default one, zero, until then.
const LEAVING_GROUP: u32 = 0x7376_6d00;

/// One end of a veth.
pub(super) struct VethEnd<'a> {
    pub(super) name: &'a str,
    /// Number of the device, or zero for the kernel to choose.
    pub(super) index: u32,
    pub(super) mac: Option<[u8; 6]>,
    /// Answers no ARP; its neighbours are told to it.
    pub(super) no_arp: bool,
    /// Namespace it is made in; the socket's own otherwise.
    pub(super) namespace: Option<BorrowedFd<'a>>,
}

/// A conversation with the kernel about one network namespace.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// For the network namespace the calling thread is in.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes a veth with this end up. The other one must be brought up when both
    /// are there: the kernel refuses to open an end that has no peer yet.
    pub(super) fn add_veth(&mut self, here: &VethEnd<'_>, there: &VethEnd<'_>, mtu: u32) -> io::Result<()> {
        let peer = describe(there, mtu);
        let mut message = describe(here, mtu);
        message.header.flags |= LinkFlags::Up;
        message.header.change_mask |= LinkFlags::Up;
        let data = InfoData::Veth(InfoVeth::Peer(peer));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(data)]));
        self.order(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Takes a device away, by number or else by name. Missing is fine.
    pub(super) fn remove_device(&mut self, index: u32, name: &str) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        if index == 0 {
            message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        }
        unless_missing(self.order(RouteNetlinkMessage::DelLink(message), 0))
    }

    /// Takes many devices away in one go, which takes the kernel as long as one.
    pub(super) fn remove_devices(&mut self, indices: impl Iterator<Item = u32>) -> io::Result<()> {
        for index in indices {
            let mut message = LinkMessage::default();
            message.header.index = index;
            message.attributes.push(LinkAttribute::Group(LEAVING_GROUP));
            unless_missing(self.order(RouteNetlinkMessage::SetLink(message), 0))?;
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(LEAVING_GROUP));
        unless_missing(self.order(RouteNetlinkMessage::DelLink(message), 0))
    }

    pub(super) fn bring_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.order(RouteNetlinkMessage::SetLink(message), 0)
    }

    pub(super) fn add_address(&mut self, index: u32, address: Ipv4Addr) -> io::Result<()> {
        let message = AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, 32).build();
        self.order(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// What is directly behind a device.
    pub(super) fn add_direct_route(&mut self, index: u32, destination: Ipv4Addr) -> io::Result<()> {
        let message = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .build();
        self.add_route(message)
    }

    /// What is behind a neighbour; length zero means everything.
    pub(super) fn add_route_via(
        &mut self,
        index: u32,
        destination: Ipv4Addr,
        length: u8,
        gateway: Ipv4Addr,
    ) -> io::Result<()> {
        let mut builder = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index).gateway(gateway);
        if length > 0 {
            builder = builder.destination_prefix(destination, length);
        }
        self.add_route(builder.build())
    }

    fn add_route(&mut self, message: RouteMessage) -> io::Result<()> {
        self.order(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Tells a device for good where a neighbour is.
    pub(super) fn add_neighbour(&mut self, index: u32, address: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(address)));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.order(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Sends one request and waits for the kernel's verdict.
    fn order(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answer = Vec::with_capacity(ANSWER_BYTES);
        loop {
            answer.clear();
            self.socket.recv(&mut answer, 0)?;
            let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            if parsed.header.sequence_number != self.sequence {
                continue;
            }
            if let NetlinkPayload::Error(verdict) = parsed.payload {
                return verdict.code.map_or(Ok(()), |_| Err(verdict.to_io()));
            }
        }
    }
}

/// A device that is gone already is fine.
fn unless_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        result => result,
    }
}

/// Number of a device in the calling thread's namespace.
pub(super) fn index_of(name: &str) -> io::Result<u32> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(socket, name)?)
}

fn describe(end: &VethEnd<'_>, mtu: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = end.index;
    if end.no_arp {
        message.header.flags |= LinkFlags::Noarp;
        message.header.change_mask |= LinkFlags::Noarp;
    }
    message.attributes.push(LinkAttribute::IfName(end.name.to_owned()));
    message.attributes.push(LinkAttribute::Mtu(mtu));
    message.attributes.extend(end.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
    message.attributes.extend(end.namespace.map(|namespace| LinkAttribute::NetNsFd(namespace.as_raw_fd())));
    message
}
