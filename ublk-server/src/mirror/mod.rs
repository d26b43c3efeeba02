//! The mirror manager's connections: lanes to other nodes.

pub mod lane;
