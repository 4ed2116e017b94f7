//! The packet path is loaded, pinned, adopted, attached and removed as its documentation says; the kernel is asked.

mod load;
mod support;
