//! The packet path is loaded, pinned, adopted, attached and removed as its documentation says; the kernel is asked.

mod agent;
mod attach;
mod load;
mod pins;
mod policy;
mod seed;
mod support;
