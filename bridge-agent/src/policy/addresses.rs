//! From address lists to the trie of prefixes: which side an address is on, and which rules name it.

use std::net::IpAddr;
use std::rc::Rc;

use bridge_common::filter::policy::{AddressInfo, side};
use ipnet::IpNet;

use super::intern::Interner;
use super::ports::{Exhausted, Ports};
use super::tables::Error;

/// How a rule names a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Naming {
    /// No address of the side.
    Nothing,
    /// All of them.
    Everything,
    /// Those of a list, by number.
    List(u32),
}

/// The rules that name a side by one list.
#[derive(Clone, Copy, Default)]
pub(super) struct Use {
    /// Table of the rules that name this side only, by direction.
    pub(super) tables: [u32; 2],
    /// There are rules that name the other side too.
    pub(super) pairs: bool,
}

/// One of the two sides: its networks, and the lists by which rules name addresses in them.
pub(super) struct Side {
    /// Bit of [`side`].
    bit: u16,
    /// Disjoint, ascending.
    networks: Vec<IpNet>,
    /// Disjoint prefixes inside the networks, ascending.
    lists: Interner<Rc<[IpNet]>>,
    /// Lists that name an address together, as ascending numbers; the number of such a set is the class.
    classes: Interner<Rc<[u32]>>,
}

impl Side {
    pub(super) fn new(bit: u16, networks: &Vec<IpNet>) -> Self {
        Self {
            bit,
            networks: IpNet::aggregate(networks),
            lists: Interner::new(Rc::from([])),
            classes: Interner::new(Rc::from([])),
        }
    }

    /// The first pair of networks that are on both sides.
    pub(super) fn overlap(&self, other: &Self) -> Option<(IpNet, IpNet)> {
        let overlaps = |network: &IpNet| Some((*network, *other.inside(network).first()?));
        self.networks.iter().find_map(overlaps)
    }

    pub(super) fn list_count(&self) -> usize {
        self.lists.values().len()
    }

    /// By class, the lists that name it.
    pub(super) fn classes(&self) -> &[Rc<[u32]>] {
        self.classes.values()
    }

    pub(super) fn naming(&mut self, named: Option<&[IpNet]>) -> Naming {
        let Some(named) = named else { return Naming::Everything };
        let mut prefixes: Vec<IpNet> = named.iter().flat_map(|prefix| self.inside(&prefix.trunc())).collect();
        if prefixes.len() > 1 {
            prefixes = IpNet::aggregate(&prefixes);
        }
        if prefixes.is_empty() {
            Naming::Nothing
        } else if prefixes == self.networks {
            Naming::Everything
        } else {
            Naming::List(self.lists.number(Rc::from(prefixes)))
        }
    }

    /// Returns the rules for addresses that `lists` name, inside a prefix whose rules are `above`.
    fn named(
        &mut self,
        above: AddressInfo,
        lists: &[u32],
        uses: &[Use],
        ports: &mut Ports,
    ) -> Result<AddressInfo, Exhausted> {
        let mut info = AddressInfo { side: self.bit, ..above };
        for (direction, set) in info.sets.iter_mut().enumerate() {
            let tables = lists.iter().map(|&list| uses[list as usize].tables[direction]);
            *set = ports.merge_all(tables.chain([*set]).collect())?;
        }
        let mut members: Vec<u32> = lists.iter().copied().filter(|&list| uses[list as usize].pairs).collect();
        if !members.is_empty() {
            members.extend_from_slice(self.classes.value(above.class));
            members.sort_unstable();
            members.dedup();
            ports.spend(members.len())?;
            info.class = self.classes.number(Rc::from(members));
        }
        Ok(info)
    }

    /// The part of `prefix` that lies in the networks.
    fn inside(&self, prefix: &IpNet) -> Vec<IpNet> {
        // In the order of `IpNet` a prefix precedes the prefixes that it contains, and only those come between.
        let after = self.networks.partition_point(|network| network <= prefix);
        if let Some(network) = self.networks[..after].last()
            && network.contains(prefix)
        {
            return vec![*prefix];
        }
        self.networks[after..].iter().take_while(|network| prefix.contains(*network)).copied().collect()
    }
}

/// Classification of a prefix, in the order of precedence.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    /// Address of this node.
    Local,
    /// Address of some node.
    Node,
    /// A network of the side with that index.
    Network(usize),
    /// The side's list of that number names it.
    Named(usize, u32),
}

impl Mark {
    fn list(self) -> Option<u32> {
        if let Self::Named(_, list) = self { Some(list) } else { None }
    }
}

/// The longest matching prefix so far, on the way through the trie.
#[derive(Clone, Copy)]
struct Ancestor {
    prefix: IpNet,
    info: AddressInfo,
    /// Everything below is out of scope too.
    node: bool,
}

/// The entries of the trie. Their `sets` are numbers of tables, not yet of rule sets. `uses` are by side and list.
pub(super) fn entries(
    sides: &mut [Side; 2],
    uses: &[Vec<Use>; 2],
    nodes: &[IpNet],
    local: &[IpAddr],
    ports: &mut Ports,
) -> Result<Vec<(IpNet, AddressInfo)>, Error> {
    let marks = marks(sides, nodes, local);
    let mut entries = Vec::with_capacity(marks.len());
    let mut ancestors: Vec<Ancestor> = Vec::new();
    for at_one_prefix in marks.chunk_by(|a, b| a.0 == b.0) {
        let (prefix, first) = at_one_prefix[0];
        while ancestors.pop_if(|ancestor| !ancestor.prefix.contains(&prefix)).is_some() {}
        let (above, below_node) =
            ancestors.last().map_or_else(Default::default, |ancestor| (ancestor.info, ancestor.node));
        let info = match first {
            Mark::Local => AddressInfo { side: side::LOCAL, ..AddressInfo::default() },
            _ if below_node => continue,
            Mark::Node => AddressInfo { side: side::NODE, ..AddressInfo::default() },
            Mark::Network(index) | Mark::Named(index, _) => {
                let lists: Vec<u32> = at_one_prefix.iter().filter_map(|&(_, mark)| mark.list()).collect();
                sides[index].named(above, &lists, &uses[index], ports).map_err(|Exhausted| {
                    Error::TooManyPortRanges { rules: format!("rules that name {prefix}") }
                })?
            }
        };
        entries.push((prefix, info));
        ancestors.push(Ancestor { prefix, info, node: first == Mark::Node });
    }
    Ok(entries)
}

/// Returns every prefix with its classification, in the order of the trie.
fn marks(sides: &[Side; 2], nodes: &[IpNet], local: &[IpAddr]) -> Vec<(IpNet, Mark)> {
    let mut marks: Vec<(IpNet, Mark)> = Vec::new();
    marks.extend(local.iter().map(|&address| (IpNet::from(address), Mark::Local)));
    marks.extend(nodes.iter().map(|prefix| (prefix.trunc(), Mark::Node)));
    for (index, side) in sides.iter().enumerate() {
        marks.extend(side.networks.iter().map(|&network| (network, Mark::Network(index))));
        for (list, number) in side.lists.values().iter().zip(0..) {
            marks.extend(list.iter().map(|&prefix| (prefix, Mark::Named(index, number))));
        }
    }
    marks.sort_unstable();
    marks
}
