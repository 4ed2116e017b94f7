//! Routes from LAN hosts to pod networks, in network namespaces of their own. Needs root.

mod kernel;
