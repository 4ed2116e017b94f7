//! Network namespaces without names: they are gone when the last descriptor is closed, also after a crash.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::resume_unwind;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::wait::until;

/// A network namespace. Clones stand for the same one.
#[derive(Clone, Debug)]
pub struct Ns {
    file: Arc<File>,
}

impl Default for Ns {
    fn default() -> Self {
        Self::new()
    }
}

impl Ns {
    /// Makes a namespace, with loopback up. Needs CAP_SYS_ADMIN.
    #[must_use]
    pub fn new() -> Self {
        let file = thread::spawn(|| {
            // SAFETY: only the network namespace of this thread changes; no descriptor or memory is unshared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace takes CAP_SYS_ADMIN");
            File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        let ns = Self { file: Arc::new(file) };
        ns.ip("link set lo up");
        // Link-local addresses too are usable at once, and nothing changes by itself later.
        ns.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap());
        ns
    }

    /// Where other programs find it, as long as this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Opens a namespace that has a name or a path.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: Arc::new(File::open(path)?) })
    }

    /// Returns the descriptor, for the start of a process inside.
    pub(crate) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Moves the calling thread into the namespace, for good.
    fn move_into(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Runs `body` on a thread inside. A panic in it continues in the caller.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            self.move_into().expect("enter the network namespace");
            body()
        };
        thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs `body` on a thread inside, without waiting for it.
    pub fn spawn<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let own = self.clone();
        thread::spawn(move || {
            own.move_into().expect("enter the network namespace");
            body()
        })
    }

    /// Runs a program inside, which must succeed, and returns its standard output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        self.enter(|| {
            let output = Command::new(program).args(arguments).output().unwrap();
            assert!(
                output.status.success(),
                "{program} {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// `ip` with these words.
    pub fn ip(&self, words: &str) -> String {
        self.run("ip", &words.split_whitespace().collect::<Vec<_>>())
    }

    /// A veth pair: `mine` in here, `theirs` in there, both up.
    pub fn link(&self, mine: &str, there: &Self, theirs: &str) {
        self.ip(&format!("link add {mine} type veth peer name {theirs} netns {}", there.path()));
        self.ip(&format!("link set {mine} up"));
        there.ip(&format!("link set {theirs} up"));
    }

    /// An address; IPv6 is usable at once, without duplicate address detection.
    pub fn address(&self, device: &str, net: &str) {
        let nodad = if net.contains(':') { " nodad" } else { "" };
        self.ip(&format!("address add {net} dev {device}{nodad}"));
        // The kernel makes an IPv6 address usable from a work queue.
        let address = net.split('/').next().unwrap();
        until("the address is usable", SECONDS, || {
            self.ip("-6 route show table local").contains(address)
                || self.ip("-4 route show table local").contains(address)
        });
    }

    /// bridge's routes, as another program reads them: `ip -json route`, one line each.
    pub fn own_routes(&self) -> BTreeSet<String> {
        self.routes(|protocol| protocol == "98")
    }

    /// Everybody else's.
    pub fn foreign_routes(&self) -> BTreeSet<String> {
        self.routes(|protocol| protocol != "98")
    }

    fn routes(&self, wanted: impl Fn(&str) -> bool) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for family in ["-4", "-6"] {
            let json = self.ip(&format!("-json -details {family} route show table all"));
            let routes: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
            for route in routes.iter().filter(|route| wanted(route["protocol"].as_str().unwrap_or_default()))
            {
                found.insert(line(route));
            }
        }
        found
    }
}

fn line(route: &serde_json::Value) -> String {
    let text =
        |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let hop = |hop: &serde_json::Value| {
        let via = if hop["via"].is_object() { text(&hop["via"]["host"]) } else { text(&hop["gateway"]) };
        format!(" via {via} dev {}", text(&hop["dev"]))
    };
    let mut line = format!("{} {}", text(&route["type"]), text(&route["dst"]));
    match route["nexthops"].as_array() {
        Some(hops) => {
            let mut hops: Vec<_> =
                hops.iter().map(|one| format!("{} weight {}", hop(one), one["weight"])).collect();
            hops.sort();
            line.push_str(&hops.concat());
        }
        None if route["type"] == "blackhole" => {}
        None => line.push_str(&hop(route)),
    }
    line + &format!(" metric {} table {}", text(&route["metric"]), text(&route["table"]))
}

/// A deadline for operations of milliseconds, on a busy machine.
pub const SECONDS: Duration = Duration::from_secs(5);

/// Both sides know each other's hardware address: no packet has to wait for ARP or neighbour discovery.
pub fn acquaint(ns: &Ns, address: &str) {
    ns.enter(|| {
        let any = if address.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
        std::net::UdpSocket::bind(any).unwrap().send_to(b"", (address, 9)).unwrap();
    });
    until("the neighbour answers", SECONDS, || ns.ip(&format!("neigh show {address}")).contains("lladdr"));
}
