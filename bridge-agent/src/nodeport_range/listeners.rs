//! Sockets of this network namespace that listen, from `/proc/net` (proc_net(5)).

use std::{
    collections::HashMap,
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Layer 4 protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Protocol {
    Tcp,
    Udp,
}

/// A socket that accepts packets of any peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its protocol.
    pub protocol: Protocol,
    /// Where it listens.
    pub address: SocketAddr,
    /// By which its process is found.
    pub inode: u64,
    /// Process id and command, if it could be found.
    pub owner: Option<(u32, String)>,
}

impl Listener {
    /// Whether it is one of those that kube-proxy (before 1.26) opens to keep a NodePort for itself.
    #[must_use]
    pub fn holds_node_ports(&self) -> bool {
        self.owner.as_ref().is_some_and(|(_, command)| command == "kube-proxy")
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        };
        write!(f, "{protocol} {}", self.address)?;
        match &self.owner {
            Some((pid, command)) => write!(f, " ({command}, pid {pid})"),
            None => Ok(()),
        }
    }
}

/// TCP sockets that listen and UDP sockets that are not connected, on ports that are `wanted`, with their owners.
///
/// # Errors
/// `/proc/net` cannot be read. A table that is not there (no IPv6) is empty.
pub fn read(wanted: impl Fn(u16) -> bool) -> io::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for (table, protocol) in
        [("tcp", Protocol::Tcp), ("tcp6", Protocol::Tcp), ("udp", Protocol::Udp), ("udp6", Protocol::Udp)]
    {
        match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) => listeners.extend(parse(&text, protocol)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && table.ends_with('6') => {}
            Err(error) => return Err(error),
        }
    }
    listeners.retain(|listener| wanted(listener.address.port()));
    if !listeners.is_empty() {
        let mut owners = owners();
        for listener in &mut listeners {
            listener.owner = owners.remove(&listener.inode);
        }
    }
    Ok(listeners)
}

fn parse(table: &str, protocol: Protocol) -> impl Iterator<Item = Listener> {
    // TCP_LISTEN, and TCP_CLOSE of a datagram socket without a peer (include/net/tcp_states.h).
    let state = match protocol {
        Protocol::Tcp => "0A",
        Protocol::Udp => "07",
    };
    table.lines().skip(1).filter_map(move |line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let address = address(fields.get(1)?)?;
        let inode = fields.get(9)?.parse().ok()?;
        (*fields.get(3)? == state).then_some(Listener { protocol, address, inode, owner: None })
    })
}

/// `0100007F:1F90`: words of 32 bits as this machine has them in memory, then the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (words, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(words.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let ip = if words.len() == 8 {
        IpAddr::V4(Ipv4Addr::from(word(0)?))
    } else {
        let mut octets = [0; 16];
        for (at, part) in octets.chunks_exact_mut(4).enumerate() {
            part.copy_from_slice(&word(at)?);
        }
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Who has which socket open, as far as this process may see it.
fn owners() -> HashMap<u64, (u32, String)> {
    let mut owners = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        for file in fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten() {
            let target = fs::read_link(file.path()).unwrap_or_default();
            let inode =
                target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            if let Some(inode) = inode {
                owners.insert(inode, (pid, command.trim_end().to_owned()));
            }
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn what_listens_is_found_with_its_process_and_what_is_connected_is_not() -> io::Result<()> {
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let tcp6 = TcpListener::bind("[::1]:0")?;
        let udp = UdpSocket::bind("127.0.0.1:0")?;
        let client = TcpStream::connect(tcp.local_addr()?)?;
        let connected = UdpSocket::bind("127.0.0.1:0")?;
        connected.connect(udp.local_addr()?)?;
        let found = |address: SocketAddr, protocol| -> io::Result<Vec<Listener>> {
            let mut found = read(|port| port == address.port())?;
            found.retain(|listener| listener.address == address && listener.protocol == protocol);
            Ok(found)
        };
        for (address, protocol) in [
            (tcp.local_addr()?, Protocol::Tcp),
            (tcp6.local_addr()?, Protocol::Tcp),
            (udp.local_addr()?, Protocol::Udp),
        ] {
            let listeners = found(address, protocol)?;
            assert_eq!(listeners.len(), 1, "{address}");
            let (pid, _) = listeners[0].owner.as_ref().expect("it is this process");
            assert_eq!(*pid, std::process::id());
        }
        assert_eq!(found(client.local_addr()?, Protocol::Tcp)?, []);
        assert_eq!(found(connected.local_addr()?, Protocol::Udp)?, []);
        Ok(())
    }
}
