//! Choosing slots.
