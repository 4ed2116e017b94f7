//! Bind before connect.
