//! Where ports come from: the bitmap that the hooks use too, or the agent's own memory.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bridge_common::pool::{
    Destination, Grant, Granted, Lease, Refusal,
    bitmap::Memory as _,
    slots::{self, Seat, Tables as _},
};

use super::{
    KernelPool, Layout, Settings,
    fifo::FifoPool,
    held::Held,
    kernel::KernelPoolError,
    sweep::Swept,
    tables::{KernelTables, lock},
};

/// How often another port is looked for in the place of one whose last connection is just about to end.
const SETTLE_TRIES: u32 = 4;

/// A port that the agent has claimed for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Where it leads to.
    pub destination: Destination,
    /// Host byte order.
    pub port: u16,
    /// Where it is noted in the kernel; `None` in the agent's own memory.
    seat: Option<(Seat, u32)>,
}

/// Where ports come from.
#[derive(Debug)]
pub enum Backend {
    /// The bitmap that the hooks use too. Its tables are apart from the pool, so that no lease waits for a sweep.
    Kernel(Box<Mutex<KernelPool>>, Arc<KernelTables>),
    /// The agent's own memory, on kernels that lack a feature of the hooks.
    Userspace(Box<Mutex<FifoPool>>),
}

impl Backend {
    /// A pool in the kernel.
    #[must_use]
    pub fn kernel(pool: KernelPool) -> Self {
        let tables = pool.shared_tables();
        Self::Kernel(Box::new(Mutex::new(pool)), tables)
    }

    /// A pool in the agent's memory; `quarantine` is how long conntrack remembers a closed connection.
    #[must_use]
    pub fn userspace(layout: Layout, quarantine: Duration) -> Self {
        Self::Userspace(Box::new(Mutex::new(FifoPool::new(layout, quarantine))))
    }

    /// The name of the kind.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kernel(..) => "kernel",
            Self::Userspace(_) => "userspace",
        }
    }

    /// The ports of the pool.
    #[must_use]
    pub fn layout(&self) -> Layout {
        match self {
            Self::Kernel(_, tables) => lock(&tables.layout).clone(),
            Self::Userspace(pool) => lock(pool).layout().clone(),
        }
    }

    /// Claims a port for a client in the network namespace `netns` and the control group `group`.
    ///
    /// # Errors
    /// Why there is none.
    pub fn acquire(&self, destination: &Destination, netns: u64, group: u64) -> Result<Claimed, Refusal> {
        let tables = match self {
            Self::Kernel(_, tables) => &**tables,
            Self::Userspace(pool) => {
                let port = lock(pool).acquire(destination, netns, Instant::now())?;
                return Ok(Claimed { destination: *destination, port, seat: None });
            }
        };
        let config = lock(&tables.layout).config;
        let seat = slots::enter(tables, destination, netns, group)?;
        let mut tries = 0;
        let mut woken = false;
        let index = loop {
            match slots::claim(tables, seat, config.quota, tries > 0) {
                Ok(claim) if tries < SETTLE_TRIES && slots::settling(tables, seat, claim) => {
                    slots::unclaim(tables, seat, config.quota, claim);
                    tries += 1;
                }
                Ok(claim) => break claim.index,
                Err(_) if !woken && tables.wake_usable(seat).is_ok_and(|woken| woken > 0) => woken = true,
                Err(refusal) => {
                    let rests = tables.load(tables.geometry().resting(seat.owner_slot)) != 0;
                    slots::leave(tables, seat);
                    return Err(if rests && refusal == Refusal::EXHAUSTED {
                        Refusal::RESTING
                    } else {
                        refusal
                    });
                }
            }
        };
        let granted = Granted { netns_cookie: netns, slot: seat.slot, owner_slot: seat.owner_slot };
        if tables.grant(Grant::new(*destination, index), granted).is_err() {
            slots::release(tables, seat, index);
            return Err(Refusal::TABLE_FULL);
        }
        let port = lock(&tables.layout).port(index);
        Ok(Claimed { destination: *destination, port, seat: Some((seat, index)) })
    }

    /// Gives a port back, unless the socket that was bound to it is hooked: then the hook will.
    pub fn release(&self, claimed: &Claimed) {
        match (self, claimed.seat) {
            (Self::Kernel(_, tables), Some((seat, index)))
                if tables.revoke(&Grant::new(claimed.destination, index)) =>
            {
                slots::release(&**tables, seat, index);
            }
            (Self::Userspace(pool), None) => {
                lock(pool).release(&claimed.destination, claimed.port, Instant::now());
            }
            _ => {}
        }
    }

    /// Switches to other ports and settings; held ports stay held.
    ///
    /// # Errors
    /// [`KernelPoolError`].
    pub fn change(&self, settings: &Settings, layout: Layout) -> Result<(), KernelPoolError> {
        match self {
            Self::Kernel(pool, _) => lock(pool).change(settings, layout),
            Self::Userspace(pool) => {
                lock(pool).change(layout);
                Ok(())
            }
        }
    }

    /// How many ports are held, and how many are warm.
    ///
    /// # Errors
    /// A system call fails.
    pub fn held(&self) -> Result<Held, KernelPoolError> {
        match self {
            Self::Kernel(pool, _) => lock(pool).held(),
            Self::Userspace(pool) => Ok(lock(pool).held()),
        }
    }

    /// The ports that sockets hold.
    ///
    /// # Errors
    /// This kernel has no such count.
    pub fn sockets(&self) -> Result<Vec<Lease>, KernelPoolError> {
        match self {
            Self::Kernel(pool, _) => lock(pool).walk(),
            Self::Userspace(_) => Ok(Vec::new()),
        }
    }

    /// Releases ports whose rest is over.
    ///
    /// # Errors
    /// [`KernelPoolError`].
    pub fn wake(&self) -> Result<u32, KernelPoolError> {
        match self {
            Self::Kernel(_, tables) => {
                tables.wake().map_err(|source| KernelPoolError::Map { name: "POOL_RESTING", source })
            }
            // It hands ports out in the order in which they came back.
            Self::Userspace(_) => Ok(0),
        }
    }

    /// Whether more than a quarter of the slots for destinations are taken.
    #[must_use]
    pub fn is_short_of_slots(&self) -> bool {
        match self {
            Self::Kernel(_, tables) => tables.is_short_of_slots(),
            Self::Userspace(_) => false,
        }
    }

    /// Performs periodic work; see [`super::sweep`].
    ///
    /// # Errors
    /// [`KernelPoolError`].
    pub fn sweep(&self, known: impl FnMut(&Destination, u16) -> bool) -> Result<Swept, KernelPoolError> {
        match self {
            Self::Kernel(pool, _) => lock(pool).sweep(known),
            Self::Userspace(pool) => {
                lock(pool).sweep(Instant::now());
                Ok(Swept::default())
            }
        }
    }
}
