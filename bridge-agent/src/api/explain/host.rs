//! Routes of a host, and the port pool with its clients.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
};

use bridge_common::pool::FLAG_STRICT;

use super::super::{Problem, no_ebpf};
use crate::{
    config::PoolScope,
    explain::{self, Client, Explanation, Hook, PoolFacts, Question, Request, RouteFacts, StageOutcome},
    interfaces::{Observer, Selection},
    kernel::netlink::{Packet, Route},
    pool::{
        attach::CgroupError,
        hooked::{self, Hooked},
        kernel::KernelPoolError,
        service::{Service, Transport},
    },
    state::Shared,
};

/// Returns the client of a request, as the hooks of the kernel see it.
pub(super) fn client(shared: &Shared, request: &Request) -> Result<Option<Client>, Problem> {
    let Some((name, cgroup)) = request.client().zip(request.cgroup.clone()) else { return Ok(None) };
    let hook = match shared.pool().map(|pool| pool.backend().hooked(Path::new(&cgroup))) {
        None | Some(Ok(Hooked::No)) => Hook::None,
        Some(Ok(Hooked::By(group))) => Hook::By(group),
        Some(Err(KernelPoolError::Cgroup(error @ CgroupError::Missing { .. }))) => {
            return Err(Problem::new(axum::http::StatusCode::BAD_REQUEST, "cgroup", error.to_string()));
        }
        Some(Err(error)) => Hook::Unknown(format!("its hooks cannot be listed: {error}")),
    };
    Ok(Some(Client { name, cgroup, hook }))
}

/// The pool of a host without a policy.
pub(super) fn pool(shared: &Shared) -> Option<PoolScope> {
    let service = shared.pool()?;
    let everything = service.backend().hooked(Path::new("/")).is_ok_and(|hooked| hooked != Hooked::No);
    let layout = service.backend().layout();
    Some(PoolScope {
        strict: layout.config.flags & FLAG_STRICT != 0,
        ports: layout.ports.ranges(),
        destinations: service.networks(),
        cgroups: everything.then(|| "/".to_owned()).into_iter().collect(),
    })
}

/// Explains a connection on a host that enforces nothing.
pub(super) fn explain(
    shared: &Shared,
    question: &Question,
    client: Option<&Client>,
) -> Result<Explanation, Problem> {
    let (routes, pool) = (shared.routes(), pool(shared));
    if routes.is_none() && pool.is_none() {
        return Err(no_ebpf());
    }
    let unreadable = |error: std::io::Error| {
        let text = format!("the addresses of this host cannot be read: {error}");
        Problem::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, "kernel", text)
    };
    let snapshot = Observer::open()
        .and_then(|mut observer| observer.snapshot(&Selection::default()))
        .map_err(unreadable)?;
    let local: Vec<IpAddr> = snapshot.addresses.iter().copied().collect();
    let snapshot = routes.map(|view| view.status.borrow().clone());
    let ways = |to: IpAddr| {
        let kernel = Route::open().and_then(|mut route| route.way(to, &Packet::default()));
        RouteFacts::new(to, snapshot.as_deref(), kernel)
    };
    let facts = PoolFacts { scope: pool.as_ref(), client, ephemeral: hooked::ephemeral() };
    let mut explanation = explain::on_host(question, &local, facts, &ways);
    add_supply(&mut explanation, shared.pool().as_deref());
    Ok(explanation)
}

/// Adds to the stage of the pool the number of ports that are free towards the destination.
pub(super) fn add_supply(explanation: &mut Explanation, service: Option<&Service>) {
    let Question { protocol, destination, destination_port, .. } = explanation.question;
    let transport = match protocol.0 {
        6 => Transport::Tcp,
        17 => Transport::Udp,
        _ => return,
    };
    let stage = explanation.stages.iter_mut().find(|stage| stage.name == "pool");
    let (Some(stage), Some(service)) = (stage.filter(|stage| stage.seen.starts_with("one of")), service)
    else {
        return;
    };
    let to = SocketAddr::new(destination, destination_port);
    let Ok(supply) = service.backend().supply(to, transport) else { return };
    stage.seen += &format!("; {} of {} are free towards {to}", supply.free, supply.all);
    match (supply.free, supply.warm) {
        (0, 0) => {
            stage.outcome = StageOutcome::Deny;
            "each is in use: `connect` is refused at once (EADDRNOTAVAIL); `bridge-agent ports list` has the owners"
                .clone_into(&mut stage.why);
            explanation.summary += "\nREFUSED by the port pool: no port is free";
        }
        (0, warm) => {
            stage.outcome = StageOutcome::Unknown;
            stage.why = format!("{warm} more only for the network namespaces that have used them lately");
        }
        (_, 0) => {}
        (_, warm) => stage.why += &format!("; {warm} more are kept for those that have used them lately"),
    }
}
